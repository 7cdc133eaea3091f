"""Rules that change while a query runs: what is taken up, what is refused, and which micro-batch goes by which."""

import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.errors import LakehouseError, RulesError
from conf.former_rules import NightAmount
from conf.lists import unpacked
from conf.rules import FraudRules, load_rules
from streaming.rules.live import LiveRules
from streaming.rules.recorded import RulesInForce, decode_rules, encode_rules, rules_at, with_rules
from tests.oracle.order_sets import rule_sets, six_rules

START = datetime(2026, 11, 1, tzinfo=UTC)


def version(number: int, *, above: int = 1) -> FraudRules:
    return six_rules(version=str(number), night_amount=NightAmount(above=above))


def hours(number: float) -> datetime:
    return START + timedelta(hours=number)


# --- the history --------------------------------------------------------------------------------------------------


def test_a_moment_goes_by_the_newest_rules_not_after_it_and_before_the_first_by_those() -> None:
    history = [RulesInForce(hours(1), version(1)), RulesInForce(hours(2), version(2))]
    assert [rules_at(history, hours(at)).version for at in (0, 1, 1.5, 2, 3)] == ["1", "1", "1", "2", "2"]


def test_the_same_rules_again_change_nothing_and_earlier_ones_may_come_back() -> None:
    history = with_rules([], version(1), hours(0))
    assert with_rules(history, version(1), hours(1)) == history
    back = with_rules(with_rules(history, version(2), hours(1)), version(1), hours(2))
    assert [(entry.since, entry.rules.version) for entry in back] == [(hours(0), "1"), (hours(1), "2"), (hours(2), "1")]


def test_a_version_stands_for_one_set_of_rules_for_ever() -> None:
    history = with_rules(with_rules([], version(1), hours(0)), version(2), hours(1))
    with pytest.raises(RulesError, match="version 1 was used before with other contents, since 2026-11-01 00:00 UTC"):
        with_rules(history, version(1, above=2), hours(2))


def test_a_clock_that_was_set_back_changes_no_order() -> None:
    history = with_rules(with_rules([], version(1), hours(5)), version(2), hours(1))
    assert history[1].since > history[0].since == hours(5)


@given(st.lists(rule_sets(), min_size=1, max_size=3))
def test_rules_survive_their_way_to_the_workers(drawn: list[FraudRules]) -> None:
    history = [RulesInForce(hours(number), rules) for number, rules in enumerate(drawn)]
    assert decode_rules(encode_rules(history)) == pickle.loads(pickle.dumps(history)) == history


def test_no_worker_parses_a_condition() -> None:
    """To import the parser costs each of them 0.4 s."""
    rules = pickle.dumps(FraudRules(version="1"))
    worker = "import pickle, sys, streaming.screening.pipeline; pickle.loads({}).conditions; print('sqlglot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", worker.format(rules)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- the file -----------------------------------------------------------------------------------------------------


@dataclass
class Live:
    """Live rules over a file, with a history in memory; remembers what was reported."""

    path: Path
    history: list[RulesInForce] = field(default_factory=list)
    told: list[tuple[str, ...]] = field(default_factory=list)
    fails: Callable[[], None] = lambda: None

    def record(self, rules: FraudRules, since: datetime) -> list[RulesInForce]:
        self.fails()
        self.history = with_rules(self.history, rules, since)
        return self.history

    def rules_taken_up(self, version: str) -> None:
        self.told.append(("taken up", version))

    def rules_refused(self, version: str, why: str) -> None:
        self.told.append(("refused", version, why))

    def start(self) -> LiveRules:
        return LiveRules(self.path, self.record, [self])


@pytest.fixture
def live(tmp_path: Path) -> Live:
    path = tmp_path / "rules.toml"
    path.write_text('version = "1"\n')
    return Live(path)


def write(live: Live, text: str) -> None:
    """Replace the file as an editor does, so that it differs whatever the clock's resolution."""
    fresh = live.path.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(live.path)


def looked(rules: LiveRules) -> None:
    for _ in range(3):
        rules.look()


def shipped(rules: LiveRules) -> str:
    """The version that the next micro-batch goes by."""
    with rules.fixed() as version:
        assert rules.of_version(version).version == version
        return version


def test_a_changed_file_is_taken_up_once_recorded_and_told(live: Live) -> None:
    rules = live.start()
    looked(rules)
    assert live.told == []
    write(live, 'version = "2"\nnight_amount.above = 7\n')
    looked(rules)
    assert live.told == [("taken up", "2")]
    assert [entry.rules for entry in live.history] == [rules.start, load_rules(live.path)]
    assert shipped(rules) == "2"


LISTING = """
version = "{version}"
[lists.countries]
file = "countries.csv"
[rules.bad]
when = "listed(country, 'countries')"
"""


def test_a_list_is_a_part_of_the_rules_that_are_recorded_and_is_watched_as_their_file_is(live: Live) -> None:
    rules, countries = live.start(), live.path.with_name("countries.csv")
    countries.write_text("value,reason,expiry\nSG,\n")
    write(live, LISTING.format(version=2))
    looked(rules)
    assert [one[:2] for one in live.told] == [("refused", "1")]
    assert "countries.csv, line 2: expected 3 fields" in live.told[0][2]
    countries.write_text("value,reason,expiry\nSG,of old,\n")
    looked(rules)
    assert live.told[1:] == [("taken up", "2")]
    countries.write_text("value,reason,expiry\nMY,of late,\n")
    looked(rules)
    assert "version 2 was used before with other contents" in live.told[2][2]
    write(live, LISTING.format(version=3))
    looked(rules)
    assert live.told[3:] == [("taken up", "3")]
    recorded = decode_rules(encode_rules(live.history))
    assert [unpacked(entry.rules.lists["countries"].content).values for entry in recorded[1:]] == [["SG"], ["MY"]]


def test_a_file_that_is_being_written_is_left_alone(live: Live) -> None:
    rules = live.start()
    write(live, 'version = "2"\n[night_am')
    rules.look()
    write(live, 'version = "2"\n')
    rules.look()
    assert live.told == []
    rules.look()
    assert live.told == [("taken up", "2")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('version = "2"\nnight_amount.above = -1\n', ["night_amount.above", "-1"]),
        ('version = "2"\nnight_amount.mode = "off"\n', ["night_amount.mode", "'enforce' or 'shadow'", "'off'"]),
        ("version = \n", ["not valid TOML"]),
        ("", ["version: missing"]),
        ('version = "1"\nnight_amount.above = 7\n', ["version 1 was used before with other contents"]),
        (None, ["Cannot read", "rules.toml"]),
    ],
    ids=["negative limit", "unknown mode", "not TOML", "empty", "version used before", "no file"],
)
def test_a_file_that_cannot_be_used_is_refused_once_and_the_old_rules_stay(
    live: Live, text: str | None, words: list[str]
) -> None:
    rules = live.start()
    if text is None:
        live.path.unlink()
    else:
        write(live, text)
    looked(rules)
    [(what, stays, why)] = live.told
    assert (what, stays) == ("refused", "1")
    assert all(word in why for word in words), why
    assert shipped(rules) == "1"
    assert len(live.history) == 1


def test_after_a_refusal_the_former_file_or_a_better_one_ends_it(live: Live) -> None:
    rules = live.start()
    write(live, "nonsense")
    looked(rules)
    write(live, 'version = "1"\n')
    looked(rules)
    write(live, 'version = "3"\n')
    looked(rules)
    assert [event[:2] for event in live.told] == [("refused", "1"), ("taken up", "1"), ("taken up", "3")]
    assert len(live.history) == 2


def test_rules_that_cannot_be_recorded_are_not_taken_up(live: Live) -> None:
    def no_lakehouse() -> None:
        raise LakehouseError("the lakehouse cannot be written")

    rules = live.start()
    live.fails = no_lakehouse
    write(live, 'version = "2"\n')
    looked(rules)
    assert live.told == [("refused", "1", "the lakehouse cannot be written")]
    assert shipped(rules) == "1"


def test_a_query_does_not_start_with_rules_that_it_cannot_record(live: Live) -> None:
    live.history = [RulesInForce(START, version(1, above=5))]
    with pytest.raises(RulesError, match="version 1 was used before"):
        live.start()


# --- micro-batches ------------------------------------------------------------------------------------------------


def test_a_micro_batch_that_is_done_again_gets_the_rules_that_it_had_and_unknown_ones_are_told(live: Live) -> None:
    live.history = [RulesInForce(hours(1), version(8)), RulesInForce(hours(2), version(9))]
    rules = live.start()
    assert shipped(rules) == "1"
    write(live, 'version = "2"\n')
    looked(rules)
    assert shipped(rules) == "2"
    assert [rules.of_version(known).version for known in ("8", "9", "1", "2")] == ["8", "9", "1", "2"]
    with pytest.raises(RulesError, match="version 7 of the rules, which this lakehouse does not know"):
        rules.of_version("7")


def test_no_micro_batch_starts_while_rules_are_being_taken_up(live: Live) -> None:
    """One whose time is after `since` would otherwise run without the rules that a replay of it would have."""
    rules = live.start()
    recording, go_on = threading.Event(), threading.Event()

    def slow_lakehouse() -> None:
        recording.set()
        assert go_on.wait(10)

    live.fails = slow_lakehouse
    write(live, 'version = "2"\n')
    looking = threading.Thread(target=looked, args=[rules])
    looking.start()
    assert recording.wait(10)
    found: list[str] = []
    batch = threading.Thread(target=lambda: found.append(shipped(rules)))
    batch.start()
    batch.join(0.2)
    assert found == []
    go_on.set()
    batch.join(10)
    looking.join(10)
    assert found == ["2"]
