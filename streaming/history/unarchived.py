"""What has been said on Kafka and is not in the lakehouse yet: an audit beside running streams must not miss it."""

import json

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from conf.settings import Settings
from streaming.committed import last_commit, last_settled
from streaming.history.causes import Reached
from streaming.history.differences import Snapshot, all_reasons
from streaming.kafka import (
    ORDERS,
    ORDERS_DEAD_LETTER,
    PROCESSED_ORDERS,
    READ_COMMITTED,
    TopicReader,
    librdkafka_config,
    spark_config,
)
from streaming.lakehouse.archive import as_received, dead_letters, verdicts

SILVER, QUARANTINE = "archive_silver", "archive_quarantine"  # the queries' names


def reached(spark: SparkSession, settings: Settings) -> Reached:
    """How far the streams have come, as ledger and checkpoints of the archive say; ask before the lakehouse is looked at.

    Raises:
        SettingsError: the checkpoints lie where only Spark can read.
        PostgresError: Postgres does not answer.
        KafkaError: Kafka does not answer.
    """
    screening = last_settled(settings)
    said = unarchived_verdicts(spark, settings)
    refused = _beyond_commit(spark, settings, QUARANTINE, ORDERS_DEAD_LETTER)
    return Reached(
        screened=screening.ends.get(settings.topic(ORDERS), {}) if screening else None,
        verdicts=None if said is None else _announced(said),
        dead_letters=None if refused is None else dead_letters(refused).select("partition", "offset", "reason").distinct(),
    )


def unarchived_verdicts(spark: SparkSession, settings: Settings) -> DataFrame | None:
    """What `processed_orders` has beyond what is archived (`archive.verdicts`); None where that is nothing.

    Raises:
        SettingsError: the checkpoints lie where only Spark can read.
        KafkaError: Kafka does not answer.
    """
    said = _beyond_commit(spark, settings, SILVER, PROCESSED_ORDERS)
    return None if said is None else verdicts(said)


def with_unarchived_orders(spark: SparkSession, settings: Settings, lakehouse: Snapshot) -> Snapshot:
    """The snapshot with the messages of `orders` that bronze does not hold yet.

    Raises:
        KafkaError: Kafka does not answer.
    """
    ends = lakehouse.bronze.groupBy("partition").agg((F.max("offset") + 1).alias("end")).collect()
    messages = messages_beyond(spark, settings, ORDERS, {row["partition"]: row["end"] for row in ends})
    if messages is None:
        return lakehouse
    return lakehouse._replace(bronze=lakehouse.bronze.unionByName(as_received(messages)))


def messages_beyond(spark: SparkSession, settings: Settings, topic: str, begins: dict[int, int]) -> DataFrame | None:
    """What one of finpro's topics holds from these offsets on (from its start, in a partition not named); None for nothing.

    Raises:
        KafkaError: Kafka does not answer.
    """
    name = settings.topic(topic)
    with TopicReader(librdkafka_config(settings), name) as reader:
        kept = reader.kept()
    ends = {partition: end for partition, (_, end) in kept.items()}
    begins = {partition: min(max(begins.get(partition, 0), first), end) for partition, (first, end) in kept.items()}
    if begins == ends:
        return None
    return (
        spark.read.format("kafka")
        .options(**spark_config(settings))
        .option("subscribe", name)
        .option("startingOffsets", offsets_json(name, begins))
        .option("endingOffsets", offsets_json(name, ends))
        .option("includeHeaders", True)
        .options(**READ_COMMITTED)
        .load()
    )


def offsets_json(topic: str, offsets: dict[int, int]) -> str:
    """Offsets of a topic (full name) as Spark's Kafka source takes them."""
    return json.dumps({topic: {str(partition): offset for partition, offset in sorted(offsets.items())}})


def _beyond_commit(spark: SparkSession, settings: Settings, query: str, topic: str) -> DataFrame | None:
    """What a query of the archive has not read; where it has committed nothing, it begins where Kafka does."""
    commit = last_commit(settings, query)
    ends = commit.ends.get(settings.topic(topic)) if commit else {}
    return None if ends is None else messages_beyond(spark, settings, topic, ends)


def _announced(verdicts: DataFrame) -> DataFrame:
    reasons = F.array_distinct(F.flatten(F.collect_list(all_reasons())))
    return verdicts.groupBy("order_id").agg(reasons.alias("announced"))
