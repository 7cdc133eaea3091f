"""Versions of the rules: what differs between two, which were in force, and one under another name. Without a service."""

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given

from conf.errors import RulesError
from conf.lists import Entries, packed
from conf.rules import FraudRules
from conf.settings import CONF_DIR
from streaming.rules.content import Content
from streaming.rules.differences import ADDED, CHANGED, REMOVED, differences, in_words
from streaming.rules.promotion import history, of_version, of_version_or_file, renamed, require_own_version, told
from streaming.rules.proposals import Promotion
from streaming.rules.recorded import RulesInForce
from tests.oracle.order_sets import rule_sets
from tests.runs.commands import finpro

START = datetime(2026, 11, 1, tzinfo=UTC)
DEAR = {"when": "amount_numeric > 5"}
SPREE = {"by": ["product_id"], "count": {"at_least": 3, "within": "10 s"}}


def rules(version: str, **entries: Any) -> FraudRules:
    return FraudRules.model_validate({"version": version, "rules": entries})


def hours(number: float) -> datetime:
    return START + timedelta(hours=number)


def promoted(number: int, version: str, at: float, despite: str | None = None) -> Promotion:
    content = Content(f'version = "{version}"\n[rules]\n')
    return Promotion(number, 1, version, content, None, hours(at), "sari", "because", despite)


# --- what differs -----------------------------------------------------------------------------------------------------


def test_what_differs_is_told_by_rule_and_field() -> None:
    before = rules("1", dear=DEAR, spree=SPREE, gone=DEAR)
    after = rules("2", dear=DEAR | {"mode": "shadow"}, spree=SPREE | {"count": {"at_least": 4, "within": "1 min"}}, new=DEAR)
    after = after.model_copy(update={"lateness": timedelta(minutes=1)})
    found = differences(before, after)
    assert [(one.kind, one.entry, one.field, one.before, one.after) for one in found] == [
        (CHANGED, "", "lateness", "30 s", "1 min"),
        (CHANGED, "rules.dear", "mode", "enforce", "shadow"),
        (REMOVED, "rules.gone", "mode", "enforce", None),
        (REMOVED, "rules.gone", "when", "amount_numeric > 5", None),
        (ADDED, "rules.new", "mode", None, "enforce"),
        (ADDED, "rules.new", "when", None, "amount_numeric > 5"),
        (CHANGED, "rules.spree", "count.at_least", "3", "4"),
        (CHANGED, "rules.spree", "count.within", "10 s", "1 min"),
    ]
    assert in_words(found)[:5] == [
        *("lateness: 30 s -> 1 min", "changed rules.dear", "  mode: enforce -> shadow"),
        *("removed rules.gone", "  mode: enforce"),
    ]


@given(rule_sets(), rule_sets())
def test_nothing_differs_between_two_versions_of_the_same_and_something_between_others(
    one: FraudRules, other: FraudRules
) -> None:
    other = other.model_copy(update={"version": "other"})
    assert differences(one, one.model_copy(update={"version": "other"})) == []
    assert bool(differences(one, other)) == (one.model_copy(update={"version": "other"}) != other)


# --- the history ------------------------------------------------------------------------------------------------------


def test_of_a_list_it_is_told_how_many_values_it_has_and_that_they_are_others() -> None:
    def blocking(*values: str) -> FraudRules:
        content = packed(Entries(list(values), ["stolen"] * len(values), [None] * len(values)))
        return FraudRules.model_validate({"version": "1", "lists": {"blocked": {"file": "b.csv", "content": content}}})

    entry, told_of = in_words(differences(blocking("a", "b"), blocking("a", "c")))
    assert entry == "changed lists.blocked"
    assert re.fullmatch(r"  values: 2 \(\w{12}\) -> 2 \(\w{12}\)", told_of)


def test_what_a_list_suppresses_is_told() -> None:
    def allowing(*reasons: str) -> FraudRules:
        known = {
            "file": "k.csv",
            "allows": {"by": "user_id", "reasons": reasons},
            "content": packed(Entries(["7"], [""], [None])),
        }
        rules = {name: {"when": "true"} for name in ("dear", "far")}
        return FraudRules.model_validate({"version": "1", "lists": {"known": known}, "rules": rules})

    found = in_words(differences(allowing("dear"), allowing("dear", "far")))
    assert found == ["changed lists.known", '  allows.reasons: ["dear"] -> ["dear", "far"]']


def test_a_version_belongs_to_the_promotion_that_it_was_taken_up_after_and_others_were_written_by_hand() -> None:
    recorded = [RulesInForce(hours(at), rules(version)) for at, version in ((0, "1"), (2, "2"), (3, "1"), (4, "2"))]
    found = history(recorded, [promoted(1, "2", 1.9), promoted(2, "3", 5)])
    assert [(one.rules.version, one.promotion and one.promotion.number, one.taken_up) for one in found] == [
        *(("1", None, True), ("2", 1, True), ("1", None, True), ("2", None, True), ("3", 2, False)),
    ]
    lines = told(found).splitlines()
    assert lines[0] == "2026-11-01 00:00:00 UTC  1  -     (the file was written by hand)"
    assert lines[1] == "2026-11-01 02:00:00 UTC  2  sari  because"
    assert lines[4] == "2026-11-01 05:00:00 UTC  3  sari  because (not taken up by screening)"


def test_a_promotion_of_other_comments_only_is_no_version_that_screening_missed() -> None:
    found = history([RulesInForce(hours(0), rules("1"))], [promoted(1, "1", 5, despite="it was late")])
    assert [one.taken_up for one in found] == [True, True]
    assert told(found).splitlines()[1].endswith("because (despite its limits: it was late)")


def test_of_an_empty_history_it_is_said_who_writes_it() -> None:
    assert "finpro screen" in told([])


def test_a_name_is_that_of_a_version_or_of_a_file_or_the_versions_are_named() -> None:
    versions = history([RulesInForce(hours(0), rules("1", dear=DEAR))], [])
    assert of_version("1", versions) == rules("1", dear=DEAR)
    assert of_version_or_file(str(CONF_DIR / "fraud_rules.toml"), versions).names
    with pytest.raises(RulesError, match="2 is no version of the history: 1"):
        of_version_or_file("2", versions)


def test_a_version_that_was_used_for_other_rules_is_refused() -> None:
    require_own_version(rules("1", dear=DEAR), [rules("1", dear=DEAR), rules("2")])
    with pytest.raises(RulesError, match="version 1 was used before with other contents"):
        require_own_version(rules("1", dear=DEAR), [rules("2"), rules("1")])


# --- another name -----------------------------------------------------------------------------------------------------


def test_under_another_name_a_file_keeps_its_comments_and_its_rules() -> None:
    content = Content.read(CONF_DIR / "fraud_rules.toml")
    other = renamed(content, 'a "new" one')
    assert other.rules == content.rules.model_copy(update={"version": 'a "new" one'})
    changed = [pair for pair in zip(content.text.splitlines(), other.text.splitlines(), strict=True) if pair[0] != pair[1]]
    assert [line for _, line in changed] == ['version = "a \\"new\\" one"']


def test_a_file_that_gives_its_version_in_another_way_is_written_anew() -> None:
    content = Content('"version" = "1"\n[rules.dear]\nwhen = "amount_numeric > 5"\n')
    assert renamed(content, "2").rules == rules("2", dear=DEAR)


@pytest.mark.parametrize("name", ["", "x" * 65])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(RulesError, match="version: "):
        renamed(Content.read(CONF_DIR / "fraud_rules.toml"), name)


# --- who and why ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [" ", "two\nlines", "\udcff", "nothing\0"])
@pytest.mark.parametrize("option", ["--why", "--by", "--despite"])
def test_words_that_a_record_cannot_keep_are_refused_before_anything_is_looked_at(option: str, words: str) -> None:
    options = {"--why": "because", "--by": "sari", option: words}
    done = finpro("rules", "promote", "no-such.toml", *(part for pair in options.items() for part in pair))
    assert (done.returncode, f"{option} says nothing that can be kept" in done.stderr) == (2, True)


def test_a_reason_has_to_be_given() -> None:
    assert "--why" in finpro("rules", "promote", "no-such.toml").stderr
    assert finpro("rules", "revert").returncode == 2
    applied = finpro("rules", "apply", "--since", "2026-11-01")
    assert (applied.returncode, "--why is missing" in applied.stderr) == (2, True)
