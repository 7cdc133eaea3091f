"""The demo: its steps hold together, and a count that disagrees is an error. What it does is shown by running it."""

import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from graphlib import TopologicalSorter

import pytest

from conf.errors import ReconciliationError
from jobs.demo import Flow, check
from streaming.shop.accounting import Account
from streaming.shop.producer import ProduceReport

SENT = ProduceReport(
    orders=90,
    labels={"foreign_country": 4},
    planted=4,
    duplicates=3,
    broken={"cut_short": 2, "empty": 1},
    seconds=1,
    behind_seconds=0,
    start=datetime(2026, 11, 22, tzinfo=UTC),
    interrupted=False,
)
FOUND = Account(
    messages=192,
    orders=180,
    duplicates=6,
    dead_letters=6,
    dead_letter_reasons={},
    genuine=172,
    frauds=8,
    found={},
    planted={},
    missing_orders=0,
    missing_dead_letters=0,
    surplus_dead_letters=0,
    missing_labels=0,
    wrong_verdicts=0,
)


def test_what_each_step_waits_for_is_reached_by_another() -> None:
    steps = Flow(orders=1, rate=0, seed=1).steps()
    reached = {name for step in steps for name in (step.name, *step.reaches)}
    assert {name for step in steps for name in step.after} <= reached
    TopologicalSorter({step.name: step.after for step in steps}).prepare()


def test_nothing_is_built_on_what_has_not_passed_the_gate() -> None:
    after = {step.name: step.after for step in Flow(orders=1, rate=0, seed=1).steps()}
    assert "validate" in after["transform"]
    assert "reconcile" in after["validate"]


def test_counts_that_agree_are_no_error() -> None:
    check([SENT, SENT], FOUND)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (replace(FOUND, orders=179), "orders: 180 sent, 179 found"),
        (replace(FOUND, dead_letters=5, missing_dead_letters=1), "dead letters: 6 sent, 5 found\n  missing dead letters: 1"),
        (replace(FOUND, wrong_verdicts=2), "wrong verdicts: 2"),
    ],
)
def test_a_count_that_disagrees_is_an_error_that_names_it(found: Account, says: str) -> None:
    with pytest.raises(ReconciliationError, match=says):
        check([SENT, SENT], found)


def test_what_is_cut_off_when_all_has_ended_prints_nothing() -> None:
    code = "import logging; from jobs.demo import Flow\nwith Flow(1000, 1, 1): pass\nlogging.error('of a call that is cut off')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
