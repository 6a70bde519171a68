"""Reading and writing files: jsonl larger than memory, files that are written completely or not at all, checksums.

May import: nothing of this package.
"""
