"""The model, from text to losses.

`inputs` makes the inputs of both halves, `reader` and `retriever`; `signals` measures how useful passages were to the
reader (gold scores), `losses` teaches that to the retriever; `atlas` joins both halves, `load` loads them.

May import: checkpoint, config, files, runtime. The tensor code here knows nothing about ranks, indices or data files.
"""
