"""Spark's Python workers: processes that run one task after another, in every micro-batch."""

import gc
from functools import cache


@cache
def freeze_imports() -> None:
    """Keep the garbage collector from what this worker has imported. To be called by its first task; later calls do nothing.

    Spark's worker collects garbage after each task, and its next one waits for that: 50 ms and more to look through a
    hundred thousand objects of modules, none of which will ever be garbage.
    """
    gc.freeze()
