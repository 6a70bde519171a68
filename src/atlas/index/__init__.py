"""The index: passages, their embeddings or codes, exact and compressed search over all ranks, and the files of it.

May import: config, files, runtime. Nothing here knows of models: an index takes and gives tensors and passages.
"""
