"""What a contestant costs: time, processor and memory of a command and all its children, and what Spark's checkpoint tells.

A streaming query leaves its own record: the checkpoint's `metadata` is written when the query starts, `offsets/N` names what
batch N reads, `commits/N` is written when all its sinks are done. So every Spark query is timed alike, whatever it prints.
"""

import json
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread

import psutil

from conf.errors import FinproError

SAMPLE_SECONDS = 0.5


class BenchmarkError(FinproError):
    """A run that does not count: a contestant failed, or its sinks do not hold what was sent."""


@dataclass
class Usage:
    """Resources of a process tree. Memory is the sum of resident sets: pages that forks share count each time."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    rss_mib: list[int] = field(default_factory=list)

    @property
    def peak_mib(self) -> int:
        """The largest sample."""
        return max(self.rss_mib, default=0)

    @property
    def growth(self) -> float:
        """The median of the last sixth over that of the fourth: the first half warms up, and 1.0 is flat."""
        warm = self.rss_mib[len(self.rss_mib) // 2 :]
        third = len(warm) // 3
        return statistics.median(warm[-third:]) / statistics.median(warm[:third]) if third else 1.0


@dataclass(frozen=True)
class Timeline:
    """A streaming query by its checkpoint: when it started, and per micro-batch when it was committed and what it read."""

    started: float
    committed: list[float]
    orders: list[int]

    @property
    def seconds(self) -> float:
        """From the query's start to its last commit."""
        return self.committed[-1] - self.started

    @property
    def steady_rate(self) -> float:
        """Orders a second without the first micro-batch, in which Spark compiles and starts its workers."""
        return sum(self.orders[1:]) / (self.committed[-1] - self.committed[0]) if len(self.orders) > 1 else 0.0


def timeline(checkpoints: Path) -> Timeline:
    """Read the record of the one query under `checkpoints`.

    Raises:
        BenchmarkError: there is no query that has committed a batch, or more than one query.
    """
    queries = [path.parent for path in checkpoints.glob("**/metadata") if (path.parent / "commits" / "0").exists()]
    if len(queries) != 1:
        raise BenchmarkError(f"{checkpoints} holds {len(queries)} queries with a committed batch: one was expected")
    (query,) = queries
    batches = sorted(int(path.name) for path in (query / "commits").iterdir() if path.name.isdigit())
    ends = [_end_offset(query / "offsets" / str(batch)) for batch in batches]
    return Timeline(
        started=(query / "metadata").stat().st_mtime,
        committed=[(query / "commits" / str(batch)).stat().st_mtime for batch in batches],
        orders=[end - start for start, end in zip([0, *ends], ends, strict=False)],
    )


def _end_offset(offsets: Path) -> int:
    """The sum of a batch's end offsets over all partitions."""
    (partitions,) = json.loads(offsets.read_text().splitlines()[-1]).values()
    return sum(partitions.values())


@contextmanager
def running(command: Sequence[str], env: Mapping[str, str], log: Path) -> Iterator[tuple[subprocess.Popen[str], Usage]]:
    """Run a command for one block, watching what it and its children use; none of them outlives the block.

    Its output goes to `log`.
    """
    usage, done, started = Usage(), Event(), time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT, text=True)
    watcher = Thread(target=_watch, args=(process.pid, usage, done), daemon=True)
    watcher.start()
    try:
        yield process, usage
    finally:
        usage.seconds = time.monotonic() - started  # to the end of the block, and not to the last sample
        tree = _tree(process.pid)
        done.set()
        watcher.join()
        _stop(process, tree)


def finish(process: subprocess.Popen[str], log: Path, *, timeout_seconds: float, accept: Sequence[int] = (0,)) -> str:
    """Wait for a command's end, with one of the exit codes in `accept`; returns what it printed.

    Raises:
        BenchmarkError: it failed or took too long.
    """
    try:
        code = process.wait(timeout_seconds)
    except subprocess.TimeoutExpired as error:
        raise BenchmarkError(f"not done after {timeout_seconds:.0f} s") from error
    if code not in accept:
        raise BenchmarkError(f"ended with exit code {code}")
    return log.read_text(errors="replace")


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _watch(pid: int, usage: Usage, done: Event) -> None:
    cpu_by_pid: dict[int, float] = {}
    while not done.is_set() and (tree := _tree(pid)):
        rss = 0
        for process in tree:
            with suppress(psutil.NoSuchProcess):
                rss += process.memory_info().rss
                times = process.cpu_times()
                cpu_by_pid[process.pid] = times.user + times.system
        usage.cpu_seconds = sum(cpu_by_pid.values())
        if rss:  # none is left of a process that has ended and was not yet waited for
            usage.rss_mib.append(rss >> 20)
        done.wait(SAMPLE_SECONDS)


def _stop(process: subprocess.Popen[str], tree: list[psutil.Process]) -> None:
    """End what is left of a tree: politely, then not."""
    for member in tree:
        with suppress(psutil.NoSuchProcess):
            member.terminate()
    _, stubborn = psutil.wait_procs(tree, timeout=10)
    for member in stubborn:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
