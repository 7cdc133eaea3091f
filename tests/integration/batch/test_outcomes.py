"""`finpro outcomes add` and the table that it appends to, in a real Postgres."""

from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest

from batch.outcomes import Taken, add_file
from conf.settings import Settings, variable
from jobs.local.platform import Platform
from tests.conftest import own_warehouse
from tests.oracle.marts import insert_order
from tests.runs.commands import finpro
from tests.runs.exports import execute

HEADER = "order_id,outcome,reviewed_by,decided_at,reason\n"
NEWEST = """
    select distinct on (order_id) order_id, outcome from order_outcomes
    where decided_at <= %s order by order_id, decided_at desc, outcome_id desc
"""


@pytest.fixture(scope="module")
def database(platform: Platform) -> Iterator[Settings]:
    with own_warehouse(platform) as settings:
        insert_order(settings, "o1", "2026-11-01 10:00:00+00")
        yield settings


def add(settings: Settings, folder: Path, *lines: str) -> Taken:
    file = folder / "outcomes.csv"
    file.write_text(HEADER + "".join(f"{line}\n" for line in lines), encoding="utf-8")
    return add_file(settings.require("postgres_dsn"), file)


def test_a_correction_counts_from_its_moment_and_what_it_corrects_stays(database: Settings, tmp_path: Path) -> None:
    first = ("o1,fraud,Ana,2026-11-02T08:00:00Z,chargeback", "o2,genuine,Ana,2026-11-02T08:00:00Z,")
    assert add(database, tmp_path, *first) == Taken(2, 2, 1)
    assert add(database, tmp_path, *first, "o1,genuine,Budi,2026-11-05T08:00:00Z,withdrawn", first[0]) == Taken(4, 1, 1)
    assert execute(database, NEWEST, "2026-11-04") == [("o1", "fraud"), ("o2", "genuine")]
    assert execute(database, NEWEST, "2026-11-06") == [("o1", "genuine"), ("o2", "genuine")]
    assert len(execute(database, "select reason from order_outcomes where order_id = 'o1'")) == 2
    add(database, tmp_path, "o1,genuine,Ana,2026-11-07T08:00:00Z,", "o1,fraud,Budi,2026-11-07T08:00:00Z,")
    assert execute(database, NEWEST, "2026-11-08")[0] == ("o1", "fraud")  # of one moment the one that came later


@pytest.mark.parametrize(
    "statement",
    [
        "delete from order_outcomes",
        "truncate order_outcomes",
        "update order_outcomes set outcome = 'fraud'",
        "update order_outcomes set decided_at = now()",
    ],
)
def test_no_statement_can_be_taken_back(database: Settings, tmp_path: Path, statement: str) -> None:
    add(database, tmp_path, "o3,genuine,Ana,2026-11-02T08:00:00Z,")
    with pytest.raises(psycopg2.Error, match="a correction is one more statement"):
        execute(database, statement)


def test_the_command_takes_all_of_a_file_or_says_what_is_wrong_with_it(database: Settings, tmp_path: Path) -> None:
    dsn = {variable("postgres_dsn"): database.require("postgres_dsn")}
    file = tmp_path / "outcomes.jsonl"
    line = '{"order_id": "o4", "outcome": "fraud", "reviewed_by": "Ana", "decided_at": "2026-11-02T08:00:00Z"}\n'
    file.write_text(line + line.replace("fraud", "perhaps"), encoding="utf-8")
    ended = finpro("outcomes", "add", str(file), **dsn)
    assert ended.returncode == 18
    assert "1 of 2 statements break the contract, so none was taken:\n  line 2: " in ended.stderr
    assert execute(database, "select from order_outcomes where order_id = 'o4'") == []
    file.write_text(line, encoding="utf-8")
    ended = finpro("outcomes", "add", str(file), **dsn)
    assert ended.stdout == "1 of 1 statements taken; 1 are about orders that raw_orders does not hold\n"
    assert execute(database, "select outcome, source from order_outcomes where order_id = 'o4'") == [("fraud", "file")]
