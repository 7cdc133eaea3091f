"""Rules that are proposed: which limits they keep, what the page shows, and the mistakes it names, of counts made by hand."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from typing import Any

import polars as pl
import pytest

from conf.rules import FraudRules
from streaming.history.backtest import Alike, figures
from streaming.history.proposal import HELD, MISSED, Limits, Mistake, Trial, dearest, shadowed
from streaming.history.proposal_page import render_proposal
from streaming.history.rescreening import Period
from streaming.rules.recorded import RulesInForce
from tests.runs.pages import Page

DAY, NEXT = date(2026, 11, 21), date(2026, 11, 22)
MOMENT = datetime(2026, 11, 21, 17, tzinfo=UTC)
DEAR = {"when": "amount_numeric > 5"}


def rules(version: str, **entries: Any) -> FraudRules:
    return FraudRules.model_validate({"version": version, "rules": entries})


def alike(
    orders: int, before: str = "", after: str = "", label: str = "", day: date = DAY, shadow: str = "", outcome: str = ""
) -> Alike:
    given, found, planted, watched = (frozenset(text.split()) for text in (before, after, label, shadow))
    return Alike(day, "v1", given, watched, found, frozenset(), planted, orders, orders * 1_000_000, outcome)


# In force 4 alerts, all labelled, on the first day. Proposed 5 on the first day and 6 on the second; 5 of the 7 new ones are
# labelled.
HISTORY = [
    alike(80, day=NEXT),
    alike(4, before="dear", after="dear", label="dear"),
    alike(1, after="new", label="any", shadow="new"),
    alike(4, after="new", label="any", day=NEXT, shadow="new"),
    alike(2, after="new", day=NEXT),
]
NONE = Limits(None, None)
IN_FORCE = rules("1", dear=DEAR, new=DEAR | {"mode": "shadow"})


def trial(history: Sequence[Alike] = HISTORY, limits: Limits = NONE, **changes: Any) -> Trial:
    proposed = rules("2", dear=DEAR, new=DEAR)
    found = figures(history, proposed.evaluated)
    watched = shadowed(proposed, IN_FORCE, [RulesInForce(MOMENT, IN_FORCE)], found.rules)
    return Trial(proposed, IN_FORCE, found, changes.pop("mistakes", []), watched, limits, **changes)


def test_alerts_a_day_are_the_mean_and_the_busiest_day_counts() -> None:
    tried = trial(capacity=5)
    assert (tried.alerts_a_day, tried.alerts_a_day_before) == (5.5, 2.0)
    assert tried.busiest == (NEXT, 6)
    assert tried.days_over_capacity == 1
    assert (tried.precision, tried.precision_of_new) == (9 / 11, 5 / 7)


@pytest.mark.parametrize(
    ("limits", "broken"),
    [
        (Limits(None, None), []),
        (Limits(6, 0.7), []),
        (Limits(5, None), ["--max-alerts 5: 6 alerts on 2026-11-22"]),
        (Limits(None, 0.75), ["--min-precision 0.75: 71.4% of the orders that become Fraud"]),
        (
            Limits(0, 0.9),
            [
                *("--max-alerts 0: 6 alerts on 2026-11-22", "--min-precision 0.9: 81.8% of all alerts"),
                "--min-precision 0.9: 71.4% of the orders that become Fraud",
            ],
        ),
    ],
)
def test_limits_hold_for_the_busiest_day_for_all_alerts_and_for_the_new_ones(limits: Limits, broken: list[str]) -> None:
    assert trial(limits=limits).broken == broken


def test_a_precision_that_nobody_knows_keeps_no_limit_and_without_an_alert_there_is_none() -> None:
    unlabelled = [alike(3, after="dear"), alike(5)]
    assert trial(unlabelled, Limits(None, 0.1)).broken == ["--min-precision 0.1: of no alert it is known what it was"]
    assert trial([alike(5)], Limits(None, 0.1)).broken == []


def test_without_labels_precision_is_that_of_the_reviewed_alerts() -> None:
    reviewed = [alike(5, after="new"), alike(3, after="new", outcome="fraud"), alike(1, after="new", outcome="genuine")]
    assert trial(reviewed, Limits(None, 0.75)).broken == []
    assert trial([*reviewed, alike(1, before="dear", after="dear", outcome="genuine")], Limits(None, 0.75)).broken == [
        "--min-precision 0.75: 60.0% of all alerts"
    ]
    assert trial([*reviewed, alike(1, label="dear", outcome="fraud")]).precision == 0


def test_a_rule_in_shadow_has_been_so_since_the_last_time_that_it_was_not() -> None:
    watched = rules("2", new=DEAR | {"mode": "shadow"})
    moments = [MOMENT + timedelta(hours=number) for number in range(4)]
    recorded = [
        RulesInForce(moments[0], watched),
        RulesInForce(moments[1], rules("1")),
        RulesInForce(moments[2], watched),
        RulesInForce(moments[3], watched.model_copy(update={"version": "3"})),
    ]
    effects = trial().found.rules
    [one] = shadowed(rules("4", new=DEAR), watched, recorded, effects)
    assert (one.rule, one.since, one.mode, one.effect.before.orders) == ("new", moments[2], "enforce", 5)
    assert shadowed(rules("4", new=DEAR | {"mode": "off"}), watched, recorded, effects) == []
    assert shadowed(rules("4", new=DEAR), watched, [], effects)[0].since is None


def test_the_dearest_of_each_kind_are_those_of_the_period_that_what_turned_out_or_the_verdict_in_force_speaks_against() -> None:
    def order(
        name: str, amount: int, reasons: str = "", before: str = "", label: str = "", day: int = 0, outcome: str = ""
    ) -> dict[str, Any]:
        said = {"order_id": name, "amount_numeric": amount, "event_ts": MOMENT + timedelta(days=day), "before": before}
        said |= {"outcome": outcome or ("fraud" if label else "")}
        said |= {"label": label, "reasons": reasons.split(), "user_id": 1, "product_id": 2, "quantity": 3, "country": "ID"}
        return said

    orders = pl.DataFrame(
        [
            *(order("held-1", 10, "new"), order("held-2", 30, "new dear"), order("held-3", 20, "new")),
            *(order("right", 99, "new", label="any"), order("known", 99, "new", before="dear"), order("honest", 99)),
            *(order("missed", 5, label="any"), order("let-go", 7, before="dear"), order("elsewhere", 99, "new", day=-1)),
            *(order("turned out", 99, "new", outcome="fraud"), order("cleared", 99, before="dear", outcome="genuine")),
            *(order("cleared, held", 40, "new", outcome="genuine"), order("turned out, missed", 9, outcome="fraud")),
        ],
        schema_overrides={"event_ts": pl.Datetime("us", "UTC"), "reasons": pl.List(pl.String)},
    )
    found = dearest(Period(MOMENT, None), 3)(orders)
    assert list(found.select("kind", "order_id", "reasons", "label").iter_rows()) == [
        *((HELD, "cleared, held", "new", "genuine"), (HELD, "held-2", "new,dear", ""), (HELD, "held-3", "new", "")),
        *((MISSED, "turned out, missed", "", "fraud"), (MISSED, "let-go", "dear", ""), (MISSED, "missed", "", "any")),
    ]


def shown(tried: Trial) -> Page:
    return Page(render_proposal(tried, "sari", MOMENT))


def test_the_page_shows_the_figures_the_changes_what_shadow_found_and_the_mistakes() -> None:
    mistakes = [
        Mistake(HELD, 30, MOMENT, "<script>", 1, 2, 3, "ID", "dear,new", ""),
        Mistake(MISSED, 7, MOMENT, "o2", 1, 2, 3, "ID", "", "any"),
    ]
    page = shown(trial(limits=Limits(5, None), capacity=5, mistakes=mistakes))
    assert page.parts["tile-alerts"].values == ["5.5", "2.0"]
    assert page.parts["tile-capacity"].values == ["5", "1", "2"]
    assert page.parts["tile-new"].values == [str(5 / 7), "7"]
    assert "--max-alerts 5: 6 alerts on 2026-11-22" in page.parts["limits"].text
    assert [[cell.text for cell in row] for row in page.body("changes")] == [
        ["changed rules.new", "mode", "shadow", "enforce"],
    ]
    [watched] = page.body("shadow")
    assert [watched[place].number for place in (2, 5, 6)] == [5, 7, 7]
    assert [row[0].text for row in page.body("held") + page.body("missed")] == ["<script>", "o2"]
    assert "script" not in page.tags
    assert page.addresses == ["data:,"]


def test_a_page_of_rules_that_change_nothing_says_so() -> None:
    same = replace(trial([alike(5)]), in_force=trial().rules, shadowed=[])
    page = shown(same)
    assert "Nothing but the version, comments and examples." in page.text
    assert "no limit was given" in page.parts["limits"].text
    assert "shadow" not in page.tables
