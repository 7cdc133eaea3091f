"""What a streaming job tells Prometheus: how its queries fare, by Spark's progress, and what screening decided, by receipts.

Nothing here counts what was not counted already, and nothing here can fail a job: see `_harmless`.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from streaming.contract import FRAUD, GENUINE
from streaming.kafka import unread
from streaming.screening.receipts import LATENCY_BOUNDS_SECONDS, BucketState, Receipt

_BATCH_BOUNDS_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_STEP_BOUNDS_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

_log = logging.getLogger(__name__)
_Self = TypeVar("_Self")
_Arguments = ParamSpec("_Arguments")


def _harmless(method: Callable[Concatenate[_Self, _Arguments], None]) -> Callable[Concatenate[_Self, _Arguments], None]:
    """A failure in it goes to the log and no further: metrics never take a job down."""

    @wraps(method)
    def attempt(self: _Self, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception:
            _log.exception("metrics are incomplete: %s failed", method.__name__)

    return attempt


class QueryMetrics:
    """How the queries of a job fare, each by its name."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"finpro_query_{name}", text, ["query"], registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"finpro_query_{name}", text, ["query", *labels], registry=registry)

        self._active = gauge("active", "1 while the query runs")
        self._heartbeat = gauge("heartbeat_timestamp_seconds", "When it last ended a micro-batch, or found nothing to do")
        self._last_batch = gauge("last_batch_timestamp_seconds", "When its last micro-batch ended")
        self._lag = gauge("lag_messages", "Messages in Kafka that were unread when the last micro-batch was planned")
        self._rate = gauge("input_rows_per_second", "Messages a second that came in for the last micro-batch")
        self._batches = counter("batches", "Micro-batches")
        self._rows = counter("input_rows", "Messages read")
        self._phases = counter("phase_seconds", "Time spent in each phase of its micro-batches", "phase")
        self._failures = counter("failures", "How often it failed")
        self._batch_seconds = Histogram(
            "finpro_query_batch_seconds",
            "How long its micro-batches took",
            ["query"],
            buckets=_BATCH_BOUNDS_SECONDS,
            registry=registry,
        )

    @_harmless
    def started(self, name: str) -> None:
        """A query begins."""
        self._active.labels(name).set(1)
        self._failures.labels(name)  # exists from the start: a rate needs a zero to rise from
        self._heartbeat.labels(name).set_to_current_time()

    @_harmless
    def progressed(self, progress: dict[str, Any]) -> None:
        """A micro-batch was committed: Spark's own `StreamingQueryProgress` of it."""
        name, phases = progress["name"], progress["durationMs"]
        self._batches.labels(name).inc()
        self._rows.labels(name).inc(progress["numInputRows"])
        self._rate.labels(name).set(progress["inputRowsPerSecond"] or 0)
        self._lag.labels(name).set(unread(progress) or 0)
        self._batch_seconds.labels(name).observe(phases["triggerExecution"] / 1000)
        for phase, milliseconds in phases.items():
            if phase != "triggerExecution":
                self._phases.labels(name, phase).inc(milliseconds / 1000)
        self._last_batch.labels(name).set_to_current_time()
        self._heartbeat.labels(name).set_to_current_time()

    @_harmless
    def idle(self, name: str) -> None:
        """A query found nothing to read: it lives, and nothing waits."""
        self._lag.labels(name).set(0)
        self._rate.labels(name).set(0)
        self._heartbeat.labels(name).set_to_current_time()

    @_harmless
    def ended(self, name: str, *, failed: bool) -> None:
        """A query has ended, by itself or by a failure."""
        self._active.labels(name).set(0)
        if failed:
            self._failures.labels(name).inc()


class ScreeningMetrics:
    """What screening decided, how long it took, and by which rules; told of the receipts of settled micro-batches."""

    def __init__(self, registry: CollectorRegistry, reasons: Iterable[str] = ()) -> None:
        """Show in a registry, from the start, how often each of these reasons was given."""

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"finpro_{name}", text, labels, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"finpro_{name}", text, labels, registry=registry)

        self._orders = counter("orders", "New orders screened")
        self._verdicts = counter("verdicts", "Orders that went out as Genuine, or that became Fraud", "status")
        self._reasons = counter("fraud_reasons", "Reasons given", "reason")
        self._shadow_reasons = counter("shadow_reasons", "Reasons of rules in shadow mode", "reason")
        self._suppressed_reasons = counter("suppressed_reasons", "Reasons that a list has suppressed", "reason")
        self._revisions = counter("revisions", "Earlier verdicts that gained a reason")
        self._duplicates = counter("duplicates", "Orders that came again")
        self._late = counter("late_orders", "Orders older than the watermark: neighbours of theirs may be gone")
        self._dead_letters = counter("dead_letters", "Messages that break the contract")
        self._kept = gauge("state_orders", "Orders kept because later ones may form a pattern with them")
        self._kept_bytes = gauge("state_bytes", "Size of those orders")
        self._watermark = gauge("watermark_timestamp_seconds", "Event time up to which no order is waited for any more")
        self._rules = gauge("rules_info", "1 for the version of the rules in force", "version")
        self._refused = gauge("rules_refused", "1 while the rules file cannot be used, and older rules stay in force")
        self._steps = Histogram(
            "finpro_screening_step_seconds",
            "A task's part of a micro-batch: to screen it, store it in Postgres, announce it on Kafka",
            ["step"],
            buckets=_STEP_BOUNDS_SECONDS,
            registry=registry,
        )
        self._latency = _Latency(registry)
        self._buckets: dict[tuple[str, int], BucketState] = {}  # those of a micro-batch are not always all
        self._version: str | None = None
        for status in (GENUINE, FRAUD):
            self._verdicts.labels(status)
        for reason in reasons:
            self._reasons.labels(reason)

    @_harmless
    def settled(self, receipts: Sequence[Receipt]) -> None:
        """A micro-batch was settled: the receipts of all its tasks."""
        for receipt in receipts:
            self._count(receipt)
            self._steps.labels("screen").observe(receipt.screen_seconds)
            self._steps.labels("store").observe(receipt.store_seconds)
            self._steps.labels("announce").observe(receipt.announce_seconds)
            self._latency.add("event", receipt.event_latency, receipt.event_latency_seconds)
            self._latency.add("kafka", receipt.kafka_latency, receipt.kafka_latency_seconds)
        if not receipts:
            return
        self._show_rules(receipts[-1].rules_version)
        now = {(bucket.division, bucket.bucket): bucket for receipt in receipts for bucket in receipt.buckets}
        kinds = {division for division, _ in now}
        # All buckets across products report each time: those that do not are of rules that are no more.
        self._buckets = {place: bucket for place, bucket in self._buckets.items() if place[0] in kinds} | now
        self._kept.set(sum(bucket.kept for bucket in self._buckets.values()))
        self._kept_bytes.set(sum(bucket.bytes for bucket in self._buckets.values()))
        watermark_us = min(bucket.watermark_us for receipt in receipts for bucket in receipt.buckets)
        if watermark_us > 0:  # before the first order it lies before all times
            self._watermark.set(watermark_us / 1_000_000)

    @_harmless
    def rules_taken_up(self, version: str) -> None:
        """The rules file can be used, and this version is in force from the next micro-batch on."""
        self._show_rules(version)
        self._refused.set(0)

    @_harmless
    def rules_refused(self, version: str, why: str) -> None:
        """The rules file has changed and cannot be used: `version` stays in force. A label is no place for the reason."""
        self._show_rules(version)
        self._refused.set(1)

    def _show_rules(self, version: str) -> None:
        if version != self._version:
            self._rules.clear()
            self._rules.labels(version).set(1)
            self._version = version

    def _count(self, receipt: Receipt) -> None:
        self._orders.inc(receipt.orders)
        self._verdicts.labels(GENUINE).inc(receipt.genuine)
        self._verdicts.labels(FRAUD).inc(receipt.frauds)
        for reason, count in receipt.by_reason.items():
            self._reasons.labels(reason).inc(count)
        for reason, count in receipt.shadow_by_reason.items():
            self._shadow_reasons.labels(reason).inc(count)
        for reason, count in receipt.suppressed_by_reason.items():
            self._suppressed_reasons.labels(reason).inc(count)
        self._revisions.inc(receipt.revisions)
        self._duplicates.inc(receipt.duplicates)
        self._late.inc(receipt.late)
        self._dead_letters.inc(receipt.dead_letters)


class _Latency(Collector):
    """Histograms of what receipts have counted already, which the client library's own histogram cannot take in."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._counts = {since: [0] * (len(LATENCY_BOUNDS_SECONDS) + 1) for since in ("event", "kafka")}
        self._sums = dict.fromkeys(self._counts, 0.0)
        registry.register(self)

    def add(self, since: str, counts: Sequence[int], seconds: float) -> None:
        """Count orders: `counts` per bound and beyond, not cumulative; `seconds` is the sum of their latencies."""
        self._counts[since] = [known + more for known, more in zip(self._counts[since], counts, strict=True)]
        self._sums[since] += seconds

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """For the registry: what it shows."""
        family = HistogramMetricFamily(
            "finpro_order_latency_seconds",
            "From an order's event time, or its arrival in Kafka, until its verdict was announced",
            labels=["since"],
        )
        for since, counts in self._counts.items():
            bounds = [*(str(float(bound)) for bound in LATENCY_BOUNDS_SECONDS), "+Inf"]
            cumulative = [sum(counts[: place + 1]) for place in range(len(counts))]
            family.add_metric([since], list(zip(bounds, cumulative, strict=True)), self._sums[since])
        yield family
