"""The results as tables, ratios first, and as JSON. Of repeated runs the median speaks; every run stands below it."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.benchmarks.latency import percentile
from tests.benchmarks.measure import Usage
from tests.benchmarks.runs import BacklogRun, LiveRun

MEMORY_LIMIT_MIB = 3_072
_SERIES_COLUMNS = 60


@dataclass
class Results:
    """Every run, in the order in which they ran, and what they ran on."""

    machine: dict[str, Any]
    backlog: list[BacklogRun] = field(default_factory=list)
    live: list[LiveRun] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """All of it, for a file: rates in orders a second, times in seconds, latencies in milliseconds, memory in MiB."""
        return {
            "machine": self.machine,
            "backlog": [_backlog_numbers(run) | {"rss_mib": run.usage.rss_mib} for run in self.backlog],
            "live": [_live_numbers(run) | {"rss_mib": run.usage.rss_mib} for run in self.live],
        }

    def show(self, console: Console) -> None:
        """Print the tables that have something in them."""
        if self.backlog:
            console.print(_backlog_table(self.backlog))
        if self.live:
            console.print(_live_table(self.live))
        for name, usage in _last_usages([*self.backlog, *self.live]):
            console.print(f"{name}: MiB every half second, thinned: {_thinned(usage.rss_mib)}")


def _backlog_numbers(run: BacklogRun) -> dict[str, Any]:
    return {
        "name": run.name,
        "orders": run.orders,
        "frauds": run.frauds,
        "rate": round(run.rate),
        "steady_rate": round(run.steady_rate),
        "seconds": round(run.seconds, 2),
        "process_seconds": round(run.usage.seconds, 1),
        "cpu_seconds": round(run.usage.cpu_seconds, 1),
        "peak_mib": run.usage.peak_mib,
        "memory_growth": round(run.usage.growth, 3),
    }


def _live_numbers(run: LiveRun) -> dict[str, Any]:
    kafka, postgres = run.latency.kafka_ms, run.latency.postgres_ms
    return {
        "name": run.name,
        "orders": len(kafka),
        "kafka_p50_ms": round(percentile(kafka, 50)),
        "kafka_p99_ms": round(percentile(kafka, 99)),
        "postgres_p50_ms": round(percentile(postgres, 50)),
        "postgres_p99_ms": round(percentile(postgres, 99)),
        "peak_mib": run.usage.peak_mib,
        "memory_growth": round(run.usage.growth, 3),
    }


def _medians(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Contestant → number → median over its runs."""
    names = dict.fromkeys(run["name"] for run in runs)
    return {
        name: {
            key: statistics.median(run[key] for run in runs if run["name"] == name) for key in runs[0] if key != "name"
        }
        for name in names
    }


def _ratio(value: float, other: dict[str, float] | None, key: str) -> str:
    return f"{value / other[key]:.2f}" if other and other[key] else "–"


def _backlog_table(runs: Iterable[BacklogRun]) -> Table:
    numbers = [_backlog_numbers(run) for run in runs]
    medians = _medians(numbers)
    peer, floor = medians.get("peer"), medians.get("floor")
    table = Table(title=f"Backlog of {numbers[0]['orders']:,} orders, median of {len(numbers) // len(medians)} run(s)")
    for heading in ("", "× peer", "× floor", "orders/s", "steady", "seconds", "process s", "CPU s", "peak MiB", "memory", "frauds"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, of in medians.items():
        table.add_row(
            name,
            _ratio(of["rate"], peer, "rate"),
            _ratio(of["rate"], floor, "rate"),
            *(f"{of[key]:,.0f}" for key in ("rate", "steady_rate")),
            *(f"{of[key]:.1f}" for key in ("seconds", "process_seconds", "cpu_seconds")),
            f"{of['peak_mib']:,.0f}",
            f"× {of['memory_growth']:.2f}",
            f"{of['frauds']:,.0f}",
        )
    return table


def _live_table(runs: Iterable[LiveRun]) -> Table:
    numbers = [_live_numbers(run) for run in runs]
    medians = _medians(numbers)
    floor = medians.get("floor")
    table = Table(title=f"Live, milliseconds from sending to reading, median of {len(numbers) // len(medians)} run(s)")
    for heading in ("", "p50 × floor", "p99 × floor", "Kafka p50", "p99", "Postgres p50", "p99", "peak MiB", "memory", "orders"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, of in medians.items():
        table.add_row(
            name,
            _ratio(of["kafka_p50_ms"], floor, "kafka_p50_ms"),
            _ratio(of["kafka_p99_ms"], floor, "kafka_p99_ms"),
            *(f"{of[f'{sink}_{part}_ms']:,.0f}" for sink in ("kafka", "postgres") for part in ("p50", "p99")),
            f"{of['peak_mib']:,.0f}",
            f"× {of['memory_growth']:.2f}",
            f"{of['orders']:,.0f}",
        )
    return table


def _last_usages(runs: Iterable[BacklogRun | LiveRun]) -> Iterable[tuple[str, Usage]]:
    kinds = {(run.name, "backlog" if isinstance(run, BacklogRun) else "live"): run.usage for run in runs}
    return ((f"{name}, {kind}", usage) for (name, kind), usage in kinds.items())


def _thinned(series: list[int]) -> str:
    step = max(1, len(series) // _SERIES_COLUMNS)
    return " ".join(map(str, series[::step]))
