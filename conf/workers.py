"""Spark's Python workers: processes that run one task after another, in every micro-batch."""

import gc
from itertools import count

_FIRST_TASKS = 8
_tasks = count()


def freeze_imports() -> None:
    """Keep the garbage collector from what this worker has imported. To be called where its tasks begin; only the first count.

    Spark's worker collects garbage after each task, and its next one waits for that: 50 ms and more to look through a
    hundred thousand objects of modules, none of which will ever be garbage. The first task is not enough: it opens
    connections and meets its first orders, and what that imports is another third of it.
    """
    if next(_tasks) < _FIRST_TASKS:  # not ever again, or what turns to garbage later would stay
        gc.freeze()
