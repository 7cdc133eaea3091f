"""How far a streaming query has come, also when it is not running: as its checkpoint says, or the ledger of screening."""

from datetime import datetime
from typing import Any, NamedTuple

import msgspec
from pyarrow import fs

from batch.file_systems import file_system
from batch.postgres import connect, explained
from conf.settings import Settings
from streaming.kafka import ORDERS, TopicReader, librdkafka_config


class Committed(NamedTuple):
    """The last micro-batch that a query has committed, or settled.

    Attributes:
        batch: its number.
        at: when.
        ends: topic (full name) → partition → the first offset that was not read.
    """

    batch: int
    at: datetime
    ends: dict[str, dict[int, int]]


def last_commit(settings: Settings, query: str) -> Committed | None:
    """The last micro-batch that a query has committed; None before the first.

    Raises:
        SettingsError: the checkpoints lie where only Spark can read.
    """
    system, path = file_system(f"{settings.checkpoints}/{query}", settings)
    files = system.get_file_info(fs.FileSelector(f"{path}/commits", allow_not_found=True))
    commits = {int(file.base_name): file.mtime for file in files if file.base_name.isdigit()}
    if not commits:
        return None
    batch = max(commits)
    with system.open_input_stream(f"{path}/offsets/{batch}") as stream:
        lines = stream.readall().decode().splitlines()
    ends: dict[str, dict[int, int]] = {}
    for line in lines[2:]:  # a version and the batch's metadata come first, then a line a source
        ends |= msgspec.json.decode(line, type=dict[str, dict[int, int]])
    return Committed(batch, commits[batch], ends)


def last_settled(settings: Settings) -> Committed | None:
    """The newest micro-batch that screening has settled, wherever it runs; None before the first.

    Raises:
        PostgresError: Postgres does not answer, or refuses.
    """
    row = _newest(settings, "number, settled_at, end_offsets", "and settled_at is not null", by="settled_at")
    if row is None:
        return None
    number, at, ends = row
    return Committed(number, at, {settings.topic(ORDERS): {int(partition): end for partition, end in ends.items()}})


def open_by(settings: Settings) -> str | None:
    """The version of the rules by which the newest micro-batch of screening is being screened; None where it is settled.

    Raises:
        PostgresError: Postgres does not answer, or refuses.
    """
    version, is_open = _newest(settings, "rules_version, settled_at is null", "", by="moment") or (None, False)
    return version if is_open else None


def _newest(settings: Settings, columns: str, which: str, *, by: str) -> tuple[Any, ...] | None:
    """Columns of a row of screening_ledger: of each query the newest such row, of these the last one `by` a time."""
    dsn = settings.require("postgres_dsn")
    with explained(dsn), connect(dsn) as connection, connection.cursor() as cursor:
        cursor.execute(
            f"select {columns} from screening_drivers as driver cross join lateral ("
            f"   select * from screening_ledger where query_id = driver.query_id {which}"
            "   order by number desc limit 1) as newest"
            f" order by {by} desc limit 1"
        )
        row: tuple[Any, ...] | None = cursor.fetchone()
    return row


def unread(settings: Settings, commit: Committed) -> int:
    """How many messages Kafka has beyond a commit.

    Raises:
        KafkaError: Kafka does not answer.
    """
    waiting = 0
    for topic, read in commit.ends.items():
        with TopicReader(librdkafka_config(settings), topic) as reader:
            waiting += sum(max(end - read.get(partition, 0), 0) for partition, end in reader.ends().items())
    return waiting
