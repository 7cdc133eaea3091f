"""Where a stream of the archive goes on, so that nothing is skipped and nothing comes twice.

A checkpoint counts only for the topic and the table that it was made for: it says how far that topic was written into that
table. Both are known by the ids that Kafka and Delta gave them, since a name may come to stand for another.
"""

import json
from dataclasses import asdict, dataclass
from typing import NamedTuple

from pyspark.sql import SparkSession

from conf.errors import LakehouseError
from conf.settings import Settings
from streaming.checkpoint import Checkpoint, Planned
from streaming.jvm import delta_appends, delta_id
from streaming.kafka import TopicReader, librdkafka_config, topic_id
from streaming.lakehouse.tables import BRONZE_ORDERS, Table, bronze_ends, bronze_orders

_FROM_THE_FIRST = -2  # Spark's word for the first offset that Kafka has


@dataclass(frozen=True)
class Origin:
    """What a checkpoint was made for: the ids of a topic and of a Delta table."""

    topic: str
    table: str


class ArchiveCheckpoint(Checkpoint):
    """What finpro adds to a checkpoint is one file that says what it was made for."""

    lost = "remove that folder and start again: nothing is lost or doubled."

    def origin(self) -> Origin:
        """What it was made for.

        Raises:
            StreamingError: the file is missing or damaged.
        """
        found = self._json(_ORIGIN, line=0)
        return Origin(str(found.get("topic")), str(found.get("table")))

    def made_for(self, origin: Origin) -> None:
        """Note what it is made for."""
        self.files.write(_ORIGIN, json.dumps(asdict(origin)))


_ORIGIN = "made_for.json"


def starting_offsets(
    spark: SparkSession, settings: Settings, topic: str, table: Table, checkpoint: str, *, skip_forgotten: bool = False
) -> str:
    """Where a stream with a new checkpoint begins, as Spark's Kafka source wants it; a checkpoint that exists is examined.

    A new checkpoint of bronze begins where bronze ends; the other tables are merged, so theirs begin where Kafka does.

    Args:
        spark: with Delta.
        settings: Kafka, and the lakehouse, whose tables exist.
        topic: one of finpro's topics.
        table: what it is written into.
        checkpoint: folder of the query.
        skip_forgotten: with a new checkpoint, leave out what Kafka has forgotten.

    Raises:
        LakehouseError: the checkpoint was made for another topic or table, or Kafka no longer has what comes next.
        StreamingError: a file of the checkpoint is damaged.
        KafkaError: Kafka does not answer.
    """
    known = ArchiveCheckpoint(spark, checkpoint)
    origin = Origin(topic_id(settings, topic), delta_id(spark, table.path(settings.lakehouse)))
    planned, name = known.planned(), settings.topic(topic)
    known.committed()  # else Spark meets a damaged file, and does not name it
    with TopicReader(librdkafka_config(settings), name) as reader:
        kept = reader.kept()
    if planned:
        _require_made_for(known, origin, name)
    if table is BRONZE_ORDERS:
        _require_that_bronze_agrees(spark, settings.lakehouse, name, origin, known, planned)
    if planned:
        reached = planned.ends
    else:
        known.made_for(origin)
        reached = bronze_ends(spark, settings.lakehouse, name) if table is BRONZE_ORDERS else {}
        if skip_forgotten:
            reached = {partition: max(end, kept[partition][0]) for partition, end in reached.items() if partition in kept}
    _require_kept(name, reached, kept, checkpoint)
    return json.dumps({name: {str(partition): reached.get(partition, _FROM_THE_FIRST) for partition in kept}})


def _require_made_for(known: ArchiveCheckpoint, origin: Origin, topic: str) -> None:
    if known.origin() != origin:
        raise LakehouseError(
            f"The checkpoint {known.folder} was made for another table, or for a topic that has since been created anew:"
            f" it would leave out what lies on {topic}. Remove that folder and start again: nothing is lost or doubled."
        )


def _require_that_bronze_agrees(
    spark: SparkSession, lakehouse: str, topic: str, origin: Origin, known: ArchiveCheckpoint, planned: Planned | None
) -> None:
    """Check that bronze holds this very topic, and no more of it than the checkpoint knows of."""
    appended = delta_appends(spark, bronze_orders(lakehouse))
    topic_ids = {one.topic_id for one in map(AppendId.parse, appended) if one.topic == topic}
    if topic_ids - {origin.topic}:
        raise LakehouseError(
            f"The topic {topic} was deleted and created again since it was archived into {bronze_orders(lakehouse)}:"
            " its offsets now stand for other messages. Archive it into another lakehouse (FINPRO_LAKEHOUSE), or give the"
            " topics another prefix (FINPRO_TOPIC_PREFIX)."
        )
    if planned and appended.get(str(AppendId(topic, origin.topic, str(known.query_id()))), -1) > planned.batch:
        raise LakehouseError(
            f"The checkpoint {known.folder} is older than bronze, as if it were restored from a copy. Remove that folder"
            " and start again: a new one begins where bronze ends."
        )


def _require_kept(topic: str, reached: dict[int, int], kept: dict[int, tuple[int, int]], checkpoint: str) -> None:
    for partition, end in reached.items():
        first, following = kept.get(partition, (0, 0))
        if end > following:
            raise LakehouseError(
                f"{topic} partition {partition} was archived up to offset {end}, but ends at {following} in Kafka: has it lost"
                " messages? Restore them from a replica, or archive into another lakehouse (FINPRO_LAKEHOUSE)."
            )
        if end < first:
            raise LakehouseError(
                f"Kafka has forgotten offsets {end} to {first - 1} of {topic} partition {partition} before they were archived:"
                f" its retention is shorter than the archive was away. To go on without them, remove the folder {checkpoint}"
                " and start once with --skip-forgotten."
            )


class AppendId(NamedTuple):
    """Under what name Delta counts the micro-batches that were appended: of which topic, by which query."""

    topic: str
    topic_id: str
    query_id: str

    def __str__(self) -> str:
        return " ".join(self)

    @classmethod
    def parse(cls, text: str) -> "AppendId":
        """Back from its text."""
        return cls(*text.split(" "))
