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
from streaming.kafka import TopicReader, librdkafka_config, topic_id
from streaming.lakehouse.small_files import Folder
from streaming.lakehouse.tables import BRONZE_ORDERS, Table, appends, bronze_ends, bronze_orders, table_id

_FROM_THE_FIRST = -2  # Spark's word for the first offset that Kafka has


class Planned(NamedTuple):
    """The newest micro-batch in a checkpoint: its number, and partition → the offset after its last message."""

    batch: int
    ends: dict[int, int]


@dataclass(frozen=True)
class Origin:
    """What a checkpoint was made for: the ids of a topic and of a Delta table."""

    topic: str
    table: str


class Checkpoint:
    """A folder where Spark keeps how far a query has come; what finpro adds is one file that says what it was made for."""

    def __init__(self, spark: SparkSession, folder: str) -> None:
        self.folder = folder
        self._files = Folder(spark, folder, "FINPRO_CHECKPOINTS")

    def planned(self) -> Planned | None:
        """The newest micro-batch, which may not have been written yet; None in a new checkpoint."""
        newest = self._newest("offsets")
        if newest is None:
            return None
        offsets = json.loads(self._files.read(f"offsets/{newest}").splitlines()[-1])
        (partitions,) = offsets.values()
        return Planned(newest, {int(partition): end for partition, end in partitions.items()})

    def committed(self) -> int | None:
        """The newest micro-batch that is complete; None before the first."""
        return self._newest("commits")

    def _newest(self, log: str) -> int | None:
        return max((int(name) for name in self._files.names(log) if name.isdigit()), default=None)

    def has_state_of_sparks(self) -> bool:
        """Whether Spark kept the state of an operator in it."""
        return bool(self._files.names("state"))

    def query_id(self) -> str:
        """The id of the query that it was made by."""
        return str(json.loads(self._files.read("metadata"))["id"])

    def origin(self) -> Origin | None:
        """What it was made for, where that is known."""
        return Origin(**json.loads(self._files.read(_ORIGIN))) if self._files.exists(_ORIGIN) else None

    def made_for(self, origin: Origin) -> None:
        """Note what it is made for."""
        self._files.write(_ORIGIN, json.dumps(asdict(origin)))


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
        KafkaError: Kafka does not answer.
    """
    known = Checkpoint(spark, checkpoint)
    origin = Origin(topic_id(settings, topic), table_id(spark, table.path(settings.lakehouse)))
    planned, name = known.planned(), settings.topic(topic)
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


def _require_made_for(known: Checkpoint, origin: Origin, topic: str) -> None:
    if known.origin() != origin:
        raise LakehouseError(
            f"The checkpoint {known.folder} was made for another table, or for a topic that has since been created anew:"
            f" it would leave out what lies on {topic}. Remove that folder and start again: nothing is lost or doubled."
        )


def _require_that_bronze_agrees(
    spark: SparkSession, lakehouse: str, topic: str, origin: Origin, known: Checkpoint, planned: Planned | None
) -> None:
    """Check that bronze holds this very topic, and no more of it than the checkpoint knows of."""
    appended = appends(spark, bronze_orders(lakehouse))
    topic_ids = {one.topic_id for one in map(AppendId.parse, appended) if one.topic == topic}
    if topic_ids - {origin.topic}:
        raise LakehouseError(
            f"The topic {topic} was deleted and created again since it was archived into {bronze_orders(lakehouse)}:"
            " its offsets now stand for other messages. Archive it into another lakehouse (FINPRO_LAKEHOUSE), or give the"
            " topics another prefix (FINPRO_TOPIC_PREFIX)."
        )
    if planned and appended.get(str(AppendId(topic, origin.topic, known.query_id())), -1) > planned.batch:
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
