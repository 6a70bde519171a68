"""Reading and writing files: jsonl larger than memory, a cache of what is derived from files, locks, checksums, files
that are written completely or not at all.

May import: nothing of this package.
"""
