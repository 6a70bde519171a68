"""The model, from text to losses.

`inputs` makes what reader and retriever read; `reader` and `retriever` are the two halves (`causal` and `prompts` where
a language model reads, `interface` what holds for both readers); `signals` says how the reader judges passages (gold
scores), `losses` what the retriever learns from that; `atlas` joins both, `load` loads them. `adapters` can be trained
in the place of the weights.

May import: checkpoint, config, files, runtime. Tensor code here knows nothing of ranks, searches or data files.
"""
