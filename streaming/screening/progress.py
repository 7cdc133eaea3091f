"""What a screening query says while it works: orders a second, lag, frauds by reason, watermark."""

from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from time import monotonic
from typing import Any

from rich.console import Console

from streaming.kafka import unread
from streaming.screening.receipts import Receipt

_SECONDS_BETWEEN_LINES = 1.0


@dataclass
class Totals:
    """Sums over the run."""

    orders: int = 0
    revisions: int = 0
    duplicates: int = 0
    late: int = 0
    dead_letters: int = 0
    by_reason: Counter[str] = field(default_factory=Counter)
    shadow_by_reason: Counter[str] = field(default_factory=Counter)
    suppressed_by_reason: Counter[str] = field(default_factory=Counter)


class Progress:
    """Collects the receipts of settled micro-batches and prints at most a line a second."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._errors = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
        self._totals = Totals()
        self._watermark_us: int | None = None
        self._shown_at = monotonic()
        self._started_at: float | None = None
        self._shown_orders = 0

    def settled(self, receipts: list[Receipt]) -> None:
        """A micro-batch was settled."""
        totals = self._totals
        for receipt in receipts:
            totals.orders += receipt.orders
            totals.revisions += receipt.revisions
            totals.duplicates += receipt.duplicates
            totals.late += receipt.late
            totals.dead_letters += receipt.dead_letters
            totals.by_reason.update(receipt.by_reason)
            totals.shadow_by_reason.update(receipt.shadow_by_reason)
            totals.suppressed_by_reason.update(receipt.suppressed_by_reason)
        watermarks = [bucket.watermark_us for receipt in receipts for bucket in receipt.buckets]
        self._watermark_us = min(watermarks, default=self._watermark_us)

    def show(self, progress: Any, *, finished: bool = False) -> None:
        """Print where the query stands, if there is something new; `progress` is Spark's own of the last micro-batch."""
        now = monotonic()
        since = now - self._shown_at
        fresh = self._totals.orders - self._shown_orders
        if finished:
            self._console.print(self._line("done", None, progress))
        elif since >= _SECONDS_BETWEEN_LINES and fresh:
            self._console.print(self._line(datetime.now(UTC).strftime("%H:%M:%S"), fresh / since, progress))
        else:
            return
        self._shown_at, self._shown_orders = now, self._totals.orders

    def rules_taken_up(self, version: str) -> None:
        """A changed rules file was taken up."""
        self._console.print(f"rules version {version} is in force from the next micro-batch on", markup=False)

    def rules_refused(self, version: str, why: str) -> None:
        """A changed rules file cannot be used; this version stays in force."""
        self._errors.print(f"finpro: the changed rules are refused, version {version} stays in force: {why}")

    def shuffles(self, why: str) -> None:
        """The topic is not keyed by product, so orders are shuffled from now on."""
        self._console.print(f"orders are shuffled from now on, which takes longer: {why}", markup=False)

    def waits(self, why: str) -> None:
        """It has to wait for something outside, or no longer has to."""
        self._errors.print(f"finpro: {why}")

    def _line(self, start: str, rate: float | None, progress: Any) -> str:
        totals = self._totals
        parts = [f"{start}  {totals.orders:,} orders"]
        if rate is not None:
            parts.append(f"{rate:,.0f}/s")
        lag = unread(progress)
        if lag is not None:
            parts.append(f"lag {lag:,}")
        parts.append(f"frauds: {_listed(totals.by_reason) or 'none'}")
        if shadow := _listed(totals.shadow_by_reason):
            parts.append(f"in shadow: {shadow}")
        if suppressed := _listed(totals.suppressed_by_reason):
            parts.append(f"suppressed: {suppressed}")
        counts = {name: getattr(totals, name) for name in ("revisions", "duplicates", "late", "dead_letters")}
        parts += [f"{name.replace('_', ' ')} {count:,}" for name, count in counts.items() if count]
        if self._watermark_us is not None and self._watermark_us > 0:
            parts.append(f"watermark {datetime.fromtimestamp(self._watermark_us / 1e6, UTC):%Y-%m-%dT%H:%M:%SZ}")
        return " | ".join(parts)


def _listed(by_reason: Counter[str]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted(by_reason.items()) if count)
