"""Replay: Postgres and the topics once more, from the lakehouse, when Kafka has forgotten.

    bronze ─ contract ─ rules ─> verdicts, dead letters ─> a draft, a folder a day ─ store, announce ─> day removed

The verdict in force stays: what silver says of an order is said again, and only an order that it lacks is screened anew.
The draft makes a replay resumable. It is one moment of the lakehouse, and what is left of it is what is still to be done.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from streaming.history.differences import (
    CLASH,
    STANDING,
    UNREADABLE,
    Snapshot,
    expected,
    judged,
    read_messages_of,
)
from streaming.history.republish import Published, Sinks, publish_dead_letters, publish_orders
from streaming.history.rescreening import Period
from streaming.screening.verdicts import KINDS
from streaming.small_files import Folder

_NAME = "%Y%m%dT%H%M%S.%fZ"
_ORDERS, _DEAD_LETTERS, _BEGINS = "orders", "letters", "begins"
_ALWAYS = Period(None, None)


class Day(NamedTuple):
    """What was published of one day: of event time for orders, of receipt for dead letters."""

    day: str
    orders: Published
    dead_letters: Published
    days_left: int


class Draft:
    """All verdicts and dead letters of the lakehouse, divided by day; made at a time that the verdicts carry."""

    def __init__(self, spark: SparkSession, folder: str, made_at: datetime) -> None:
        self.made_at = made_at
        self._spark = spark
        self._folder = Folder(spark, f"{folder}/{made_at.strftime(_NAME)}", "FINPRO_LAKEHOUSE")

    @classmethod
    def unfinished(cls, spark: SparkSession, folder: str) -> "Draft | None":
        """The one that an earlier replay has left; what was never made whole is removed."""
        for name in Folder(spark, folder, "FINPRO_LAKEHOUSE").names():
            draft = cls(spark, folder, datetime.strptime(name, _NAME).replace(tzinfo=UTC))
            if draft._is_whole():
                return draft
            draft.remove()
        return None

    def write(self, lakehouse: Snapshot) -> None:
        """Screen everything, and write it."""
        read = read_messages_of(lakehouse, None).persist()
        messages = judged(read, lakehouse.silver, _ALWAYS, lakehouse.history).persist()
        begins_after(messages, lakehouse).write.mode("overwrite").parquet(f"{self._folder.path}/{_BEGINS}")
        self._write_by_day(_DEAD_LETTERS, dead_letters(messages, lakehouse), "received_at")
        self._write_by_day(_ORDERS, verdicts(messages, lakehouse), "event_ts")
        for cached in (messages, read):
            cached.unpersist()

    def publish(self, sinks: Sinks) -> Iterator[Day]:
        """Store and announce day after day; what is done is removed."""
        sinks = replace(sinks, screened_at=self.made_at)
        days = sorted({name for kind in (_ORDERS, _DEAD_LETTERS) for name in self._days(kind)})
        for left, day in zip(range(len(days) - 1, -1, -1), days, strict=True):
            orders = self._published(_ORDERS, day, publish_orders, sinks)
            dead_letters = self._published(_DEAD_LETTERS, day, publish_dead_letters, sinks)
            yield Day(day.removeprefix("day="), orders, dead_letters, left)

    def begins(self) -> dict[int, int]:
        """Where a stream with a new checkpoint goes on: partition → offset (see `begins_after`)."""
        rows = self._spark.read.parquet(f"{self._folder.path}/{_BEGINS}").collect()
        return {row["partition"]: row["begin"] for row in rows}

    def remove(self) -> None:
        """Remove what is left."""
        self._folder.remove()

    def _is_whole(self) -> bool:
        return "_SUCCESS" in self._folder.names(_ORDERS)  # which is written last

    def _days(self, kind: str) -> list[str]:
        return [name for name in self._folder.names(kind) if name.startswith("day=")]

    def _write_by_day(self, kind: str, rows: DataFrame, time: str) -> None:
        rows = rows.withColumn("day", F.to_date(time)).repartition("day", "partition")
        rows.write.mode("overwrite").partitionBy("day").parquet(f"{self._folder.path}/{kind}")

    def _published(self, kind: str, day: str, publish: Callable[[DataFrame, Sinks], Published], sinks: Sinks) -> Published:
        if day not in self._days(kind):
            return Published(0, 0)
        done = publish(self._spark.read.parquet(f"{self._folder.path}/{kind}/{day}"), sinks)
        self._folder.remove(f"{kind}/{day}")
        return done


def verdicts(messages: DataFrame, lakehouse: Snapshot) -> DataFrame:
    """Every order (of `differences.judged`) with the verdict in force, or a new one: as `publish_orders` takes them."""
    orders = expected(messages, _ALWAYS, lakehouse.history)
    in_force = {name: F.when(F.col("is_held"), F.col(f"held.{name}")).otherwise(F.col(name)) for name in KINDS.values()}
    version = F.when(F.col("is_held"), F.col("held.rules_version")).otherwise(F.col("tag"))
    return orders.withColumns({**in_force, "rules_version": version}).drop("held", "held_rows", "is_held", "earlier", "tag")


def dead_letters(messages: DataFrame, lakehouse: Snapshot) -> DataFrame:
    """Every dead letter, with the reason that quarantine has, or a new one: as `publish_dead_letters` takes them."""
    position = ["partition", "offset"]
    owed = messages.where(F.col("role").isin(CLASH, UNREADABLE)).select(*position, "received_at", F.col("reason").alias("owed"))
    given = lakehouse.quarantine.groupBy(*position).agg(F.first("reason").alias("given"))
    values = lakehouse.bronze.select("topic", *position, "value")
    dead_letters = owed.join(given, position, "left").join(values, position)
    return dead_letters.withColumn("reason", F.coalesce("given", "owed")).drop("given", "owed")


def begins_after(messages: DataFrame, lakehouse: Snapshot) -> DataFrame:
    """Where a stream with a new checkpoint begins, to know all neighbours of what it has not seen: `partition`, `begin`.

    That is the first order that a later one can still form a pattern with; it and those after it are screened once more,
    which changes nothing.
    """
    rules = lakehouse.history[-1].rules
    moment, is_order = F.unix_micros("event_ts"), F.col("role") == STANDING
    newest = messages.where(is_order).agg(F.max(moment).alias("newest")).collect()[0]["newest"] or 0
    is_recent = is_order & (moment >= newest - (rules.lateness + rules.widest_window) // timedelta(microseconds=1))
    first_recent, end = F.min(F.when(is_recent, F.col("offset"))), F.max("offset") + 1
    return messages.groupBy("partition").agg(F.coalesce(first_recent, end).alias("begin"))
