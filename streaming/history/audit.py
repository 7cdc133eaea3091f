"""The audit: every verdict given again from bronze, each difference with its cause, and what would repair it."""

from typing import NamedTuple

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from streaming.history.causes import LATE, UNEXPLAINED, Reached, causes
from streaming.history.differences import (
    CLASH,
    DEAD_LETTER_MISSING,
    DUPLICATE,
    ORDER_MISSING,
    ORDER_UNKNOWN,
    REASONS_MISSING,
    STANDING,
    UNCAUSED,
    UNREADABLE,
    Snapshot,
    all_reasons,
    compared,
    dead_letters_compared,
    expected,
    judged,
    read_messages_of,
    unknown_orders,
)
from streaming.history.rescreening import Period
from streaming.lakehouse.erased_messages import ERASED_HEADER
from streaming.screening.verdicts import KINDS

# One row a difference. `streamed` and `expected` are reasons of all kinds (`all_reasons`); null where there are none.
FINDING = (
    "wrong",
    "cause",
    "why",
    "order_id",
    "partition",
    "offset",
    "received_at",
    "event_ts",
    "rules_version",
    "streamed",
    "expected",
)
_REPAIRABLE = (LATE, UNEXPLAINED)
_ANNOUNCED_BY_REPAIR = (ORDER_MISSING, REASONS_MISSING, DEAD_LETTER_MISSING)


class Counts(NamedTuple):
    """What was audited: orders and duplicates by event time, dead letters by when they were received."""

    orders: int
    duplicates: int
    dead_letters: int

    @property
    def messages(self) -> int:
        """All of them."""
        return sum(self)


class Audit(NamedTuple):
    """What an audit found.

    Attributes:
        counts: what was audited.
        findings: FINDING.
        found: how many findings there are, by `wrong` and `cause`.
        orders: those that a repair announces, as `republish.publish_orders` takes them.
        dead_letters: dead letters that it announces, as `republish.publish_dead_letters` takes them.
    """

    counts: Counts
    findings: DataFrame
    found: dict[tuple[str, str], int]
    orders: DataFrame
    dead_letters: DataFrame

    @property
    def unexplained(self) -> int:
        """How many findings have no cause."""
        return sum(count for (_, cause), count in self.found.items() if cause == UNEXPLAINED)

    @property
    def irreparable(self) -> int:
        """How many of them a repair cannot mend: it adds what is missing, and takes nothing back."""
        return sum(
            count for (wrong, cause), count in self.found.items() if cause == UNEXPLAINED and wrong not in _ANNOUNCED_BY_REPAIR
        )


def audit(lakehouse: Snapshot, period: Period, reached: Reached) -> Audit:
    """Give every verdict of a period again, and compare.

    Args:
        lakehouse: what to look at.
        period: of event time; a dead letter, which may have none, belongs to when it was received.
        reached: how far the streams had come, at the latest when the snapshot was taken.
    """
    read = read_messages_of(lakehouse, period.since, reached.dead_letters).persist()
    messages = judged(read, lakehouse.silver, period, lakehouse.history).persist()
    counts = _counts(messages, period)
    read.unpersist()
    orders = expected(messages, period, lakehouse.history).transform(compared, lakehouse.history)
    orders = orders.where(F.size("wrong") > 0).persist()
    dead_letters = dead_letters_compared(messages, lakehouse.quarantine, period).persist()
    unknown = unknown_orders(messages, lakehouse.silver, period)
    findings = _findings(orders, dead_letters, unknown)
    if not (orders.isEmpty() and dead_letters.isEmpty()):
        is_erased = F.exists("headers", lambda header: header["key"] == ERASED_HEADER)
        erased = lakehouse.bronze.where(is_erased).select("partition", "offset")
        explained = causes(orders, dead_letters, messages, lakehouse.history, reached, erased, lakehouse.applications)
        findings = findings.drop("cause", "why").join(explained, ["partition", "offset", "wrong"], "left")
    findings = _with_default_causes(findings).persist()
    found = {(row["wrong"], row["cause"]): row["count"] for row in findings.groupBy("wrong", "cause").count().collect()}
    to_announce = _to_announce(orders, findings), _dead_letters_to_announce(lakehouse, dead_letters, findings)
    return Audit(counts, findings, found, *to_announce)


def _counts(messages: DataFrame, period: Period) -> Counts:
    role, moment = F.col("role"), F.col("event_ts")
    row = messages.agg(
        F.count_if((role == STANDING) & period.holds(moment)),
        F.count_if((role == DUPLICATE) & period.holds(moment)),
        F.count_if(role.isin(CLASH, UNREADABLE) & period.holds(F.col("received_at"))),
    ).collect()[0]
    return Counts(*row)


def _findings(orders: DataFrame, dead_letters: DataFrame, unknown: DataFrame) -> DataFrame:
    """Every difference as FINDING, without causes."""
    version = F.coalesce("held.rules_version", "tag").alias("rules_version")
    rows = orders.withColumn("wrong", F.explode("wrong")).select("*", version)
    known = rows.select(*(name for name in FINDING if name not in ("cause", "why")))
    reasons = all_reasons().alias("streamed")
    unknown = unknown.select(F.lit(ORDER_UNKNOWN).alias("wrong"), "order_id", "event_ts", "rules_version", reasons)
    both = known
    for others in (unknown, dead_letters.drop("reason")):
        both = both.unionByName(others, allowMissingColumns=True)
    return both.withColumns({"cause": F.lit(None).cast("string"), "why": F.lit(None).cast("string")})


def _with_default_causes(findings: DataFrame) -> DataFrame:
    default = F.create_map(*(F.lit(text) for pair in UNCAUSED.items() for text in pair))[F.col("wrong")]
    caused = {"cause": F.coalesce("cause", F.lit(UNEXPLAINED)), "why": F.coalesce("why", default)}
    return findings.withColumns(caused).select(*FINDING)


def _to_announce(orders: DataFrame, findings: DataFrame) -> DataFrame:
    """Orders whose verdict a repair completes: the reasons that they have, and those that they lack."""
    is_ours = F.col("wrong").isin(ORDER_MISSING, REASONS_MISSING) & F.col("cause").isin(*_REPAIRABLE)
    rows = orders.drop("wrong").join(
        findings.where(is_ours).select("partition", "offset"), ["partition", "offset"], "left_semi"
    )
    united = {
        name: F.when(F.col("is_held"), F.array_union(name, f"held.{name}")).otherwise(F.col(name)) for name in KINDS.values()
    }
    still_suppressed = F.array_except("suppressed_reasons", "reasons")
    return rows.withColumns(united).withColumns({"suppressed_reasons": still_suppressed, "rules_version": F.col("tag")})


def _dead_letters_to_announce(lakehouse: Snapshot, dead_letters: DataFrame, findings: DataFrame) -> DataFrame:
    """Dead letters that quarantine lacks, with what bronze has of their messages."""
    is_ours = (F.col("wrong") == DEAD_LETTER_MISSING) & (F.col("cause") == UNEXPLAINED)
    places = findings.where(is_ours).select("partition", "offset")
    position = ["partition", "offset"]
    missing = dead_letters.join(places, position, "left_semi").select(*position, "received_at", "reason")
    return missing.join(lakehouse.bronze.select("topic", *position, "value"), position)
