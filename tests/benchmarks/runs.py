"""One run of one contestant: over the backlog, or live. A run whose sinks do not hold what was sent does not count."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from streaming.kafka import PROCESSED_ORDERS
from tests.benchmarks.arena import Stage
from tests.benchmarks.latency import Latency, Pace, measure_live, percentile
from tests.benchmarks.measure import BenchmarkError, Usage, finish, running, timeline
from tests.benchmarks.rivals.contestants import Contestant

BACKLOG_TIMEOUT_SECONDS = 1_800
STOP_TIMEOUT_SECONDS = 150
TERMINATED = 128 + signal.SIGTERM  # how a JVM without a handler of its own says that it was told to stop


@dataclass(frozen=True)
class BacklogRun:
    """A contestant over the whole backlog.

    Attributes:
        seconds: from the first message asked for to the last commit: for Spark, from the start of its query.
        steady_rate: orders a second without Spark's first micro-batch; for others that of the whole run.
        frauds: orders that ended as Fraud in Postgres.
    """

    name: str
    orders: int
    seconds: float
    steady_rate: float
    frauds: int
    usage: Usage

    @property
    def rate(self) -> float:
        """Orders a second over the whole run."""
        return self.orders / self.seconds

    def numbers(self) -> dict[str, float]:
        """Everything measured, by name."""
        return {
            "orders": self.orders,
            "frauds": self.frauds,
            "rate": self.rate,
            "steady_rate": self.steady_rate,
            "seconds": self.seconds,
            "process_seconds": self.usage.seconds,
            "cpu_seconds": self.usage.cpu_seconds,
            "backlog_peak_mib": self.usage.peak_mib,
            "backlog_growth": self.usage.growth,
        }


@dataclass(frozen=True)
class LiveRun:
    """A contestant under a steady stream of orders."""

    name: str
    latency: Latency
    usage: Usage

    def numbers(self) -> dict[str, float]:
        """Everything measured, by name."""
        kafka, postgres = self.latency.kafka_ms, self.latency.postgres_ms
        return {
            "live_orders": len(kafka),
            "kafka_p50_ms": percentile(kafka, 50),
            "kafka_p99_ms": percentile(kafka, 99),
            "postgres_p50_ms": percentile(postgres, 50),
            "postgres_p99_ms": percentile(postgres, 99),
            "live_peak_mib": self.usage.peak_mib,
            "live_growth": self.usage.growth,
        }


def run_backlog(contestant: Contestant, stage: Stage, orders: int) -> BacklogRun:
    """Let a contestant screen the backlog of `orders` orders.

    Raises:
        BenchmarkError: it failed, or Postgres or Kafka do not hold every order.
    """
    before = stage.messages(PROCESSED_ORDERS)
    with _started(contestant, contestant.backlog, stage) as (process, usage):
        output = finish(process, stage.log, timeout_seconds=BACKLOG_TIMEOUT_SECONDS)
    stored, published = stage.stored(), stage.messages(PROCESSED_ORDERS) - before
    if stored["orders"] != orders or published < orders:
        raise BenchmarkError(f"{stored['orders']} orders in Postgres, {published} verdicts in Kafka, {orders} were sent")
    seconds, steady_rate = _times(contestant, stage, output)
    return BacklogRun(contestant.name, orders, seconds, steady_rate, stored["frauds"], usage)


def run_live(contestant: Contestant, stage: Stage, pace: Pace, seed: int) -> LiveRun:
    """Let a contestant screen orders as they come, then stop it.

    Raises:
        BenchmarkError: it failed, or verdicts are missing.
    """
    with _started(contestant, contestant.live, stage) as (process, usage):
        latency = measure_live(stage.settings, pace, seed)
        process.terminate()
        finish(process, stage.log, timeout_seconds=STOP_TIMEOUT_SECONDS, accept=(0, TERMINATED))
    return LiveRun(contestant.name, latency, usage)


@contextmanager
def _started(contestant: Contestant, command: Sequence[str], stage: Stage) -> Iterator[tuple[subprocess.Popen[str], Usage]]:
    """A contestant for one block; what goes wrong in it is told with the contestant's name and the end of its log."""
    environment = {**os.environ, **contestant.environment, **stage.environment}
    try:
        with running(command, environment, stage.log) as started:
            yield started
    except BenchmarkError as error:
        end = stage.log.read_text(errors="replace")[-3_000:]
        raise BenchmarkError(f"{contestant.name}: {error}. Its log, {stage.log}, ends:\n{end}") from error


def _times(contestant: Contestant, stage: Stage, output: str) -> tuple[float, float]:
    """Seconds and steady rate: of a streaming query from its checkpoint, of a process from the last line it printed."""
    if contestant.is_spark:
        query = timeline(stage.checkpoints)
        return query.seconds, query.steady_rate
    printed = json.loads(output.splitlines()[-1])
    return printed["seconds"], printed["rate"]
