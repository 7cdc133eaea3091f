"""The export's rivals: `python -m tests.benchmarks.rivals.export_peers adbc|connectorx FILE`, one process, one Parquet file.

They do what the export does with `raw_orders`: every row, every column, zstd. They need not survive a kill, agree with other
tables, or leave this machine. `… profile FILE` makes the profile of the table alone, which the export makes as well.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import adbc_driver_postgresql.dbapi as adbc
import connectorx
import pyarrow.parquet as pq

_COLUMNS = (
    "order_id, user_id, product_id, quantity, amount, amount_numeric, country, created_date, event_ts, status, source, reasons,"
    " rules_version, screened_at, ingested_at, change_xid::text::bigint as change_xid"
)
QUERY = f"select {_COLUMNS} from raw_orders"


def with_adbc(dsn: str, path: str) -> None:
    """ADBC's batches, one after the other, to a Parquet writer: flat memory, one connection."""
    with adbc.connect(dsn, autocommit=True) as connection, connection.cursor() as cursor:
        cursor.execute(QUERY)
        batches = cursor.fetch_record_batch()
        with pq.ParquetWriter(path, batches.schema, compression="zstd") as writer:
            for batch in batches:
                writer.write_batch(batch)


def with_connectorx(dsn: str, path: str) -> None:
    """ConnectorX with a thread and a connection a core: the whole table in memory, then one write."""
    table = connectorx.read_sql(dsn, QUERY, return_type="arrow", partition_on="user_id", partition_num=os.cpu_count() or 1)
    pq.write_table(table, path, compression="zstd")


def profile_alone(dsn: str, path: str) -> None:
    """Postgres's profile of the table, which a reconciliation compares."""
    # Here, so that the rivals do not pay for imports that they have no use for.
    from batch.postgres import connect
    from batch.warehouse.export import columns_of
    from batch.warehouse.profile import source_profile
    from batch.warehouse.slices import described

    with connect(dsn) as connection, connection.cursor() as cursor:
        columns = described("raw_orders", columns_of(cursor, "raw_orders"))
        profile = source_profile(cursor, "raw_orders", columns)
    Path(path).write_text(str(profile), encoding="utf-8")


PEERS: dict[str, Callable[[str, str], None]] = {"adbc": with_adbc, "connectorx": with_connectorx}

if __name__ == "__main__":
    (PEERS | {"profile": profile_alone})[sys.argv[1]](os.environ["FINPRO_POSTGRES_DSN"], sys.argv[2])
