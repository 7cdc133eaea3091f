"""What a connection to Postgres starts with, and what is made of what a driver reports."""

import psycopg2
import pytest
from psycopg2.extensions import parse_dsn

from batch.sessions import BULK, USUAL, arrived, conninfo, describe, dial, trouble
from conf.errors import PostgresError, PostgresUnavailable

DSN = "postgresql://finpro:geheim@db/finpro"


def test_a_connection_is_named_limited_and_notices_silence() -> None:
    parts = parse_dsn(conninfo(DSN, "finpro screen worker", USUAL))

    assert parts["application_name"] == "finpro screen worker"
    assert (parts["connect_timeout"], parts["tcp_user_timeout"], parts["keepalives_idle"]) == ("5", "45000", "15")
    assert "-c statement_timeout=600s -c lock_timeout=60s" in parts["options"]
    assert "-c statement_timeout=0s" in parse_dsn(conninfo(DSN, "finpro export", BULK))["options"]


def test_what_the_dsn_says_comes_last_and_so_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    own = f"{DSN}?connect_timeout=30&application_name=x&options=-cstatement_timeout%3D5s"
    parts = parse_dsn(conninfo(own, "finpro", USUAL))

    assert (parts["connect_timeout"], parts["application_name"]) == ("30", "finpro")
    assert parts["options"].endswith(" -cstatement_timeout=5s")
    assert parse_dsn(conninfo(own, "finpro", USUAL, by_options=False))["options"] == "-cstatement_timeout=5s"
    assert "options" not in parse_dsn(conninfo(DSN, "finpro", USUAL, by_options=False))
    monkeypatch.setenv("PGOPTIONS", "-c search_path=shop")
    assert parse_dsn(conninfo(DSN, "finpro", USUAL))["options"].endswith(" -c search_path=shop")


@pytest.mark.parametrize("dsn", ["geheim", "postgresql://u:geheim@db/finpro?nonsense=geheim", "host=db geheim"])
def test_what_is_not_a_dsn_is_told_without_it(dsn: str) -> None:
    with pytest.raises(PostgresError, match="is not a DSN: write postgresql://") as caught:
        describe(dsn)

    assert "geheim" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ('FATAL:  password authentication failed for user "finpro"', PostgresError),
        ("connection to server failed: Connection refused", PostgresUnavailable),
        ("FATAL:  sorry, too many clients already", PostgresUnavailable),
    ],
)
def test_a_connection_that_cannot_be_opened_is_worth_another_try_or_not(said: str, kind: type[PostgresError]) -> None:
    def refuse(_conninfo: str) -> None:
        raise psycopg2.OperationalError(said)

    with pytest.raises(PostgresError) as caught:
        dial(DSN, "finpro", USUAL, refuse, psycopg2.OperationalError)

    assert type(caught.value) is kind
    assert said in str(caught.value)


ADBC = """NOT_FOUND: Failed to prepare query: ERROR:  relation "nope" does not exist
LINE 1: select

Query was: select. SQLSTATE: 42P01"""


@pytest.mark.parametrize(
    ("text", "code", "is_away", "kind", "words"),
    [
        (ADBC, "42P01", False, PostgresError, 'finpro: relation "nope" does not exist. `finpro migrate` creates'),
        (ADBC, None, False, PostgresError, "`finpro migrate` creates"),
        ("permission denied for table raw_orders", "42501", False, PostgresError, "Grant its user the role"),
        ("canceling statement due to lock timeout", "55P03", True, PostgresUnavailable, "docs/runbook.md (FinproQuerySilent)"),
        ("cannot execute INSERT in a read-only transaction", "25006", False, PostgresUnavailable, "target_session_attrs"),
        ("deadlock detected", "40P01", False, PostgresUnavailable, "in each other's way"),
        (
            "server closed the connection unexpectedly\n\tprobably",
            None,
            True,
            PostgresUnavailable,
            "does not answer: server closed",
        ),
        ("division by zero", "22012", False, PostgresError, ": division by zero"),
        ("", None, True, PostgresUnavailable, "does not answer: no reason given"),
    ],
)
def test_what_a_driver_reports_says_what_to_do(
    text: str, code: str | None, is_away: bool, kind: type[PostgresError], words: str
) -> None:
    error = trouble(DSN, text, code, is_away=is_away)

    assert type(error) is kind
    assert str(error).startswith("Postgres at db:5432/finpro")
    assert words in str(error)


def test_a_server_is_told_of_no_limit_that_its_version_does_not_know() -> None:
    old = arrived(DSN, ("UTF8", [], [], True, 130_020), USUAL)
    new = arrived(DSN, ("UTF8", ["o'clock"], [], True, 160_004), USUAL)
    newer = arrived(DSN, ("UTF8", [], [], True, 170_000), USUAL)

    assert old.at_once == ""
    assert (
        new.at_once
        == """select set_config('search_path', '"o''clock"', False), set_config('idle_session_timeout', '0', False)"""
    )
    assert newer.at_once == (
        "select set_config('idle_session_timeout', '0', False), set_config('transaction_timeout', '0', False)"
    )
    assert (old.at_begin, new.at_begin) == ("", "")


def test_behind_a_pooler_nothing_is_set_for_longer_than_a_transaction() -> None:
    arrival = arrived(DSN, ("UTF8", ["public"], ["public"], False, 180_000), USUAL)

    assert arrival.at_once == ""
    assert "set_config('statement_timeout', '600s', True)" in arrival.at_begin
    assert "False" not in arrival.at_begin


@pytest.mark.parametrize(
    ("places", "on_path", "words"),
    [
        (["public"], [], None),
        ([], [], None),
        (["public", "shop"], ["shop"], None),
        (["public", "shop"], ["public", "shop"], "several schemas, public, shop"),
        (["public", "shop"], [], "several schemas, public, shop"),
    ],
)
def test_one_schema_is_finpros_or_it_is_said_which_could_be(places: list[str], on_path: list[str], words: str | None) -> None:
    row = ("UTF8", places, on_path, True, 180_000)
    if words is None:
        assert ("search_path" in arrived(DSN, row, USUAL).at_once) is bool(places)
        return

    with pytest.raises(PostgresError, match=words):
        arrived(DSN, row, USUAL)
