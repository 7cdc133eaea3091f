"""The load without BigQuery: jobs that exist already, which runs belong before which, and the statements themselves."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any, cast

import pytest
from google.api_core.exceptions import BadRequest, Conflict, NotFound
from google.cloud import bigquery

from batch.warehouse.bigquery import delete_doubles_statement, delete_statement, merge_statement, missing_runs
from batch.warehouse.bigquery_jobs import run_once
from batch.warehouse.days import ranges, within
from batch.warehouse.manifest import Column, Manifest, TableExport
from batch.warehouse.tables import LoadedRun
from conf.errors import LoadError
from tests.oracle.googlesql import GoogleSql, Refused

DAYS = ranges([date(2026, 11, 2), date(2026, 10, 31), date(2026, 11, 1)])
NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)


@dataclass
class FakeJob:
    """A job of the project's history; one that is running ends when somebody waits for it."""

    job_id: str
    state: str = "DONE"
    error_result: dict[str, str] | None = None
    waited: bool = False

    def result(self) -> None:
        self.waited, self.state = True, "DONE"
        if self.error_result:
            raise BadRequest(self.error_result["message"])  # type: ignore[no-untyped-call]


@dataclass
class FakeProject:
    """BigQuery's job ids: a second job of one id is a conflict. `hidden` jobs are found only after that."""

    jobs: dict[str, FakeJob] = field(default_factory=dict)
    hidden: set[str] = field(default_factory=set)
    submitted: list[str] = field(default_factory=list)
    failure: dict[str, str] | None = None

    def get_job(self, job_id: str, location: str) -> FakeJob:
        assert location == "EU"
        if job_id in self.hidden or job_id not in self.jobs:
            raise NotFound(job_id)  # type: ignore[no-untyped-call]
        return self.jobs[job_id]

    def submit(self, job_id: str) -> Any:
        self.submitted.append(job_id)
        if job_id in self.jobs:
            self.hidden.discard(job_id)
            raise Conflict(job_id)  # type: ignore[no-untyped-call]
        self.jobs[job_id] = FakeJob(job_id, "RUNNING", self.failure)
        return self.jobs[job_id]

    def run_once(self, *, counts: bool) -> Any:
        return run_once(cast("bigquery.Client", self), "EU", "load", self.submit, counts=lambda: counts)


def project(*jobs: FakeJob, **state: Any) -> FakeProject:
    return FakeProject({job.job_id: job for job in jobs}, **state)


FAILED = {"reason": "invalid", "message": "no such file"}


def test_a_job_that_is_new_is_submitted_under_its_own_name() -> None:
    new = project()
    assert new.run_once(counts=True).job_id == "load_1"
    assert new.jobs["load_1"].waited


def test_a_job_that_has_succeeded_is_not_submitted_again() -> None:
    done = project(FakeJob("load_1"))
    assert done.run_once(counts=True).job_id == "load_1"
    assert done.submitted == []


def test_a_job_whose_result_is_gone_is_submitted_under_the_next_name() -> None:
    gone = project(FakeJob("load_1"))
    assert gone.run_once(counts=False).job_id == "load_2"
    assert gone.submitted == ["load_2"]


def test_a_job_that_runs_is_waited_for() -> None:
    running = project(FakeJob("load_1", "RUNNING"))
    assert running.run_once(counts=False).job_id == "load_1"
    assert running.jobs["load_1"].waited
    assert running.submitted == []


def test_after_a_job_that_failed_the_next_is_submitted() -> None:
    failed = project(FakeJob("load_1", error_result=FAILED), FakeJob("load_2", "RUNNING", FAILED))
    assert failed.run_once(counts=True).job_id == "load_3"
    assert failed.submitted == ["load_3"]


@pytest.mark.parametrize("state", ["RUNNING", "DONE"])
def test_a_conflict_means_that_another_process_has_submitted_the_job(state: str) -> None:
    overtaken = project(FakeJob("load_1", state), hidden={"load_1"})
    assert overtaken.run_once(counts=True).job_id == "load_1"
    assert overtaken.submitted == ["load_1"]
    assert overtaken.jobs["load_1"].waited


def test_a_conflict_with_a_job_that_failed_leads_to_the_next() -> None:
    overtaken = project(FakeJob("load_1", "RUNNING", FAILED), hidden={"load_1"})
    assert overtaken.run_once(counts=True).job_id == "load_2"


def test_a_job_that_fails_says_what_bigquery_said() -> None:
    with pytest.raises(LoadError, match="BigQuery job load_1 failed: no such file"):
        project(failure=FAILED).run_once(counts=True)


ORDERS = TableExport(
    table="raw_orders",
    key=["order_id"],
    columns=[
        Column("order_id", "STRING"),
        Column("created_date", "TIMESTAMP"),
        Column("reasons", "ARRAY<STRING>"),
        Column("change_xid", "INT64"),
    ],
    files=[],
    rows=0,
    source_rows=0,
    source_profile={},
)


def run(number: int, *, since: int | None, epoch: str = "e", run_id: str | None = None) -> Manifest:
    """Run `number`, an hour after the one before it, which builds on run `since`; None: it is full."""
    return Manifest(
        run_id=run_id or f"run{number}",
        full=since is None,
        since_xid=since,
        snapshot="",
        xmin=10 * number,
        started_at=NOON + timedelta(hours=number),
        finished_at=NOON + timedelta(hours=number, minutes=1),
        oldest_transaction_seconds=0,
        tables=[ORDERS],
        database="a",
        number=number,
        since_number=since,
        epoch=epoch,
    )


def loaded(manifest: Manifest) -> LoadedRun:
    return LoadedRun(manifest.run_id, manifest.number, manifest.database, manifest.epoch, manifest.finished_at, complete=True)


FULL, SECOND, THIRD = run(1, since=None), run(2, since=1), run(3, since=2)


def ids(wanted: Manifest, held: Manifest | None, *earlier: Manifest) -> list[str]:
    def newest_first() -> Iterator[Manifest]:
        yield from reversed(earlier)

    return [manifest.run_id for manifest in missing_runs(wanted, loaded(held) if held else None, newest_first)]


def test_every_run_back_to_a_full_one_is_loaded_into_an_empty_warehouse() -> None:
    assert ids(THIRD, None, run(0, since=None), FULL, SECOND) == ["run1", "run2", "run3"]


def test_only_the_runs_after_the_newest_loaded_one_are_loaded() -> None:
    assert ids(THIRD, FULL, FULL, SECOND) == ["run2", "run3"]
    assert ids(THIRD, SECOND, FULL, SECOND) == ["run3"]


def test_a_full_run_needs_none_before_it() -> None:
    assert ids(run(3, since=None), FULL, FULL, SECOND) == ["run3"]


def test_a_run_needs_only_those_up_to_the_one_that_it_builds_on() -> None:
    assert ids(run(3, since=1), FULL, FULL, SECOND) == ["run3"]
    assert ids(run(3, since=1), SECOND, FULL, SECOND) == ["run3"]


@pytest.mark.parametrize("wanted", [FULL, SECOND])
def test_a_run_that_is_held_already_is_not_loaded(wanted: Manifest) -> None:
    assert ids(wanted, SECOND) == []


@pytest.mark.parametrize(
    ("held", "earlier"),
    [(FULL, [FULL]), (None, [SECOND]), (None, [])],
    ids=["the run between is gone", "the full run is gone", "all are gone"],
)
def test_a_run_whose_predecessor_is_gone_is_not_loaded(held: Manifest | None, earlier: list[Manifest]) -> None:
    with pytest.raises(LoadError, match="builds on a run that is neither loaded nor to be found any more"):
        ids(THIRD, held, *earlier)


def test_a_run_of_another_epoch_is_not_built_upon_whatever_its_number() -> None:
    full, after_it = run(2, since=None, epoch="restored"), run(3, since=1, epoch="restored")
    assert ids(run(3, since=2, epoch="restored"), FULL, FULL, full) == ["run2", "run3"]
    with pytest.raises(LoadError, match="builds on a run that is neither loaded nor to be found any more"):
        ids(after_it, FULL, FULL)


def test_a_run_of_an_earlier_version_is_not_loaded_any_more() -> None:
    old, older = run(0, since=None, epoch="", run_id="old"), run(0, since=None, epoch="", run_id="older")
    assert ids(old, old) == []
    for held in (None, older):
        with pytest.raises(LoadError, match="Run old was made by an earlier version of finpro: `finpro export` makes one"):
            ids(old, held)
    assert ids(FULL, old, old) == ["run1"]


def test_bigquery_accepts_the_statements_that_change_a_raw_table() -> None:
    columns = {column.name: column.type.lower() for column in ORDERS.columns}
    google_sql = GoogleSql(
        {
            "raw_orders": columns | {"loaded_run": "int64"},
            "staging": columns,
            "deleted": {"order_id": "string", "day": "date"},
            "loaded_runs": {"number": "int64"},
        }
    )
    for manifest, days in itertools.product((FULL, SECOND), (None, DAYS)):
        google_sql.check(merge_statement("raw_orders", "staging", "loaded_runs", manifest, ORDERS, days))
        google_sql.check(delete_statement("raw_orders", "deleted", manifest, ORDERS, days))
    google_sql.check(delete_doubles_statement("raw_orders", ORDERS))
    with pytest.raises(Refused, match="staged_elsewhere"):
        google_sql.check(merge_statement("raw_orders", "staged_elsewhere", "loaded_runs", FULL, ORDERS, None))


def test_only_a_full_run_deletes_what_it_does_not_bring() -> None:
    full, second = (merge_statement("raw", "staging", "loaded_runs", each, ORDERS, None) for each in (FULL, SECOND))
    assert "not matched by source and coalesce(stored.`loaded_run`, 0) < 1 then delete" in full
    assert "delete" not in second


def test_a_merge_names_its_days_by_constants_on_both_sides_and_where_it_deletes() -> None:
    statement = merge_statement("raw", "staging", "loaded_runs", FULL, ORDERS, DAYS)
    named = "between timestamp '2026-10-31 00:00:00+00' and timestamp '2026-11-02 23:59:59.999999+00'"
    assert [statement.count(f"{side}.`created_date` {named}") for side in ("stored", "staged")] == [2, 1]


def test_scattered_days_become_at_most_a_hundred_ranges_which_hold_them_all() -> None:
    days = [date(2000, 1, 1) + timedelta(days=3 * number + number % 2) for number in range(2_000)]
    found = ranges(days)
    assert len(found) == 100
    weekly = [date(2020, 1, 1) + timedelta(days=7 * number) for number in range(102)]
    assert sum((last - first).days + 1 for first, last in ranges(weekly)) == 102 + 2 * 6  # two of many equal gaps are closed
    assert all(any(first <= day <= last for first, last in found) for day in days)
    assert all(before < after for (_, before), (after, _) in itertools.pairwise(found))
    assert ranges(days[:100]) == [(day, day) for day in days[:100]]
    assert ranges([date.max, date(2026, 1, 2), date(2026, 1, 1), date.min]) == [
        (date.min, date.min),
        (date(2026, 1, 1), date(2026, 1, 2)),
        (date.max, date.max),
    ]


def test_no_days_are_no_row() -> None:
    assert within("at", "timestamp", ranges([])) == "false"
