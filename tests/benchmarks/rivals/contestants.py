"""Who runs: finpro, its rival, and the floor below it. Each is a command in a process of its own."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jobs.spark.submit import environment, spark_submit

MASTER = "local[2,4]"
MEMORY = "1g"
MAX_OFFSETS_PER_TRIGGER = 150_000


@dataclass(frozen=True)
class Contestant:
    """A way to screen orders.

    Attributes:
        backlog: the command that screens what is there, then ends.
        live: the command that goes on until it is stopped; empty when it is not timed live.
        is_spark: its query leaves a checkpoint to time it by; otherwise it prints its own time as a line of JSON.
        environment: what its command needs beside the settings.
    """

    name: str
    backlog: tuple[str, ...]
    live: tuple[str, ...]
    is_spark: bool
    environment: Mapping[str, str]


def finpro() -> Contestant:
    """The command that everyone uses."""
    screen = (str(Path(sys.executable).with_name("finpro")), "screen", "--master", MASTER, "--memory", MEMORY)
    return _spark("finpro", screen, {})


def floor() -> Contestant:
    """finpro's own spark-submit line with another job at its end, so that the settings are the same whatever they become."""
    *command, _job = spark_submit("screen_orders", [], master=MASTER, memory=MEMORY, conf=[])
    return _spark("floor", (*command, str(Path(__file__).with_name("floor.py"))), environment("floor", master=MASTER))


def peer() -> Contestant:
    """One Python process."""
    return Contestant("peer", (sys.executable, "-m", "tests.benchmarks.rivals.peer"), live=(), is_spark=False, environment={})


def _spark(name: str, command: tuple[str, ...], environment: Mapping[str, str]) -> Contestant:
    live = (*command, "--max-offsets-per-trigger", str(MAX_OFFSETS_PER_TRIGGER))
    return Contestant(name, (*live, "--available-now"), live, is_spark=True, environment=environment)
