"""What a bucket remembers, against a dictionary; and that remembering does not cost more the more is remembered."""

from datetime import timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.former_rules import SIX
from streaming.rules.windows import spans
from streaming.screening import recent as recents
from streaming.screening.recent import NOTHING_RECENT, Recent, Segment, near, remembered, whole
from streaming.screening.state import in_todays_form
from streaming.screening.verdicts import RECENT_SCHEMA, Watermark


def orders(reasons: dict[int, int], second_of: dict[int, int]) -> pl.DataFrame:
    """Orders of these numbers with the reasons given, and their event times in seconds."""
    empty: dict[str, Any] = dict.fromkeys(RECENT_SCHEMA.names())
    rows = [
        empty
        | {"order_id": str(number), "product_id": number % 3, "given": str(given), "event_ts": second_of[number] * 1_000_000}
        for number, given in reasons.items()
    ]
    times = pl.Schema({**RECENT_SCHEMA, "event_ts": pl.Int64()})
    return pl.DataFrame(rows, times).cast({"event_ts": RECENT_SCHEMA["event_ts"]})


def as_dictionary(recent: Recent) -> dict[int, int]:
    return {int(order_id): int(given) for order_id, given in whole(recent).select("order_id", "given").iter_rows()}


@given(st.data())
def test_it_holds_each_order_once_as_it_was_last_and_none_that_is_too_old(data: st.DataObject) -> None:
    recent, model, second_of, oldest = NOTHING_RECENT, dict[int, int](), dict[int, int](), 0
    for batch in range(data.draw(st.integers(1, 12), label="micro-batches")):
        oldest = max(oldest, data.draw(st.integers(0, 20), label="oldest second"))
        arrivals = range(len(second_of), len(second_of) + data.draw(st.integers(0, 6), label="arrivals"))
        second_of |= {number: data.draw(st.integers(0, 25), label="second") for number in arrivals}
        revised = data.draw(st.sets(st.sampled_from(sorted(model))) if model else st.just(set()), label="revised")
        changes = dict.fromkeys(arrivals, 0) | {number: model[number] + 1 for number in revised}
        known = model | changes
        changed = orders(changes, second_of).with_columns(revision=pl.col("given") != "0")
        recent = remembered(recent, Watermark(), oldest * 1_000_000, changed, batch)
        model = {number: given for number, given in known.items() if second_of[number] >= oldest}
        assert as_dictionary(recent) == model
        assert recent.kept >= len(model)
        made = [segment.batch for segment in recent.segments]
        assert made == sorted(set(made)), "a row of screening_state holds what one micro-batch made of a bucket"
        asked = data.draw(st.sets(st.integers(0, 25)), label="asked for")
        arrivals_asked = orders(dict.fromkeys(asked, 0), {second: second for second in asked})
        found = {int(number) for number in near([recent], arrivals_asked, timedelta(seconds=2))["order_id"]}
        assert found == {
            number
            for number in model
            if (of_product := [second for second in asked if second % 3 == number % 3])
            and min(of_product) - 2 <= second_of[number] <= max(of_product) + 2
        }


def test_of_many_orders_those_near_are_found_by_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recents, "_MANY", 10)
    many = orders(dict.fromkeys(range(300), 0), {number: number % 60 for number in range(300)})
    many = many.with_columns(product_id=pl.int_range(300) * 7 % 50)
    segment = Segment(0, 0, revises=False, orders=many)
    for time, products in enumerate(([], [3], [3, 4, 49], [99], [])):
        wanted = spans(np.array(products, np.int64), np.full(len(products), 20_000_000), 5_000_000)
        held = segment.held_by(wanted)
        assert held.tolist() == wanted.hold(segment.keys, segment.events_us).tolist()
        assert held.any() == (products not in ([99], []))
        assert ("_by_key" in vars(segment)) == (time > 0)  # which pays from the second time on


def test_an_order_is_written_a_few_times_however_many_are_remembered() -> None:
    recent, remember, batches, size, written = NOTHING_RECENT, 200, 600, 10, 0
    for batch in range(batches):
        numbers = range(batch * size, (batch + 1) * size)
        changed = orders(dict.fromkeys(numbers, 0), dict.fromkeys(numbers, batch))
        recent = remembered(
            recent, Watermark(), (batch - remember) * 1_000_000, changed.with_columns(revision=pl.lit(value=False)), batch
        )
        assert len(recent.segments) <= 10
        assert sum(len(segment.orders) for segment in recent.segments) <= 2 * recent.kept + 1_000
        written += sum(len(segment.orders) for segment in recent.segments if segment.batch == batch)
    assert recent.kept == (remember + 1) * size
    assert written <= 8 * batches * size


def test_nothing_new_writes_nothing() -> None:
    changed = orders({1: 0}, {1: 1}).with_columns(revision=pl.lit(value=False))
    recent = remembered(NOTHING_RECENT, Watermark(), 0, changed, batch=0)
    assert [segment.batch for segment in remembered(recent, Watermark(), 0, changed.clear(), batch=1).segments] == [0]


def test_a_segment_of_format_1_has_its_reasons_by_name_and_its_evidence_in_one() -> None:
    """There each of the six rules was a bit, and had a column of evidence."""
    found = '{"order_ids":["a"],"value":"SG","limit":"ID"}'
    former = orders({1: 0, 2: 0}, {1: 1, 2: 1}).drop("given", "shadow", "evidence")
    former = former.with_columns(
        given=pl.Series([0b100010, 0], dtype=pl.UInt8),
        shadow=pl.Series([0b000100, 0], dtype=pl.UInt8),
        **{f"evidence_{name}": pl.lit(None, pl.String) for name in SIX},
    ).with_columns(
        evidence_foreign_country=pl.Series([found, None]),
        evidence_night_amount=pl.Series([found, None]),
        evidence_sequential_users=pl.Series([found, None]),
    )
    today = in_todays_form(former)
    assert today.schema == RECENT_SCHEMA
    assert today.select("given", "shadow").rows() == [("foreign_country,sequential_users", "night_amount"), ("", "")]
    assert today["evidence"].to_list() == [
        f'{{"foreign_country":{found},"night_amount":{found},"sequential_users":{found}}}',
        None,
    ]
