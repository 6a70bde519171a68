"""Reading and writing files: jsonl larger than memory, and files that appear whole or not at all.

May import: nothing of this package.
"""
