"""Training: the steps of the loop, the plan of when what happens, and the optimizers.

May import: checkpoint, config, evaluation, files, model, retrieval, runtime, tasks.
"""
