"""A trained model to ask: in Python, in a terminal, in a browser, and by other programs over HTTP.

`settings` says which model is meant and with which flags it answers, `loading` loads it, `model` answers; `answers` is
what it returns. `command` is ask.py: `terminal` prompts, `server` serves the page and the endpoints, `waiting` lets all
that ask at the same time share one model.

May import: checkpoint, command_line, config, embedding, evaluation, files, index, model, options, preflight, report,
retrieval, runtime, tasks.
"""
