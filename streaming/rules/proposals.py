"""The record of rules that were proposed, put in force, and applied to orders of before: tables to which rows are only added.

Its promotions are numbered one after the other. A proposal notes the newest one, and the rules file that it was held against:
so whatever is put in force meanwhile makes it stale.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

from psycopg2.extensions import cursor as Cursor

from batch.postgres import LockHeld, connect, explained, take_lock
from batch.sessions import BULK
from conf.errors import ApplicationRefused, PromotionRefused
from streaming.rules.content import Content, content_of

_NAME = "finpro rules"
_LOCK = 0x72756C6573  # "rules": one puts rules in force at a time
_APPLYING = 0x6170706C79  # "apply": one applies them at a time
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


@dataclass(frozen=True)
class Application:
    """Rules that somebody applied to orders of before.

    Attributes:
        number: of the application.
        version: of the rules.
        since, until: the event times of the orders, `until` not included; None where it had no end.
        at: the time that its verdicts carry.
        orders: how many orders were given further reasons.
        days_left: the UTC days of event time that are still to be done; none once it is finished.
    """

    number: int
    version: str
    since: datetime
    until: datetime | None
    at: datetime
    by: str
    why: str
    orders: int
    days_left: Sequence[date]


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


# --- orders of before ------------------------------------------------------------------------------------------------


def applications(cursor: Cursor) -> list[Application]:
    """All, the oldest first."""
    cursor.execute(
        "select number, version, since, until, applied_at, applied_by, why,"
        " (select coalesce(sum(orders), 0)::bigint from rules_application_days where application = number),"
        " array(select unnest(days) except select day from rules_application_days where application = number order by 1)"
        " from rules_applications order by number"
    )
    return [Application(*row) for row in cursor.fetchall()]


def add_application(
    cursor: Cursor,
    version: str,
    *,
    since: datetime,
    until: datetime | None,
    days: Sequence[date],
    figures: Mapping[str, Any],
    at: datetime,
    by: str,
    why: str,
) -> Application:
    """Note that rules are being applied to orders of before."""
    cursor.execute(
        "insert into rules_applications (number, version, since, until, days, figures, applied_at, applied_by, why)"
        " select coalesce(max(number), 0) + 1, %s, %s, %s, %s::date[], %s, %s, %s, %s from rules_applications returning number",
        [version, since, until, list(days), json.dumps(figures), at, by, why],
    )
    [[number]] = cursor.fetchall()
    return Application(int(number), version, since, until, at, by, why, 0, days)


def add_application_day(cursor: Cursor, application: Application, day: date, orders: int) -> None:
    """Note that a day is done."""
    cursor.execute(
        "insert into rules_application_days (application, day, orders) values (%s, %s, %s)", [application.number, day, orders]
    )


@contextmanager
def applying_alone(dsn: str) -> Iterator[None]:
    """Keep others from applying rules during the block.

    Raises:
        ApplicationRefused: somebody is; says who.
        PostgresError: Postgres does not answer.
    """
    # It is idle as long as the application takes, and sees nothing: that holds up nobody.
    with (
        explained(dsn),
        connect(dsn, application_name="finpro rules apply", limits=BULK) as connection,
        connection.cursor() as cursor,
    ):
        try:
            take_lock(cursor, _APPLYING, seconds=0, on_wait=lambda holder: None)
        except LockHeld as held:
            raise ApplicationRefused(f"Rules are being applied to orders of before by {held}: wait for its end.") from held
        yield
