"""Rules whose patterns have orders of several products: a second division, whose findings join the first one's."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.rules import FraudRules
from streaming.contract import NO_DEAD_LETTERS, NO_ORDERS
from streaming.history.rescreening import rescreened_tables
from streaming.screening.chunks import Arrivals, pack_arrivals, unpack_arrivals
from streaming.screening.division import KEY, By, Division, keys_of
from streaming.screening.pipeline import read_arrivals, screen_across, screen_arrivals
from streaming.screening.recent import NOTHING_RECENT, Recent, whole
from streaming.screening.state import MicroBatch
from streaming.screening.verdicts import decode_evidence, taking_part_across
from tests.oracle.brute_force import LONG_AFTER, Message, judge
from tests.oracle.order_sets import micro_batches, order_sets
from tests.unit.streaming.screening.test_screening import as_batch

NOON = datetime(2026, 11, 1, 5, tzinfo=UTC)
BY = (["user_id"], ["country"], ["user_id", "quantity"], ["country", "quantity"], ["source"], ["local_hour"], ["amount"])
CONDITIONS = (None, "quantity > 1", "country = 'ID' and amount_numeric > 1250000", "local_hour < 4")


@st.composite
def rules_across(draw: st.DrawFn) -> dict[str, Any]:
    """Some rules whose orders need not share a product."""
    rules = dict[str, Any]()
    for number in range(draw(st.integers(1, 3))):
        within = draw(st.sampled_from((5, 10, 3_600, 86_400)))
        form: dict[str, Any] = draw(
            st.sampled_from(
                (
                    {"count": {"at_least": 3, "within": within}},
                    {"distinct": {"of": "product_id", "at_least": 2, "within": within}},
                    {"consecutive": {"of": "user_id", "at_least": 2, "within": within}},
                    {"sum": {"of": "amount_numeric", "at_least": 3_750_000, "within": within}},
                )
            )
        )
        when, mode = draw(st.sampled_from(CONDITIONS)), draw(st.sampled_from(("enforce", "enforce", "shadow", "off")))
        rules[f"across_{number}"] = form | {"by": draw(st.sampled_from(BY)), "when": when, "mode": mode}
    return rules


def with_rules(rules: FraudRules, further: dict[str, Any]) -> FraudRules:
    """The rules, and these entries."""
    return FraudRules.model_validate(rules.model_dump() | {"rules": {**rules.model_dump()["rules"], **further}})


@dataclass
class Stream:
    """Both divisions, with a dictionary in the place of Postgres: reasons add up."""

    rules: FraudRules
    buckets: int
    main: dict[int, Recent] = field(default_factory=dict)
    across: dict[tuple[str, int], Recent] = field(default_factory=dict)
    reasons: dict[str, set[str]] = field(default_factory=dict)
    shadow: dict[str, set[str]] = field(default_factory=dict)
    gained: list[tuple[str, str]] = field(default_factory=list)
    batches: int = 0

    def feed(self, messages: Sequence[Message]) -> None:
        """One micro-batch, whose orders of odd and even products are accepted by two tasks."""
        arrivals = [
            read_arrivals(as_batch([message for message in messages if message.partition == partition]), self.rules, LONG_AFTER)
            for partition in sorted({message.partition for message in messages})
        ]
        batch = MicroBatch("query", Division(By.PRODUCT, 2), self.batches)
        accepted = [self._accepted(batch, bucket, arrivals) for bucket in range(2)]
        for of, rules in self.rules.across_products.items():
            for bucket in range(self.buckets):
                self._across(batch, of, rules, bucket, accepted)
        self.batches += 1

    def _accepted(self, batch: MicroBatch, bucket: int, arrivals: Sequence[Arrivals]) -> Arrivals:
        own = [
            one._replace(orders=one.orders.filter(pl.Series(batch.division.bucket_of(one.orders) == bucket)))
            for one in arrivals
        ]
        recents = {bucket: self.main.get(bucket, NOTHING_RECENT)}
        outcome = screen_arrivals(own, recents, batch, LONG_AFTER, self.rules.within_products, None)
        self.main |= outcome.recents
        self._add(outcome.verdicts)
        reads = [read for one in arrivals for read in one.reads]
        return Arrivals(reads, outcome.verdicts.remove("revision"), NO_DEAD_LETTERS)

    def _across(self, batch: MicroBatch, of: str, rules: FraudRules, bucket: int, accepted: Sequence[Arrivals]) -> None:
        division = Division(By.FIELD, self.buckets, of)
        shares = []
        for one in accepted:
            orders = taking_part_across(one.orders, rules, of)
            own = orders.filter(pl.Series(division.bucket_of(orders) == bucket))
            shares.append(unpack_arrivals(pack_arrivals(one._replace(orders=own))))
        recents = {bucket: self.across.get((of, bucket), NOTHING_RECENT)}
        outcome = screen_across(shares, recents, batch._replace(division=division), LONG_AFTER, rules, None)
        self.across[of, bucket] = outcome.recents[bucket]
        self._add(outcome.verdicts)
        for row in outcome.verdicts.iter_rows(named=True):
            reasons = {*row["gained"].split(","), *row["shadow_gained"].split(",")} - {""}
            assert reasons <= decode_evidence(row["evidence"]).keys()
            self.gained += [(row["order_id"], reason) for reason in reasons]

    def _add(self, verdicts: pl.DataFrame) -> None:
        for order_id, *reasons in verdicts.select("order_id", "given", "shadow").iter_rows():
            for of_order, text in zip((self.reasons, self.shadow), reasons, strict=True):
                of_order.setdefault(order_id, set()).update(filter(None, text.split(",")))


def without_clashes(messages: Sequence[Message], rules: FraudRules) -> list[Message]:
    """The messages but those with a used id, of which only Postgres knows."""
    dead = judge(messages, rules).dead_letters
    return [message for message in messages if message.place not in dead]


def assert_as_judged(stream: Stream, messages: Sequence[Message]) -> None:
    judged = {order_id: set(verdict.reasons) for order_id, verdict in judge(messages, stream.rules).orders.items()}
    in_shadow = stream.rules.in_shadow
    assert stream.reasons == {order_id: reasons - in_shadow for order_id, reasons in judged.items()}
    assert stream.shadow == {order_id: reasons & in_shadow for order_id, reasons in judged.items()}


@settings(max_examples=60)
@given(st.data(), rules_across(), st.integers(1, 3))
def test_any_split_into_micro_batches_ends_in_the_brute_force_verdicts(
    data: st.DataObject, further: dict[str, Any], buckets: int
) -> None:
    case = data.draw(order_sets())
    rules = with_rules(case.rules, further)
    messages = without_clashes(case.messages, rules)
    stream = Stream(rules, buckets)
    for batch in data.draw(micro_batches(messages)) if messages else []:
        stream.feed(batch)
    assert_as_judged(stream, messages)
    assert len(set(stream.gained)) == len(stream.gained), "a reason is gained once"


def order(number: int, seconds: float, **said: Any) -> Message:
    """An order of user 1 and a product of its own, so many seconds after noon, received when it was placed."""
    stamp = NOON + timedelta(seconds=seconds)
    fields = {"user_id": 1, "product_id": number + 1, "quantity": 1, "country": "ID"} | said
    text = ",".join(f'"{name}":"{value}"' if isinstance(value, str) else f'"{name}":{value}' for name, value in fields.items())
    value = (
        f'{{"order_id":"o{number}",{text},"amount":"1000","created_date":"{stamp.isoformat()}",'
        f'"event_ts":"{stamp.isoformat()}","status":"Pending","source":"web"}}'
    )
    return Message("orders", 0, number, stamp, b"1", value.encode())


def rules_of(**entries: dict[str, Any]) -> FraudRules:
    return FraudRules.model_validate({"version": "1", "fields": {"device": "string"}, "rules": entries})


def test_only_orders_that_can_matter_are_remembered_and_only_as_long_as_they_can() -> None:
    dear = {"by": ["user_id"], "when": "quantity > 1", "count": {"at_least": 3, "within": "1 h"}}
    near = {"by": ["product_id"], "count": {"at_least": 3, "within": "1 s"}}
    stream = Stream(rules_of(dear=dear, near=near), 1)
    for number in range(200):
        stream.feed([order(number, 60 * number, quantity=1 + number % 2)])
    (kept,) = stream.across.values()
    first = 60 * 199 - 30 - 3_600
    assert sorted(whole(kept)["order_id"]) == sorted(f"o{number}" for number in range(1, 200, 2) if 60 * number >= first)
    assert set(whole(kept).columns).isdisjoint({"amount", "source", "attributes", "created_date", "offset"})
    assert sum(len(whole(recent)) for recent in stream.main.values()) == 1, "the division by product remembers no longer"


def test_a_declared_field_divides_orders_and_who_lacks_it_takes_no_part() -> None:
    shared = {"by": ["device"], "distinct": {"of": "user_id", "at_least": 2, "within": "1 h"}}
    stream = Stream(rules_of(shared=shared), 3)
    said: list[dict[str, Any]] = [
        {"device": "a", "user_id": 1},
        {"user_id": 2},
        {"device": "b", "user_id": 3},
        {"device": "a", "user_id": 4},
        {"user_id": 5},
    ]
    for number, fields in enumerate(said):
        stream.feed([order(number, number, **fields)])
    assert {order_id for order_id, reasons in stream.reasons.items() if reasons} == {"o0", "o3"}
    assert sum(len(whole(recent)) for recent in stream.across.values()) == 3


def test_a_rule_that_appears_sees_the_orders_that_come_from_then_on_and_one_that_leaves_takes_nothing_back() -> None:
    dear = {"by": ["user_id"], "count": {"at_least": 3, "within": "1 h"}}
    versions = [rules_of(), rules_of(dear=dear), rules_of(), rules_of(dear=dear | {"mode": "shadow"})]
    stream = Stream(versions[0], 2)
    for number in range(12):
        stream.rules = versions[number // 3]
        stream.feed([order(number, number)])
    hit = {order_id for order_id, reasons in stream.reasons.items() if reasons}
    assert hit == {"o3", "o4", "o5"}
    in_shadow = {order_id for order_id, reasons in stream.shadow.items() if reasons}
    assert in_shadow == {"o3", "o4", "o5", "o9", "o10", "o11"}, "beside what was remembered when the rule left"


def test_rules_share_a_division_where_they_share_a_field_and_one_that_is_off_has_none() -> None:
    count = {"count": {"at_least": 3, "within": "1 h"}}
    rules = rules_of(
        a={"by": ["user_id"], **count},
        b={"by": ["country", "user_id"], **count},
        c={"by": ["country", "quantity"], **count},
        d={"by": ["device"], "mode": "off", **count},
        e={"by": ["product_id", "device"], **count},
        f={"when": "quantity > 1"},
    )
    assert {of: set(part.rules) for of, part in rules.across_products.items()} == {"user_id": {"a", "b"}, "quantity": {"c"}}
    assert set(rules.within_products.evaluated) == {"e", "f"}
    assert rules_of(e={"by": ["product_id"], **count}).across_products == {}


def test_texts_of_one_key_are_told_apart_by_the_rules() -> None:
    keys = keys_of(pl.Series(["ID", "SG", "ID"]))
    assert keys[0] == keys[2] != keys[1]
    assert keys.tolist() == [8656283424537989569, -244577087709231074, 8656283424537989569], "the same on every machine"
    assert keys_of(pl.Series([0.0, -0.0, 1.5]))[0] == keys_of(pl.Series([0.0, -0.0, 1.5]))[1]


# --- history -------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.data(), rules_across())
def test_slices_of_history_by_another_field_give_the_verdicts_of_one_table(
    data: st.DataObject, further: dict[str, Any]
) -> None:
    case = data.draw(order_sets())
    rules = with_rules(case.rules, further)
    messages = without_clashes(case.messages, rules)
    read = [read_arrivals(as_batch([message]), rules, LONG_AFTER).orders for message in messages]
    orders = pl.concat([NO_ORDERS, *read]).unique("order_id", keep="first", maintain_order=True)
    for of, part in rules.across_products.items():
        found = in_slices(taking_part_across(orders, part, of), part, data.draw(st.integers(1, 5)))
        judged = judge(messages, part).orders
        expected = {order_id: verdict.reasons for order_id, verdict in judged.items() if verdict.reasons}
        assert {order_id: sorted(reasons) for order_id, reasons in found.items() if reasons} == expected


def in_slices(orders: pl.DataFrame, rules: FraudRules, at_once: int) -> dict[str, list[str]]:
    """What rules find among orders that are cut into slices of time."""
    window = rules.widest_window // timedelta(microseconds=1)
    width, moment = 2 * window + 1_000_000, pl.col("event_ts").to_physical()
    parts = [
        orders.filter(moment.is_between(start - window, start + width - 1 + window)).with_columns(slice=pl.lit(start, pl.Int64))
        for start in sorted({time // width * width for time in orders["event_ts"].to_physical()})
    ]
    if not parts:
        return {}
    whole = pl.concat(parts).sort("slice", KEY, "event_ts", "order_id")
    pieces = [whole[place : place + 3] for place in range(0, len(whole), 3)]
    found = pl.concat(rescreened_tables(pieces, rules, width, KEY, at_once))
    assert found["order_id"].is_unique().all()
    rows = found.select("order_id", pl.concat_list("reasons", "shadow_reasons")).iter_rows()
    return dict(rows)
