"""`finpro generate` on a real Postgres."""

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from batch.forgotten import PERSONAL, Forgotten, Held, forget_in_postgres, held_in_postgres, recorded
from batch.postgres import connect
from batch.reference_data import Loaded, generate, users
from conf.errors import ForgetError, PostgresError
from conf.settings import Settings
from jobs.local.platform import Platform
from tests.runs.logins import login


@pytest.fixture
def dsn(settings: Settings) -> str:
    return settings.require("postgres_dsn")


def make(dsn: str, user_count: int = 300, product_count: int = 40, seed: int = 7) -> list[Loaded]:
    return generate(dsn, user_count=user_count, product_count=product_count, seed=seed)


def query(dsn: str, sql: str) -> list[tuple[Any, ...]]:
    with connect(dsn) as connection, connection.cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetchall() if cursor.description else []


def versions(dsn: str) -> dict[str, dict[int, tuple[Any, ...]]]:
    """Table → id → what shows that a row was written again."""
    return {
        "raw_users": {row[0]: row for row in query(dsn, "select user_id, change_xid::text, ctid::text from raw_users")},
        "raw_products": {
            row[0]: row for row in query(dsn, "select product_id, change_xid::text, ctid::text from raw_products")
        },
    }


def test_every_row_that_is_made_is_loaded(dsn: str) -> None:
    assert make(dsn) == [Loaded("raw_users", 300, 0, 0), Loaded("raw_products", 40, 0, 0)]
    expected = pl.concat(users(300, 7))
    stored = query(dsn, f"select {', '.join(expected.columns)} from raw_users order by user_id")
    assert stored == expected.rows()


def test_the_same_again_writes_no_row(dsn: str) -> None:
    make(dsn)
    before = versions(dsn)
    assert make(dsn) == [Loaded("raw_users", 0, 0, 300), Loaded("raw_products", 0, 0, 40)]
    assert versions(dsn) == before


def test_larger_counts_add_the_new_rows_only(dsn: str) -> None:
    make(dsn)
    before = versions(dsn)
    assert make(dsn, 450, 41) == [Loaded("raw_users", 150, 0, 300), Loaded("raw_products", 1, 0, 40)]
    after = versions(dsn)
    assert {table: {key: after[table][key] for key in rows} for table, rows in before.items()} == before
    assert {table: len(rows) for table, rows in after.items()} == {"raw_users": 450, "raw_products": 41}


def test_smaller_counts_remove_nothing(dsn: str) -> None:
    make(dsn)
    assert make(dsn, 10, 0) == [Loaded("raw_users", 0, 0, 10), Loaded("raw_products", 0, 0, 0)]
    assert query(dsn, "select count(*) from raw_users") == [(300,)]


def test_a_row_that_differs_is_put_right_and_no_other_is_written(dsn: str) -> None:
    make(dsn)
    query(dsn, "update raw_users set phone_number = 'none' where user_id = 17")
    before = versions(dsn)
    assert make(dsn)[0] == Loaded("raw_users", 0, 1, 299)
    after = versions(dsn)
    assert [key for key, row in after["raw_users"].items() if row != before["raw_users"][key]] == [17]
    assert query(dsn, "select phone_number from raw_users where user_id = 17") != [("none",)]


def test_another_seed_is_refused_and_changes_nothing(dsn: str) -> None:
    make(dsn)
    before = versions(dsn)
    with pytest.raises(PostgresError, match=r"raw_users .* \(user_id\)=.* Was it filled with another seed\?"):
        make(dsn, 500, 50, seed=8)
    assert versions(dsn) == before


def test_a_natural_key_that_stands_under_another_id_is_refused(dsn: str) -> None:
    make(dsn)
    query(dsn, "update raw_products set product_id = 1000 where product_id = 5")
    with pytest.raises(PostgresError, match=r"raw_products .* \(product_name\)="):
        make(dsn)


def test_missing_tables_are_one_message_that_names_the_command(dsn: str) -> None:
    query(dsn, "drop table raw_products")
    with pytest.raises(PostgresError, match=r"raw_products.* does not exist\. `finpro migrate`"):
        make(dsn)
    assert query(dsn, "select count(*) from raw_users") == [(0,)]


def test_the_command_says_what_it_inserted_and_what_was_there(settings: Settings) -> None:
    command = [str(Path(sys.executable).with_name("finpro")), "generate", "--users", "120", "--products", "30"]
    first, second = (subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(2))
    assert first.stdout.splitlines() == [
        "raw_users: 120 inserted, 0 updated, 0 unchanged",
        "raw_products: 30 inserted, 0 updated, 0 unchanged",
    ]
    assert second.stdout.splitlines() == [
        "raw_users: 0 inserted, 0 updated, 120 unchanged",
        "raw_products: 0 inserted, 0 updated, 30 unchanged",
    ]


# --- who is forgotten ----------------------------------------------------------------------------------------------------

NOW = datetime(2026, 11, 29, tzinfo=UTC)


def named(dsn: str) -> set[int]:
    """The users that raw_users has by name; of the others it has pseudonyms in all three columns."""
    rows = query(dsn, f"select user_id, {', '.join(PERSONAL)} from raw_users")
    pseudonyms = {user_id: tuple(pseudonym.of(user_id) for pseudonym in PERSONAL.values()) for user_id, *_ in rows}
    assert all(not set(texts) & set(pseudonyms[user_id]) for user_id, *texts in rows if tuple(texts) != pseudonyms[user_id])
    return {user_id for user_id, *texts in rows if tuple(texts) != pseudonyms[user_id]}


def test_whoever_brings_somebody_again_who_is_forgotten_brings_a_pseudonym(dsn: str, platform: Platform) -> None:
    make(dsn, 5)
    before = versions(dsn)["raw_users"]
    theirs = query(dsn, "select * from raw_users where user_id = 2")[0]
    assert forget_in_postgres(dsn, [Forgotten(2, NOW), Forgotten(4, NOW, "a ticket")]) == Held(2, 0)
    assert named(dsn) == {1, 3, 5}
    after = versions(dsn)["raw_users"]
    assert {user_id for user_id in after if after[user_id] != before[user_id]} == {2, 4}, "which an export takes along"

    assert make(dsn, 6)[0] == Loaded("raw_users", 1, 0, 5)
    values = ", ".join(["%s"] * len(theirs))
    with login(platform, dsn, "finpro_generate") as generating:
        query(generating, "update raw_users set name = 'again', phone_number = '1' where user_id in (1, 2, 4)")
    with connect(dsn) as connection, connection.cursor() as cursor:
        cursor.execute("delete from raw_users where user_id = 2")
        cursor.execute(f"insert into raw_users values ({values})", theirs)
    assert named(dsn) == {1, 3, 5, 6}
    assert held_in_postgres(dsn, [2, 4]) == Held(0, 0)

    query(dsn, "alter table raw_users disable trigger user")
    query(dsn, "update raw_users set email = 'again@example.com' where user_id = 4")
    query(dsn, "alter table raw_users enable trigger user")
    assert forget_in_postgres(dsn, [Forgotten(4, NOW)]) == Held(1, 0)
    assert named(dsn) == {1, 3, 5, 6}
    assert [(one.user_id, one.request, one.completed_at) for one in recorded(dsn)] == [(2, None, None), (4, "a ticket", None)]


def test_of_whom_nothing_is_known_nobody_is_forgotten(dsn: str) -> None:
    make(dsn, 3)
    query(dsn, "delete from raw_users where user_id = 3")
    with pytest.raises(ForgetError, match="Nothing is known of user 8, 9: "):
        forget_in_postgres(dsn, [Forgotten(user_id, NOW) for user_id in (1, 9, 8)])
    assert recorded(dsn) == []
    assert forget_in_postgres(dsn, [Forgotten(3, NOW)]) == Held(0, 0), "who was deleted may still be elsewhere"
    assert [person.user_id for person in recorded(dsn)] == [3]
