"""The exported files of raw_users: those that hold somebody by name are written anew under their names, with pseudonyms.

Those of raw_orders that hold declared fields of theirs are written anew without. So a run has the same files with as many rows
as its manifest says, and can still be loaded.
"""

import io
from collections.abc import Collection
from functools import reduce
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from google.api_core.exceptions import NotFound, PreconditionFailed
from google.cloud.storage import Blob, Bucket

from batch.forgotten import ATTRIBUTES, PERSONAL, Pseudonym
from batch.warehouse.slices import PARQUET, folder

_USERS, _ORDERS = folder("raw_users"), folder("raw_orders")


class Files(NamedTuple):
    """How many objects were looked at, how many of them held something of somebody, and in how many rows."""

    looked_at: int
    written: int
    rows: int


def forget_in_files(bucket: Bucket, users: Collection[int], *, dry_run: bool) -> Files:
    """Erase these users from the exported files of raw_users and raw_orders, also those of attempts that died.

    Raises:
        GoogleAPICallError: Cloud Storage refuses or does not answer; see batch.google_cloud.explained.
    """
    looked_at = written = rows = 0
    for blob in (*bucket.list_blobs(prefix=_USERS), *bucket.list_blobs(prefix=_ORDERS)):
        found = _forget_in(blob, users, dry_run=dry_run)
        looked_at, written, rows = looked_at + 1, written + bool(found), rows + found
    return Files(looked_at, written, rows)


def _forget_in(blob: Blob, users: Collection[int], *, dry_run: bool) -> int:
    """The number of rows of one object that held something of them."""
    without = without_attributes if blob.name.startswith(_ORDERS) else without_names
    try:
        if without is without_attributes and not _has_attributes(blob):
            return 0
        table = pq.read_table(io.BytesIO(blob.download_as_bytes(if_generation_match=blob.generation)))
    except (NotFound, PreconditionFailed):  # a lifecycle rule or an export was faster
        return 0
    forgotten, found = without(table, users)
    if found and not dry_run:
        content = io.BytesIO()
        pq.write_table(forgotten, content, **PARQUET)
        blob.upload_from_string(content.getvalue(), content_type=blob.content_type, if_generation_match=blob.generation)
    return found


def without_names(table: pa.Table, users: Collection[int]) -> tuple[pa.Table, int]:
    """Exported rows of raw_users with pseudonyms for these users, and how many had none.

    Deletions, which have no names, stay as they are.
    """
    if not set(PERSONAL) <= set(table.column_names):
        return table, 0
    ids = table["user_id"]
    is_wanted = pc.is_in(ids, pa.array(sorted(users), pa.int64()))
    pseudonyms = {column: _for_each(pseudonym, ids) for column, pseudonym in PERSONAL.items()}
    differs = [pc.not_equal(table[column], texts) for column, texts in pseudonyms.items()]
    is_held = pc.and_(is_wanted, reduce(pc.or_, differs))
    for column, texts in pseudonyms.items():
        place = table.column_names.index(column)
        table = table.set_column(place, table.schema.field(column), pc.if_else(is_wanted, texts, table[column]))
    return table, int(pc.sum(is_held).as_py() or 0)


def _has_attributes(blob: Blob) -> bool:
    """Whether some order of an object has declared fields: asked of that column alone, which is small where none has."""
    with blob.open("rb", if_generation_match=blob.generation) as content, pq.ParquetFile(content) as file:
        if ATTRIBUTES not in file.schema_arrow.names:
            return False
        column = file.read([ATTRIBUTES])[ATTRIBUTES]
        return bool(column.null_count < len(column))


def without_attributes(table: pa.Table, users: Collection[int]) -> tuple[pa.Table, int]:
    """Exported rows of raw_orders without the declared fields of these users' orders, and how many had some."""
    is_held = pc.and_(pc.is_in(table["user_id"], pa.array(sorted(users), pa.int64())), pc.is_valid(table[ATTRIBUTES]))
    place = table.column_names.index(ATTRIBUTES)
    kept = pc.if_else(is_held, pa.scalar(None, pa.string()), table[ATTRIBUTES])
    return table.set_column(place, table.schema.field(ATTRIBUTES), kept), int(pc.sum(is_held).as_py() or 0)


def _for_each(pseudonym: Pseudonym, ids: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.binary_join_element_wise(pseudonym.before, pc.cast(ids, pa.string()), pseudonym.after, "")
