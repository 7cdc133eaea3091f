"""The results as one table, ratios first, and as JSON. Of repeated runs the table shows the median."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from tests.benchmarks import bench_backtest, bench_export, bench_generate
from tests.benchmarks.bench_backtest import BacktestRun
from tests.benchmarks.bench_export import ExportRun
from tests.benchmarks.bench_generate import LoadRun
from tests.benchmarks.measure import Usage
from tests.benchmarks.runs import BacklogRun, LiveRun

_SHOWN_SAMPLES = 20
# What is measured, its label, and how it is written. Ratios are filled in from the measures they divide.
_RATIOS = (
    ("rate", "peer", "backlog: orders/s, the peer's = 1"),
    ("rate", "floor", "backlog: orders/s, the floor's = 1"),
    ("kafka_p50_ms", "floor", "live: median latency, the floor's = 1"),
    ("kafka_p99_ms", "floor", "live: 99th percentile, the floor's = 1"),
)
_MEASURES = (
    ("rate", "backlog: orders/s, whole run", ",.0f"),
    ("steady_rate", "backlog: orders/s, without the first micro-batch", ",.0f"),
    ("seconds", "backlog: seconds, first message to last commit", ".1f"),
    ("process_seconds", "backlog: seconds, the whole process", ".1f"),
    ("cpu_seconds", "backlog: processor seconds", ".1f"),
    ("backlog_peak_mib", "backlog: most memory, MiB", ",.0f"),
    ("backlog_growth", "backlog: memory, end / middle", ".2f"),
    ("frauds", "backlog: frauds", ",.0f"),
    ("kafka_p50_ms", "live: median until in Kafka, ms", ",.0f"),
    ("kafka_p99_ms", "live: 99th percentile until in Kafka, ms", ",.0f"),
    ("postgres_p50_ms", "live: median until in Postgres, ms", ",.0f"),
    ("postgres_p99_ms", "live: 99th percentile until in Postgres, ms", ",.0f"),
    ("live_peak_mib", "live: most memory, MiB", ",.0f"),
    ("live_growth", "live: memory, end / middle", ".2f"),
)

Numbers = dict[str, float]


@dataclass
class Results:
    """Every run, in the order in which they ran, and what they ran on."""

    machine: dict[str, Any]
    backlog: list[BacklogRun] = field(default_factory=list)
    live: list[LiveRun] = field(default_factory=list)
    loads: list[LoadRun] = field(default_factory=list)
    exports: list[ExportRun] = field(default_factory=list)
    backtests: list[BacktestRun] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """All of it, for a file: rates in orders a second, times in seconds, latencies in milliseconds, memory in MiB."""
        runs: Sequence[BacklogRun | LiveRun] = [*self.backlog, *self.live]
        return {
            "machine": self.machine,
            "runs": [{"name": run.name, **run.numbers(), "rss_mib": run.usage.rss_mib} for run in runs],
            "loads": [asdict(run) for run in self.loads],
            "exports": [asdict(run) for run in self.exports],
            "backtests": [asdict(run) for run in self.backtests],
        }

    def show(self, console: Console) -> None:
        """Print the table, and how memory went in the last runs."""
        if self.loads:
            bench_generate.show(console, self.loads)
        if self.exports:
            bench_export.show(console, self.exports)
        if self.backtests:
            bench_backtest.show(console, self.backtests)
        if not (self.backlog or self.live):
            return
        console.print(self._table(self._medians()))
        usages = {f"{run.name}, backlog": run.usage for run in self.backlog} | {
            f"{run.name}, live": run.usage for run in self.live
        }
        console.print("Memory, MiB, evenly spaced over the run:")
        for name, usage in usages.items():
            console.print(f"  {name}: {_thinned(usage)}")

    def _medians(self) -> dict[str, Numbers]:
        """Contestant → measure → median over its runs, finpro first."""
        runs: Sequence[BacklogRun | LiveRun] = [*self.backlog, *self.live]
        values: dict[str, dict[str, list[float]]] = {}
        for run in sorted(runs, key=lambda run: run.name != "finpro"):
            for measure, value in run.numbers().items():
                values.setdefault(run.name, {}).setdefault(measure, []).append(value)
        return {name: {measure: statistics.median(of) for measure, of in measures.items()} for name, measures in values.items()}

    def _table(self, medians: dict[str, Numbers]) -> Table:
        table = Table("", box=box.MARKDOWN)
        for name in medians:
            table.add_column(name, justify="right")
        for measure, base, label in _RATIOS:
            if unit := medians.get(base, {}).get(measure):
                table.add_row(label, *(_written(of.get(measure), ".2f", unit) for of in medians.values()))
        for measure, label, style in _MEASURES:
            if any(measure in of for of in medians.values()):
                table.add_row(label, *(_written(of.get(measure), style) for of in medians.values()))
        return table


def _written(value: float | None, style: str, unit: float = 1.0) -> str:
    return "" if value is None else format(value / unit, style)


def _thinned(usage: Usage) -> str:
    step = max(1, len(usage.rss_mib) // _SHOWN_SAMPLES)
    return " ".join(map(str, usage.rss_mib[::step]))
