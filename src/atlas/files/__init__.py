"""Reading and writing files: jsonl files larger than memory, and files that are written completely or not at all.

May import: nothing of this package.
"""
