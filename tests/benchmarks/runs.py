"""One run of one contestant: over the backlog, or live. A run whose sinks do not hold what was sent does not count."""

import json
import signal
from dataclasses import dataclass

from streaming.kafka import PROCESSED_ORDERS
from tests.benchmarks.arena import Stage
from tests.benchmarks.contestants import Contestant
from tests.benchmarks.latency import Latency, measure_live
from tests.benchmarks.measure import BenchmarkError, Usage, finish, running, timeline

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


@dataclass(frozen=True)
class LiveRun:
    """A contestant under a steady stream of orders."""

    name: str
    latency: Latency
    usage: Usage


def run_backlog(contestant: Contestant, stage: Stage, orders: int) -> BacklogRun:
    """Let a contestant screen the backlog of `orders` orders.

    Raises:
        BenchmarkError: it failed, or Postgres or Kafka do not hold every order.
    """
    before = stage.messages(PROCESSED_ORDERS)
    with running(contestant.backlog, stage.environment | contestant.environment, stage.log) as (process, usage):
        output = finish(process, stage.log, timeout_seconds=BACKLOG_TIMEOUT_SECONDS)
    stored, published = stage.stored(), stage.messages(PROCESSED_ORDERS) - before
    if stored["orders"] != orders or published < orders:
        raise BenchmarkError(
            f"{contestant.name}: of {orders} orders {stored['orders']} are in Postgres and {published} verdicts in Kafka:"
            f" the run does not count. Its log is {stage.log}"
        )
    seconds, steady_rate = _times(contestant, stage, output)
    return BacklogRun(contestant.name, orders, seconds, steady_rate, stored["frauds"], usage)


def _times(contestant: Contestant, stage: Stage, output: str) -> tuple[float, float]:
    if contestant.is_spark:
        query = timeline(stage.checkpoints)
        return query.seconds, query.steady_rate
    printed = json.loads(output.splitlines()[-1])
    return printed["seconds"], printed["rate"]


def run_live(contestant: Contestant, stage: Stage, *, rate: int, warm_up_seconds: float, seconds: float, seed: int) -> LiveRun:
    """Let a contestant screen orders as they come, then stop it.

    Raises:
        BenchmarkError: it failed, or verdicts are missing.
    """
    with running(contestant.live, stage.environment | contestant.environment, stage.log) as (process, usage):
        try:
            latency = measure_live(stage.settings, rate=rate, warm_up_seconds=warm_up_seconds, seconds=seconds, seed=seed)
        except BenchmarkError as error:
            end = stage.log.read_text(errors="replace")[-3_000:]
            raise BenchmarkError(f"{contestant.name}: {error}. Its log, {stage.log}, ends:\n{end}") from error
        process.terminate()
        finish(process, stage.log, timeout_seconds=STOP_TIMEOUT_SECONDS, accept=(0, TERMINATED))
    return LiveRun(contestant.name, latency, usage)
