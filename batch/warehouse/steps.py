"""What each step of a run has BigQuery read: `ingestion_steps` in Postgres."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from batch.bigquery import Client, Usage
from batch.postgres import connect, explained
from conf.errors import PostgresError
from conf.settings import Settings

_log = logging.getLogger(__name__)

_ADD = """
    insert into ingestion_steps as kept (run_id, step, jobs, bytes_processed, bytes_billed, finished_at)
    values (%s, %s, %s, %s, %s, now())
    on conflict (run_id, step) do update set
        jobs = kept.jobs + excluded.jobs,
        bytes_processed = kept.bytes_processed + excluded.bytes_processed,
        bytes_billed = kept.bytes_billed + excluded.bytes_billed,
        finished_at = excluded.finished_at
"""


@contextmanager
def counted(settings: Settings, run_id: str, step: str, client: Client) -> Iterator[None]:
    """Record what the client's statements have read by the end of the block, however it ends."""
    try:
        yield
    finally:
        record(settings, run_id, step, client.usage())


def record(settings: Settings, run_id: str, step: str, usage: Usage) -> None:
    """Add what one try of a step has read; that it cannot be recorded is a line in the log, and stops nothing."""
    dsn = settings.get("postgres_dsn")
    if dsn is None or not usage.jobs:
        return
    try:
        with explained(dsn), connect(dsn, application_name="finpro steps") as connection, connection.cursor() as cursor:
            cursor.execute(_ADD, [run_id, step, usage.jobs, usage.processed, usage.billed])
    except PostgresError as error:
        _log.warning("What BigQuery has read for step %s of run %s is not recorded: %s", step, run_id, error)
