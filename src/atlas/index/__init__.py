"""The index: passages, and how they are searched and stored.

`flat` and `compressed` search one rank's rows, `sharded` those of all ranks; `bm25` searches by words. `codec` has the
kinds of codes, `build` makes an index of embeddings. `store` saves and opens a directory; `directory` and `arrays` are
the files in it. `update` adds and deletes passages, `live` are the rows that are left. `published` reads the released
format, `convert` makes one index into another.

May import: config, files, runtime. Nothing here knows of models: an index takes and gives tensors and passages.
"""
