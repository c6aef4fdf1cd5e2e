"""RecallQ against plain Celery, in one interleaved run: ``python -m tests.benchmarks.speed``.

`works` says what is measured and how it is told, `clients` does it in processes of its own, for
both sides, `plain` is the Celery app that somebody would write without RecallQ, `stack` starts the
servers and workers, `report` makes the table.
"""
