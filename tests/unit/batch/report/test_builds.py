"""Which days a build takes, and in how many parts."""

from datetime import date, timedelta

import pytest

from batch.warehouse.days import ranges, within
from jobs.transform import Part, in_parts

DAY = date(2026, 11, 1)
DAYS = [DAY + timedelta(days=number) for number in range(5)]


def test_days_that_follow_each_other_are_one_stretch_up_to_the_ends_of_the_calendar() -> None:
    assert ranges([], most=None) == []
    assert ranges([date.min, *DAYS[:3], DAYS[4], date.max], most=None) == [
        (date.min, date.min),
        (DAYS[0], DAYS[2]),
        (DAYS[4], DAYS[4]),
        (date.max, date.max),
    ]


def test_a_condition_holds_for_whole_days_and_for_none_where_there_are_none() -> None:
    of_a_day = "(at between timestamp '2026-11-01 00:00:00+00' and timestamp '2026-11-01 23:59:59.999999+00')"
    assert within("at", "timestamp", ranges([DAY], most=None)) == of_a_day
    assert within("at", "timestamp", ranges([], most=None)) == "false"


def test_what_is_written_day_by_day_keeps_each_gap_however_many_there_are() -> None:
    every_other = [DAY + timedelta(days=2 * number) for number in range(300)]
    assert ranges(every_other, most=None) == [(day, day) for day in every_other]


def test_no_part_has_more_days_than_a_job_may_change_and_the_first_of_all_days_makes_the_tables_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("jobs.transform.MOST_DAYS", 2)
    two, two_more, rest = DAYS[:2], DAYS[2:4], DAYS[4:]
    assert in_parts(DAYS, every_day=True) == [
        Part(two, anew=True, last=False),
        Part(two_more, anew=False, last=False),
        Part(rest, anew=False, last=True),
    ]
    assert [part.anew for part in in_parts(DAYS, every_day=False)] == [False] * 3
    assert in_parts(two, every_day=True) == [Part(None, anew=True, last=True)]
    assert in_parts([], every_day=True) == [Part(None, anew=True, last=True)]
    assert in_parts([], every_day=False) == [Part([], anew=False, last=True)]
