"""What Spark's Python workers do beside their tasks."""

import subprocess
import sys

# In a process of its own: what is frozen stays so.
_WORKER = """
import gc
from datetime import UTC, datetime
from conf.rules import FraudRules
from streaming.screening.division import By, Division
from streaming.screening.ledger import Entry
from streaming.screening.pipeline import Screening, Task, _parse
from streaming.screening.sinks import KafkaSink
from streaming.screening.state import MicroBatch

imported = len(gc.get_objects())
screening = Screening(tasks=2, backlog_offsets=None, dsn="", kafka=KafkaSink({}, {}))
now = datetime.now(UTC)
rules = FraudRules(version="1")
entry = Entry("", 0, 1, now, now, "1", {}, False)
list(_parse(Task(screening, entry, MicroBatch("", Division(By.PRODUCT, 2), 0), now, rules), iter([])))
print(imported, gc.get_freeze_count(), len(gc.get_objects()))
"""


def test_after_its_first_task_a_worker_collects_no_garbage_among_its_imports() -> None:
    done = subprocess.run([sys.executable, "-c", _WORKER], capture_output=True, text=True, check=True)

    imported, spared, looked_through = map(int, done.stdout.split())
    assert imported > 50_000, "the worker has imported pandas, polars and PySpark"
    assert spared >= imported
    assert looked_through < imported / 100


_LATE_IMPORTS = """
import gc
from conf.workers import freeze_imports

looked_through = []
for task in range(12):
    freeze_imports()
    looked_through.append(len(gc.get_objects()))
    if task == 1:
        import polars, pydantic, http.server
    if task == 10:
        kept = [[] for _ in range(50_000)]
print(*looked_through)
"""


def test_what_one_of_its_first_tasks_imports_is_no_garbage_to_later_ones_either_but_what_comes_much_later_may_be() -> None:
    done = subprocess.run([sys.executable, "-c", _LATE_IMPORTS], capture_output=True, text=True, check=True)

    *first, last = map(int, done.stdout.split())
    assert max(first) < 2_000
    assert last > 50_000


def test_a_worker_of_the_export_imports_nothing_that_it_has_no_use_for() -> None:
    unused = "{'pandas', 'polars', 'google.cloud.bigquery'}"
    run = f"import sys, batch.warehouse.export; print(*({unused} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "", "half a second for each worker"
