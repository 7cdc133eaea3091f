"""Who is forgotten, and what stands in the place of their data: a pseudonym, made of the number that orders go by.

The record is a table of Postgres, `forgotten_users`, and a trigger there keeps raw_users to it. The bucket has a copy, an
object a person: a Postgres that was brought back from a copy of before does not know whom it had forgotten.
"""

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import NamedTuple

import msgspec
from google.api_core.exceptions import NotFound, PreconditionFailed
from google.cloud.storage import Bucket
from psycopg2.extensions import cursor as Cursor
from psycopg2.extras import execute_values

from batch.postgres import connect, explained
from conf.errors import ExportError, ForgetError

KEPT = "forgotten/"  # outside of raw/, whose objects a lifecycle rule may delete
_NAME = "finpro forget"


class Pseudonym(NamedTuple):
    """What a column holds of somebody who is forgotten: their number between two texts."""

    before: str
    after: str

    def of(self, user_id: int) -> str:
        """That of one person."""
        return f"{self.before}{user_id}{self.after}"


# The columns that say who somebody is, wherever they stand beside a user_id. Migration 014 has the same.
PERSONAL = {
    "name": Pseudonym("forgotten-", ""),
    "email": Pseudonym("forgotten-", "@forgotten.invalid"),
    "phone_number": Pseudonym("forgotten-", ""),
}


# The column of an order that holds the declared fields that came with it; of somebody who is forgotten it holds nothing.
ATTRIBUTES = "attributes"


class Forgotten(msgspec.Struct, frozen=True):
    """A person who is forgotten; `completed_at` is when that was done everywhere, as far as Postgres knows."""

    user_id: int
    forgotten_at: datetime
    request: str | None = None
    completed_at: datetime | None = None


# --- Postgres --------------------------------------------------------------------------------------------------------

_RECORDED = "select user_id, forgotten_at, request, completed_at from forgotten_users order by user_id"
_UNKNOWN = """
    select user_id from unnest(%s::bigint[]) as wanted (user_id)
    where not exists (select from raw_users where raw_users.user_id = wanted.user_id)
      and not exists (select from forgotten_users where forgotten_users.user_id = wanted.user_id)
      and not exists (select from deleted_rows where table_name = 'raw_users' and key = wanted.user_id::text)
      and not exists (select from raw_orders where raw_orders.user_id = wanted.user_id)
    order by user_id
"""
# What came with their orders beside the fields of an order: devices, addresses, whatever rules have declared.
_HAS_ATTRIBUTES = f"user_id = any(%s) and {ATTRIBUTES} is not null"
_IS_HELD = f"""
    user_id = any(%s) and not ({" and ".join(f"{column} = %s || user_id || %s" for column in PERSONAL)})
"""


def recorded(dsn: str) -> list[Forgotten]:
    """All who are forgotten, as Postgres knows them.

    Raises:
        PostgresError: Postgres does not answer or lacks the table.
    """
    with explained(dsn), connect(dsn, application_name=_NAME) as connection, connection.cursor() as cursor:
        return _recorded(cursor)


class Held(NamedTuple):
    """Rows of raw_users that hold somebody by name, and of raw_orders that have declared fields of theirs."""

    raw_users: int
    raw_orders: int


def held_in_postgres(dsn: str, users: Collection[int]) -> Held:
    """How many rows still hold something of these users.

    Raises:
        ForgetError: nothing is known of one of them.
        PostgresError: Postgres does not answer or lacks a table.
    """
    with explained(dsn), connect(dsn, application_name=_NAME) as connection, connection.cursor() as cursor:
        _require_known(cursor, users)
        return _held(cursor, users)


def forget_in_postgres(dsn: str, persons: Collection[Forgotten]) -> Held:
    """Record these persons, and so let a trigger put pseudonyms in the place of what raw_users holds of them.

    Those who are recorded already stay as they are. Their orders lose their declared fields. Returns how many rows held
    something.

    Raises:
        ForgetError: nothing is known of one of them; nobody was recorded.
        PostgresError: Postgres does not answer, lacks a table, or this login may not write there.
    """
    users = [person.user_id for person in persons]
    with explained(dsn), connect(dsn, application_name=_NAME) as connection, connection.cursor() as cursor:
        _require_known(cursor, users)
        held = _held(cursor, users)
        rows = [(person.user_id, person.request, person.forgotten_at) for person in persons]
        execute_values(
            cursor,
            "insert into forgotten_users (user_id, request, forgotten_at) values %s on conflict (user_id) do nothing",
            rows,
        )
        # Those who were recorded before, and were brought back while triggers were off. The trigger does the rest.
        cursor.execute(f"update raw_users set name = name where {_IS_HELD}", _held_by(users))
        cursor.execute(f"update raw_orders set {ATTRIBUTES} = null, change_xid = default where {_HAS_ATTRIBUTES}", [users])
        return held


def complete(dsn: str, users: Collection[int]) -> None:
    """Note that nothing is left of these users anywhere."""
    with explained(dsn), connect(dsn, application_name=_NAME) as connection, connection.cursor() as cursor:
        cursor.execute(
            "update forgotten_users set completed_at = now() where completed_at is null and user_id = any(%s)", [list(users)]
        )


def _recorded(cursor: Cursor) -> list[Forgotten]:
    cursor.execute(_RECORDED)
    return [Forgotten(*row) for row in cursor.fetchall()]


def _held(cursor: Cursor, users: Collection[int]) -> Held:
    cursor.execute(f"select count(*) from raw_users where {_IS_HELD}", _held_by(users))
    (named,) = cursor.fetchone() or (0,)
    cursor.execute(f"select count(*) from raw_orders where {_HAS_ATTRIBUTES}", [list(users)])
    (orders,) = cursor.fetchone() or (0,)
    return Held(int(named), int(orders))


def _held_by(users: Collection[int]) -> list[object]:
    """The parameters of _IS_HELD."""
    return [list(users), *(text for pseudonym in PERSONAL.values() for text in pseudonym)]


def _require_known(cursor: Cursor, users: Collection[int]) -> None:
    cursor.execute(_UNKNOWN, [list(users)])
    if unknown := [str(user_id) for (user_id,) in cursor.fetchall()]:
        raise ForgetError(
            f"Nothing is known of user {', '.join(unknown)}: no row of raw_users, no order, no deletion. Nobody was forgotten."
            " Somebody who was deleted long ago is forgotten by `insert into forgotten_users (user_id) values (…)` and"
            " `finpro forget`."
        )


# --- the copy in the bucket ------------------------------------------------------------------------------------------


def kept_in_bucket(bucket: Bucket) -> list[Forgotten]:
    """All who are forgotten, as the bucket knows them.

    Raises:
        ForgetError: an object is not as it was written.
    """
    found = []
    for blob in bucket.list_blobs(prefix=KEPT):
        try:
            found.append(msgspec.json.decode(blob.download_as_bytes(), type=Forgotten))
        except NotFound:
            continue
        except msgspec.DecodeError as error:
            raise ForgetError(
                f"gs://{bucket.name}/{blob.name} is not as finpro wrote it ({error}): delete it, and forget the person again."
            ) from error
    return found


def keep_in_bucket(bucket: Bucket, persons: Sequence[Forgotten]) -> None:
    """Keep a copy of the record; what is there stays."""
    for person in persons:
        text = msgspec.json.encode(Forgotten(person.user_id, person.forgotten_at, person.request))
        try:
            blob = bucket.blob(_object_of(person.user_id))
            blob.upload_from_string(text, content_type="application/json", if_generation_match=0)
        except PreconditionFailed:
            continue


def require_all_known(cursor: Cursor, bucket: Bucket) -> None:
    """Check that Postgres, as the cursor's transaction shows it, knows of all whom the bucket says are forgotten.

    Raises:
        ExportError: it does not, as after it was restored from a copy: an export would bring their data to BigQuery again.
    """
    names = [blob.name for blob in bucket.list_blobs(prefix=KEPT)]
    if not names:
        return
    known = {_object_of(person.user_id) for person in _recorded(cursor)}
    if unknown := sorted(set(names) - known):
        raise ExportError(
            f"{len(unknown):,} who were forgotten are not in forgotten_users (gs://{bucket.name}/{unknown[0]} …): this Postgres"
            " is one from before, and may hold their names. `finpro forget` forgets them again; then export."
        )


def _object_of(user_id: int) -> str:
    return f"{KEPT}{user_id}.json"
