"""The exported files of raw_users: those that hold somebody by name are written anew under their names, with pseudonyms.

So a run has the same files with as many rows as its manifest says, and can still be loaded.
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

from batch.forgotten import PERSONAL, Pseudonym
from batch.warehouse.slices import PARQUET, folder

_USERS = folder("raw_users")


class Files(NamedTuple):
    """How many objects were looked at, in how many of them somebody was named, and in how many rows."""

    looked_at: int
    written: int
    rows: int


def forget_in_files(bucket: Bucket, users: Collection[int], *, dry_run: bool) -> Files:
    """Put pseudonyms in the place of what exported files of raw_users hold of these users, also those of attempts that died.

    Raises:
        GoogleAPICallError: Cloud Storage refuses or does not answer; see batch.google_cloud.explained.
    """
    looked_at = written = rows = 0
    for blob in bucket.list_blobs(prefix=_USERS):
        found = _forget_in(blob, users, dry_run=dry_run)
        looked_at, written, rows = looked_at + 1, written + bool(found), rows + found
    return Files(looked_at, written, rows)


def _forget_in(blob: Blob, users: Collection[int], *, dry_run: bool) -> int:
    """The number of rows of one object that held somebody by name."""
    try:
        table = pq.read_table(io.BytesIO(blob.download_as_bytes(if_generation_match=blob.generation)))
    except (NotFound, PreconditionFailed):  # a lifecycle rule or an export was faster
        return 0
    forgotten, found = without_names(table, users)
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


def _for_each(pseudonym: Pseudonym, ids: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.binary_join_element_wise(pseudonym.before, pc.cast(ids, pa.string()), pseudonym.after, "")
