"""The record of rules that were proposed and put in force: two tables of Postgres to which rows are only added.

Its promotions are numbered one after the other. A proposal notes the newest one, and the rules file that it was held against:
so whatever is put in force meanwhile makes it stale.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from psycopg2.extensions import cursor as Cursor

from batch.postgres import LockHeld, connect, explained, take_lock
from conf.errors import PromotionRefused
from streaming.rules.content import Content, content_of

_NAME = "finpro rules"
_LOCK = 0x72756C6573  # "rules": one puts rules in force at a time
_PATIENCE_SECONDS = 30


@dataclass(frozen=True)
class Proposal:
    """Rules that somebody proposed.

    Attributes:
        number: of the proposal.
        replaces: the fingerprint of the rules file in force then; blank where there was none.
        follows: the number of the newest promotion then, 0 where there was none.
        failed: the limits that it does not keep, in words.
    """

    number: int
    replaces: str
    follows: int
    failed: Sequence[str]


@dataclass(frozen=True)
class Promotion:
    """Rules that were put in force by a command, and by whom and why.

    Attributes:
        number: one more than that of the one before.
        proposal: the number of the proposal; None where they had been in force before.
        content: the file.
        replaced: the file in force until then; None where there was none.
        despite: why they are in force although they do not keep a limit.
    """

    number: int
    proposal: int | None
    version: str
    content: Content
    replaced: Content | None
    at: datetime
    by: str
    why: str
    despite: str | None


@contextmanager
def record_of(dsn: str) -> Iterator[Cursor]:
    """The record, in one transaction: what is added in the block is there at its end, or nothing.

    Raises:
        PostgresError: Postgres does not answer, lacks the tables (`finpro migrate` makes them), or this login may not.
    """
    with explained(dsn), connect(dsn, application_name=_NAME) as connection, connection.cursor() as cursor:
        yield cursor


def decide_alone(cursor: Cursor) -> None:
    """Wait until nobody else is putting rules in force, and keep others from it until the transaction ends.

    Raises:
        PromotionRefused: somebody has been for long; says who.
    """
    try:
        take_lock(cursor, _LOCK, seconds=_PATIENCE_SECONDS, on_wait=lambda holder: None)
    except LockHeld as held:
        raise PromotionRefused(f"Rules are being put in force by {held}: wait for its end, or end it.") from held


def newest_promotion(cursor: Cursor) -> int:
    """The number of the newest promotion, 0 where there is none."""
    cursor.execute("select coalesce(max(number), 0) from rules_promotions")
    [[number]] = cursor.fetchall()
    return int(number)


def promotions(cursor: Cursor) -> list[Promotion]:
    """All, the oldest first."""
    cursor.execute(
        "select number, proposal, version, content, replaced, promoted_at, promoted_by, why, despite"
        " from rules_promotions order by number"
    )
    return [
        Promotion(number, proposal, version, content_of(content), replaced and content_of(replaced), at, by, why, despite)
        for number, proposal, version, content, replaced, at, by, why, despite in cursor.fetchall()
    ]


def proposal_of(cursor: Cursor, content: Content) -> Proposal | None:
    """The newest proposal of exactly this content; None where it was never proposed."""
    cursor.execute(
        "select number, replaces, follows, failed from rules_proposals where fingerprint = %s order by number desc limit 1",
        [content.fingerprint],
    )
    found = cursor.fetchone()
    return Proposal(*found) if found else None


def add_proposal(
    cursor: Cursor,
    content: Content,
    version: str,
    *,
    replaces: str,
    follows: int,
    figures: Mapping[str, Any],
    failed: Sequence[str],
    by: str,
) -> int:
    """Note a proposal; returns its number."""
    cursor.execute(
        "insert into rules_proposals (version, fingerprint, content, replaces, follows, figures, failed, proposed_by)"
        " values (%s, %s, %s, %s, %s, %s, %s, %s) returning number",
        [version, content.fingerprint, content.as_json(), replaces, follows, json.dumps(figures), list(failed), by],
    )
    [[number]] = cursor.fetchall()
    return int(number)


def add_promotion(
    cursor: Cursor,
    content: Content,
    version: str,
    *,
    number: int,
    proposal: int | None,
    replaced: Content | None,
    by: str,
    why: str,
    despite: str | None,
) -> None:
    """Note that these rules are put in force."""
    cursor.execute(
        "insert into rules_promotions (number, proposal, version, fingerprint, content, replaced, promoted_by, why, despite)"
        " values (%s, %s, %s, %s, %s, %s, %s, %s, %s)",
        [
            *(number, proposal, version, content.fingerprint, content.as_json()),
            *(replaced and replaced.as_json(), by, why, despite),
        ],
    )
