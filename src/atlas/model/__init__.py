"""The model, from text to losses: tokenizers, reader, retriever, gold scores, and the loss that joins them.

May import: checkpoint, config, files, runtime. The tensor code here knows nothing about ranks, indices or data files.
"""
