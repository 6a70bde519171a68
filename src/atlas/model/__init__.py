"""The model, from text to losses: tokenizers, reader, retriever, gold scores, and the loss that joins them.

May import: checkpoint, config, files, runtime. Tensor code here knows nothing of ranks, searches or files of data.
"""
