"""Evaluation: every example of a file once, its metrics, and the result file.

May import: config, files, metrics, model, retrieval, runtime, tasks.
"""
