"""A slice of a raw table on its way from a snapshot to one Parquet object: what each task of the export does.

Rows travel as Arrow batches, from Postgres's COPY to the Parquet writer to the upload: no row is ever a Python object, and
memory holds a batch, the encoded pages of one file and a chunk of its upload, however long the slice is.
"""

import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from google.cloud.storage import Bucket

from batch.google_cloud import explained, storage_client
from batch.warehouse.manifest import Column, ExportedFile
from batch.warehouse.profile import TEXTS, Days, RowsRead, row_md5
from batch.warehouse.snapshot import Snapshot, reader
from conf.errors import ExportError
from conf.settings import Settings

_UPLOAD_CHUNK_BYTES = 16 * 2**20  # most slices are one request; a longer one is sent as it grows
# Ids and amounts hardly repeat: their dictionaries are given up early, which saves a third of the writing and of the size.
# Whoever loads a file reads all of it: statistics would let nothing be skipped.
PARQUET = {"compression": "zstd", "dictionary_pagesize_limit": 2**14, "write_statistics": False}


class _Type(NamedTuple):
    """How a Postgres type travels: the BigQuery type, what COPY is asked for, the type in the Parquet file."""

    bigquery: str
    expression: str
    arrow: pa.DataType


_INTEGER = _Type("INT64", "{}::bigint", pa.int64())
_FLOAT = _Type("FLOAT64", "{}::float8", pa.float64())
_TYPES = {
    "bigint": _Type("INT64", "{}", pa.int64()),
    "integer": _INTEGER,
    "smallint": _INTEGER,
    "xid8": _Type("INT64", "xid8send({})", pa.int64()),  # its eight bytes: Postgres has no cast to a number
    "double precision": _FLOAT,
    "real": _FLOAT,
    "numeric": _Type("NUMERIC", "{}::text", pa.decimal128(38, 9)),  # Arrow has no type for one without precision
    "boolean": _Type("BOOL", "{}", pa.bool_()),
    "text": _Type("STRING", "{}", pa.string()),
    "character varying": _Type("STRING", "{}", pa.string()),
    "jsonb": _Type("STRING", "{}::text", pa.string()),  # its text, which the reconciliation can compare: see decision 31
    "date": _Type("DATE", "{}", pa.date32()),
    "timestamp with time zone": _Type("TIMESTAMP", "{}", pa.timestamp("us", "UTC")),
    "text[]": _Type("ARRAY<STRING>", "{}", pa.list_(pa.string())),
}


class SourceColumn(NamedTuple):
    """A column of a Postgres table; `type` is as format_type names it, without length or precision."""

    name: str
    type: str


@dataclass(frozen=True)
class Slice:
    """Some rows of a table: those for which `condition` (SQL) holds. Slices of a table share no row.

    A slice that is `profiled` also brings the profile of its rows. One of deletions (`deleted`) has rows of `deleted_rows`
    instead: `source` (SQL) is what gives its columns.
    """

    table: str
    number: int
    columns: Sequence[SourceColumn]
    condition: str
    profiled: bool = False
    deleted: bool = False
    source: str = ""

    @property
    def query(self) -> str:
        """What reads the rows, and for their profile the MD5 of each one's texts."""
        expressions = [_selected(f'"{column.name}"', column.type) for column in self.columns]
        md5 = row_md5(self.described) if self.profiled else None
        expressions += [f'{md5} as "{TEXTS}"'] if md5 else []
        return f"select {', '.join(expressions)} from {self.source or self.table} where {self.condition}"

    @property
    def described(self) -> list[Column]:
        """The columns as BigQuery is to have them."""
        return described(self.table, self.columns)

    @property
    def schema(self) -> pa.Schema:
        """Of the Parquet file."""
        return pa.schema([(column.name, _TYPES[column.type].arrow) for column in self.columns])


class ExportedSlice(NamedTuple):
    """What a task made of a slice: a file, where there was a row, and the profiles of the rows, where they were asked for."""

    table: str
    deleted: bool
    file: ExportedFile | None
    profiles: Days


def described(table: str, columns: Sequence[SourceColumn]) -> list[Column]:
    """The columns as BigQuery is to have them.

    Raises:
        ExportError: a column has a type that does not travel; names it.
    """
    strange = [f"{table}.{column.name} is {column.type}" for column in columns if column.type not in _TYPES]
    if strange:
        raise ExportError(f"{'; '.join(strange)}: the export knows {', '.join(sorted(_TYPES))}. Use one of these types.")
    return [Column(column.name, _TYPES[column.type].bigquery) for column in columns]


def folder(table: str, run_id: str | None = None) -> str:
    """What the names of a run's objects of a table begin with; without a run id, of all runs'."""
    return f"raw/{table}/{run_id}/" if run_id else f"raw/{table}/"


def export_slice(part: Slice, snapshot: Snapshot, settings: Settings, run_id: str) -> ExportedSlice:
    """Write a slice's rows of the snapshot to one new Parquet object, if there is a row.

    Each attempt makes an object of its own name, so one that comes late, of a task or a run believed dead, replaces nothing.

    Raises:
        PostgresError: Postgres or the snapshot is gone.
        GoogleCloudError: Cloud Storage refuses or does not answer.
    """
    kind = "deleted" if part.deleted else "part"
    name = f"{folder(part.table, run_id)}{kind}-{part.number:05d}-{uuid.uuid4().hex[:12]}.parquet"
    rows_read = RowsRead(part.table, part.described) if part.profiled else None
    with explained(settings), reader(snapshot) as read:
        bucket = storage_client(settings).bucket(settings.require("gcs_bucket"))
        file = _write(_as_written(read(part.query), part.schema, rows_read), bucket, name, part.schema)
    return ExportedSlice(part.table, part.deleted, file, rows_read.days if rows_read else {})


def _as_written(batches: Iterable[pa.RecordBatch], schema: pa.Schema, rows_read: RowsRead | None) -> Iterator[pa.RecordBatch]:
    """The batches of a slice, each of some rows, as they are to be written."""
    for batch in batches:
        if batch.num_rows:
            read = schema.append(pa.field(TEXTS, pa.string())) if TEXTS in batch.schema.names else schema
            columns = [_as(field.type, column) for field, column in zip(read, batch.columns, strict=True)]
            rows = pa.RecordBatch.from_arrays(columns, schema=read)
            if rows_read:
                rows_read.add(rows)
            yield rows.select(schema.names)


def _as(type_: pa.DataType, column: pa.Array) -> pa.Array:
    """A column as COPY gives it, as it is to be written: bytes are an integer's, the most significant one first."""
    if not pa.types.is_binary(column.type):
        return column.cast(type_)
    bytes_ = column.cast(pa.binary(8))
    valid, values = bytes_.buffers()
    numbers = np.frombuffer(values, ">i8").astype(np.int64)
    return pa.Array.from_buffers(type_, len(column), [valid, pa.py_buffer(numbers)])


def _write(batches: Iterator[pa.RecordBatch], bucket: Bucket, name: str, schema: pa.Schema) -> ExportedFile | None:
    first = next(batches, None)
    if first is None:
        return None
    rows = 0
    upload = bucket.blob(name).open("wb", chunk_size=_UPLOAD_CHUNK_BYTES, ignore_flush=True)
    with upload, pq.ParquetWriter(upload, schema, **PARQUET) as writer:
        for batch in _chain(first, batches):
            writer.write_batch(batch)
            rows += batch.num_rows
        writer.close()
        size = upload.tell()
    return ExportedFile(name, rows, size)


def _chain(first: pa.RecordBatch, others: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    yield first
    yield from others


def _selected(name: str, type_: str) -> str:
    return f"{_TYPES[type_].expression.format(name)} as {name}"
