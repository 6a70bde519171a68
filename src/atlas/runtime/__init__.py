"""What a run runs on: ranks, data parallelism, the device, the log, metrics, the start and end of a run, `--verify`.

May import: config, files, options. Everything above may import it. Collectives are called here only, and every
choice that depends on the device is made here.
"""
