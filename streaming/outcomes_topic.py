"""The topic `order_outcomes`: what others state about orders, taken into Postgres, each message exactly once.

How far it was taken stands in the same transaction as what was taken: whatever is killed when, the next one goes on from there.
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec
from psycopg2.extensions import cursor as Cursor
from psycopg2.extras import execute_values

from batch.outcomes import TOPIC, Statement, Taken, append, statement_of
from batch.postgres import connect, explained, require_rights
from batch.sessions import BULK
from conf.errors import OutcomesError
from conf.settings import Settings
from streaming.kafka import ORDER_OUTCOMES, TopicReader, librdkafka_config, require_topics, topic_id

_AT_ONCE = 10_000  # messages of a transaction
_RIGHTS = {
    "order_outcomes": ("select", "insert"),
    "outcome_dead_letters": ("insert",),
    "outcome_offsets": ("select", "insert", "update"),
    "raw_orders": ("select",),
}


class FromTopic(NamedTuple):
    """What became of the messages: statements, and how many broke the contract."""

    taken: Taken
    dead_letters: int

    def __str__(self) -> str:
        broken = f"; {self.dead_letters:,} messages break the contract: see outcome_dead_letters" if self.dead_letters else ""
        return f"{self.taken}{broken}"


def take(settings: Settings, *, skip_forgotten: bool = False) -> FromTopic:
    """Take what the topic has at this moment and was not taken yet. Two at once wait for each other.

    Raises:
        KafkaError: Kafka does not answer, or lacks the topic.
        OutcomesError: Kafka has deleted messages that were never taken, and `skip_forgotten` does not say to go on.
        PostgresError: Postgres does not answer, lacks a table, or this login may not write there.
    """
    dsn = settings.require("postgres_dsn")
    require_topics(settings, (ORDER_OUTCOMES,))
    topic, id_ = settings.topic(ORDER_OUTCOMES), topic_id(settings, ORDER_OUTCOMES)
    with TopicReader(librdkafka_config(settings), topic) as reader, explained(dsn):
        parts = [
            part
            for partition, (first, end) in sorted(reader.kept().items())
            for part in _take_partition(dsn, reader, _Place(topic, id_, partition), first, end, skip_forgotten)
        ]
    taken = [part.taken for part in parts]
    sums = Taken(*(sum(figures) for figures in zip(*taken, strict=True))) if taken else Taken(0, 0, 0)
    return FromTopic(sums, sum(part.dead_letters for part in parts))


class _Place(NamedTuple):
    """A partition of the topic, and Kafka's id of that."""

    topic: str
    topic_id: str
    partition: int


def _take_partition(
    dsn: str, reader: TopicReader, place: _Place, first: int, end: int, skip_forgotten: bool
) -> Iterator[FromTopic]:
    """Take a partition up to `end`, a transaction a part; `first` is the first offset that Kafka still has."""
    while True:
        with connect(dsn, application_name="finpro outcomes", limits=BULK) as connection, connection.cursor() as cursor:
            require_rights(cursor, "finpro_outcomes", _RIGHTS)
            begin = _next_offset(cursor, place)
            if begin < first and not skip_forgotten:
                raise OutcomesError(
                    f"Kafka has deleted what was never taken: offsets {begin} to {first - 1} of partition {place.partition} of"
                    f" {place.topic}. Have it sent again, or added by file, and go on: `finpro outcomes take --skip-forgotten`."
                )
            begin = max(begin, first)
            # Of a part without records, as transactions that were given up leave behind, all that follows is asked for.
            ends = (min(begin + _AT_ONCE, end), end)
            records = next(filter(None, (reader.read(place.partition, begin, until) for until in ends)), [])
            if not records:
                return
            yield _take(cursor, place, records)
            _go_on_from(cursor, place, records[-1].offset() + 1)


def _take(cursor: Cursor, place: _Place, records: list[Any]) -> FromTopic:
    read_at, statements, dead = datetime.now(UTC), list[Statement](), list[tuple[Any, ...]]()
    for record in records:
        try:
            statements.append(read_message(record.value(), read_at))
        except ValueError as error:
            received_at = max(record.timestamp()[1], 0) / 1000
            where = (place.topic_id, place.partition, record.offset(), received_at)
            dead.append((*where, record.value(), str(error).replace("\x00", "")))
    execute_values(
        cursor,
        'insert into outcome_dead_letters (topic_id, partition, "offset", received_at, value, reason) values %s'
        " on conflict do nothing",
        dead,
        template="(%s, %s, %s, to_timestamp(least(%s, 253402300799)), %s, %s)",
    )
    return FromTopic(append(cursor, statements, TOPIC), len(dead))


def read_message(value: bytes | None, read_at: datetime) -> Statement:
    """The statement of a message: a JSON object. Fields that the contract does not name are ignored.

    Raises:
        ValueError: it is none; says why, so that a person understands.
    """
    if value is None:
        raise ValueError("tombstone: the message has no value")
    try:
        fields = msgspec.json.decode(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    try:
        return statement_of(fields, read_at)
    except ValueError as error:
        raise ValueError(f"breaks the contract: {error}") from error


def _next_offset(cursor: Cursor, place: _Place) -> int:
    """Where to go on; until the transaction ends nobody else does."""
    columns = "topic, topic_id, partition, next_offset"
    cursor.execute(f"insert into outcome_offsets ({columns}) values (%s, %s, %s, 0) on conflict do nothing", place)
    cursor.execute(
        "select topic_id, next_offset from outcome_offsets where topic = %s and partition = %s for update",
        [place.topic, place.partition],
    )
    known, next_offset = cursor.fetchone() or (None, 0)
    return int(next_offset) if known == place.topic_id else 0  # a topic that was made anew begins anew


def _go_on_from(cursor: Cursor, place: _Place, offset: int) -> None:
    cursor.execute(
        "update outcome_offsets set topic_id = %s, next_offset = %s where topic = %s and partition = %s",
        [place.topic_id, offset, place.topic, place.partition],
    )
