"""Rows of Postgres as polars frames, in bulk: by COPY, in both directions."""

import io
from collections.abc import Mapping

import polars as pl
from psycopg2.extensions import cursor as Cursor


def copy_frame(cursor: Cursor, table: str, frame: pl.DataFrame) -> None:
    """COPY a frame's rows into the columns of `table` that have its columns' names."""
    rows = io.BytesIO()
    frame.write_csv(rows, include_header=False, datetime_format="%Y-%m-%dT%H:%M:%S%.6f%:z")
    rows.seek(0)
    cursor.copy_expert(f"copy {table} ({', '.join(frame.columns)}) from stdin (format csv)", rows)


def read_frame(cursor: Cursor, query: str, schema: Mapping[str, pl.DataType | type[pl.DataType]]) -> pl.DataFrame:
    """The rows of a query, through COPY; `schema` names its columns in order and types them."""
    rows = io.BytesIO()
    cursor.copy_expert(f"copy ({query}) to stdout (format csv)", rows)
    rows.seek(0)
    return pl.read_csv(rows, has_header=False, schema=schema) if rows.getbuffer().nbytes else pl.DataFrame(schema=schema)
