"""Reading and writing files: jsonl files larger than memory, a cache of what is derived from them, locks, and files
that are written completely or not at all.

May import: nothing of this package.
"""
