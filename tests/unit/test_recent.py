"""What a bucket remembers, against a dictionary; and that remembering does not cost more the more is remembered."""

from typing import Any
from unittest.mock import Mock

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.chunks import pack_table
from streaming.recent import NOTHING_RECENT, Recent, recalled, remembered
from streaming.screening import RECENT_SCHEMA, Frontier


def orders(reasons: dict[int, int], second_of: dict[int, int]) -> pl.DataFrame:
    """Orders of these numbers with the reasons given, and their event times in seconds."""
    empty: dict[str, Any] = dict.fromkeys(RECENT_SCHEMA.names())
    rows = [
        empty | {"order_id": str(number), "given": given, "event_ts": second_of[number] * 1_000_000}
        for number, given in reasons.items()
    ]
    times = pl.Schema({**RECENT_SCHEMA, "event_ts": pl.Int64()})
    return pl.DataFrame(rows, times).cast({"event_ts": RECENT_SCHEMA["event_ts"]})


def as_dictionary(recent: Recent) -> dict[int, int]:
    return {int(order_id): given for order_id, given in recalled(recent).select("order_id", "given").iter_rows()}


@given(st.data())
def test_it_holds_each_order_once_as_it_was_last_and_none_that_is_too_old(data: st.DataObject) -> None:
    recent, model, second_of, oldest = NOTHING_RECENT, dict[int, int](), dict[int, int](), 0
    for _ in range(data.draw(st.integers(1, 12), label="micro-batches")):
        oldest = max(oldest, data.draw(st.integers(0, 20), label="oldest second"))
        arrivals = range(len(second_of), len(second_of) + data.draw(st.integers(0, 6), label="arrivals"))
        second_of |= {number: data.draw(st.integers(0, 25), label="second") for number in arrivals}
        revised = data.draw(st.sets(st.sampled_from(sorted(model))) if model else st.just(set()), label="revised")
        changes = dict.fromkeys(arrivals, 0) | {number: model[number] + 1 for number in revised}
        known = model | changes
        changed = orders(changes, second_of).with_columns(revision=pl.col("given") > 0)
        recent = remembered(recent, Frontier(), oldest * 1_000_000, orders(known, second_of), changed)
        model = {number: given for number, given in known.items() if second_of[number] >= oldest}
        assert as_dictionary(recent) == model
        assert recent.kept == len(model)


def test_an_order_is_packed_a_few_times_however_many_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = Mock(wraps=pack_table)
    monkeypatch.setattr("streaming.recent.pack_table", pack)
    recent, remember, batches, size = NOTHING_RECENT, 200, 600, 10
    for batch in range(batches):
        second_of = {number: number // size for number in range(max(0, (batch - remember) * size), (batch + 1) * size)}
        known = orders(dict.fromkeys(second_of, 0), second_of)
        changed = known.tail(size).with_columns(revision=pl.lit(value=False))
        recent = remembered(recent, Frontier(), (batch - remember) * 1_000_000, known, changed)
        assert len(recent.segments) <= 10
        assert sum(segment.rows for segment in recent.segments) <= 2 * recent.kept + 1_000
    assert recent.kept == (remember + 1) * size
    assert sum(len(call.args[0]) for call in pack.call_args_list) <= 8 * batches * size
