"""What the tasks of a micro-batch made of it, in numbers, and what that adds up to."""

from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import msgspec
import numpy as np
import polars as pl
from pyspark.sql.types import BinaryType, StructField, StructType

from conf import errors
from conf.errors import FinproError
from streaming.contract import NO_TIMESTAMP
from streaming.rules.windows import ints
from streaming.screening.verdicts import epoch_us

# Upper bounds of the counts of a latency; one more count is of what took longer.
LATENCY_BOUNDS_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class BucketState(msgspec.Struct, frozen=True):
    """How a bucket is after a micro-batch.

    Attributes:
        bucket: which one.
        kept: orders remembered.
        bytes: their size in memory.
        watermark_us: epoch microseconds.
        division: across products, which; blank for one of products.
    """

    bucket: int
    kept: int
    bytes: int
    watermark_us: int
    division: str = ""


class Receipt(msgspec.Struct, frozen=True):
    """What one task made of one micro-batch, in numbers.

    Attributes:
        rules_version: what it was screened by.
        orders: new orders.
        genuine: those of them that went out as Genuine.
        revisions: orders that went out again, with a further reason of any kind.
        frauds: orders that became Fraud.
        by_reason, shadow_by_reason, suppressed_by_reason: reason → orders that gained it.
        duplicates: arrivals that were known.
        late: orders behind the watermark.
        dead_letters: messages that broke the contract, or used the id of another order.
        buckets: how the buckets are that it had orders of.
        messages: how many it read.
        screen_seconds, store_seconds, announce_seconds: what these steps took.
        event_latency, kafka_latency: how many new orders were announced so long after their event time, and after Kafka
            received them: a count for each of LATENCY_BOUNDS_SECONDS, not cumulative, and one for what lies beyond.
        event_latency_seconds, kafka_latency_seconds: the sums.
    """

    rules_version: str
    orders: int
    genuine: int
    revisions: int
    frauds: int
    by_reason: dict[str, int]
    shadow_by_reason: dict[str, int]
    duplicates: int
    late: int
    dead_letters: int
    buckets: list[BucketState]
    suppressed_by_reason: dict[str, int] = {}
    messages: int = 0
    screen_seconds: float = 0.0
    store_seconds: float = 0.0
    announce_seconds: float = 0.0
    event_latency: list[int] = []
    event_latency_seconds: float = 0.0
    kafka_latency: list[int] = []
    kafka_latency_seconds: float = 0.0


class NotKeyed(msgspec.Struct, frozen=True):
    """What a task says instead that has stored nothing, since it read an order where others of its product are not.

    Attributes:
        why: names the order.
    """

    why: str


class Failed(msgspec.Struct, frozen=True):
    """What a task says instead that has failed in a way that another try does not mend.

    Attributes:
        error: the name of a class of `conf.errors`.
        text: what it says.
    """

    error: str
    text: str

    @classmethod
    def of(cls, error: FinproError) -> "Failed":
        """What is to be said of an error."""
        return cls(type(error).__name__, str(error))

    def as_error(self) -> FinproError:
        """The error again."""
        kind: type[FinproError] = getattr(errors, self.error)
        return kind(self.text)


class Report(msgspec.Struct, frozen=True):
    """What a task hands to the driver, as one row: one of these."""

    receipt: Receipt | None = None
    not_keyed: NotKeyed | None = None
    failed: Failed | None = None


REPORT = StructType([StructField("report", BinaryType())])
encode_report = msgspec.msgpack.encode
decode_report = msgspec.msgpack.Decoder(Report).decode


def latencies(verdicts: pl.DataFrame, announced_at: datetime) -> dict[str, Any]:
    """The fields of a receipt that say how long after `event_ts` and `received_at` new orders were announced.

    Those that have no Kafka timestamp are left out of the latter.

    Args:
        verdicts: `event_ts`, `received_at` and `revision`, which is true of those that are no new orders.
        announced_at: when all of them were.
    """
    measured: dict[str, Any] = {}
    is_new, announced_us = ~verdicts["revision"].to_numpy(), epoch_us(announced_at)
    event_us, received_us = (ints(verdicts[name])[is_new] for name in ("event_ts", "received_at"))
    received_us = received_us[received_us != epoch_us(NO_TIMESTAMP)]
    for name, since_us in (("event_latency", event_us), ("kafka_latency", received_us)):
        seconds = np.maximum(announced_us - since_us, 0) / 1_000_000  # an event time may be a little ahead
        bounds = np.searchsorted(LATENCY_BOUNDS_SECONDS, seconds)
        measured[name] = np.bincount(bounds, minlength=len(LATENCY_BOUNDS_SECONDS) + 1).tolist()
        measured[f"{name}_seconds"] = float(seconds.sum())
    return measured


def summed(receipts: Iterable[Receipt]) -> dict[str, Any]:
    """What a micro-batch came to: counts by name, and the watermark that all its buckets have reached."""
    totals = Counter[str]()
    by_reason: dict[str, Counter[str]] = {name: Counter() for name in ("by_reason", "shadow_by_reason", "suppressed_by_reason")}
    watermarks = []
    for receipt in receipts:
        for name in ("messages", "orders", "genuine", "frauds", "revisions", "duplicates", "late", "dead_letters"):
            totals[name] += getattr(receipt, name)
        for name, counts in by_reason.items():
            counts.update(getattr(receipt, name))
        watermarks += [bucket.watermark_us for bucket in receipt.buckets if bucket.watermark_us > 0]
    watermark = datetime.fromtimestamp(min(watermarks) / 1e6, UTC).isoformat() if watermarks else None
    return {**totals, **{name: +counts for name, counts in by_reason.items()}, "watermark": watermark}
