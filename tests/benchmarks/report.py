"""The results as one table, ratios first, and as JSON."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.benchmarks.latency import percentile
from tests.benchmarks.measure import Usage
from tests.benchmarks.runs import BacklogRun, LiveRun


@dataclass
class Results:
    """Every run, in the order in which they ran."""

    machine: dict[str, Any]
    planted: dict[str, int]
    backlog: list[BacklogRun] = field(default_factory=list)
    live: list[LiveRun] = field(default_factory=list)
