"""Screening without Spark: micro-batch after micro-batch through parsing, buckets and state, against the brute force."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import msgspec
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import TopicNotKeyed
from conf.former_rules import SIX
from conf.lists import Entries, packed
from conf.rules import FraudRules
from streaming.contract import CLASH_SCHEMA, CONTENT, NO_CLASHES, ORDER_SCHEMA, clash_dead_letters, clashes_among, read_messages
from streaming.screening.chunks import Arrivals, PartitionRead, pack_arrivals, unpack_arrivals
from streaming.screening.division import By, Division
from streaming.screening.pipeline import divided, read_arrivals, screen_arrivals
from streaming.screening.receipts import LATENCY_BOUNDS_SECONDS, BucketState, Receipt, latencies, summed
from streaming.screening.recent import NOTHING_RECENT, Recent, whole
from streaming.screening.state import MicroBatch
from streaming.screening.verdicts import KINDS, Watermark, advance, epoch_us, reason_lists
from tests.oracle.brute_force import LONG_AFTER, NO_TIMESTAMP, Judgement, Message, judge
from tests.oracle.kafka_keys import keyed_partition
from tests.oracle.order_sets import OrderSet, micro_batches, order_sets, shuffles

SECOND_US = 1_000_000
NO_RECEIPT = Receipt("1", 0, 0, 0, 0, {}, {}, 0, 0, 0, [])
LATENESS = timedelta(seconds=30)
_PLACE = ("partition", "offset")
_TIME = ORDER_SCHEMA["event_ts"]


@dataclass
class Stream:
    """The pipeline with dictionaries in place of Postgres: reasons add up, the first content of an order_id stands."""

    rules: FraudRules
    buckets: int
    backlog_offsets: int | None = None
    by: By = By.PRODUCT
    recent: dict[int, Recent] = field(default_factory=dict)
    stored: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    reasons: dict[str, set[str]] = field(default_factory=dict)
    shadow_reasons: dict[str, set[str]] = field(default_factory=dict)
    suppressed_reasons: dict[str, set[str]] = field(default_factory=dict)
    announced: dict[str, list[frozenset[str]]] = field(default_factory=lambda: defaultdict(list))
    dead: set[tuple[int, int]] = field(default_factory=set)
    late: int = 0
    receipts: list[Receipt] = field(default_factory=list)
    batches: int = 0

    def feed(self, messages: list[Message], moment: datetime = LONG_AFTER) -> None:
        """One micro-batch of `moment`, read by two tasks."""
        division = Division(self.by, self.buckets)
        tasks = [part for part in ([m for m in messages if m.partition % 2 == task] for task in (1, 0)) if part]
        read = [self._read(part, moment) for part in tasks]
        if self.by is By.PARTITION:
            for arrivals in read:
                division.require_keyed(arrivals.orders)
                self._settle_task(division, moment, [arrivals], {partition.partition for partition in arrivals.reads})
        else:
            for bucket, shares in enumerate(zip(*(divided(arrivals, division) for arrivals in read), strict=True)):
                packed = [unpack_arrivals(pack_arrivals(share)) for share in shares]
                self._settle_task(division, moment, packed, {bucket})
        self.batches += 1

    def _read(self, messages: list[Message], moment: datetime) -> Arrivals:
        """What a task reads, but that the ids of other orders are no orders."""
        batch = as_batch(messages)
        arrivals = read_arrivals(batch, self.rules, moment)
        clashes = clashes_among(arrivals.orders, self._stored)
        dead_letters = pl.concat([arrivals.dead_letters, clash_dead_letters(batch, clashes)])
        orders = arrivals.orders.join(clashes, on=_PLACE, how="anti")
        return Arrivals(arrivals.reads, orders, dead_letters)

    def _settle_task(self, division: Division, moment: datetime, arrivals: list[Arrivals], buckets: set[int]) -> None:
        """A task screens again as long as it turns out to hold used order ids with other content."""
        batch, clashes = MicroBatch("query", division, self.batches), NO_CLASHES
        recents = {bucket: self.recent.get(bucket, NOTHING_RECENT) for bucket in buckets}
        while True:
            outcome = screen_arrivals(arrivals, recents, batch, moment, self.rules, self.backlog_offsets, clashes)
            found = self._clashes(outcome.verdicts)
            if found.is_empty():
                break
            clashes = pl.concat([clashes, found])
        self.recent |= outcome.recents
        self.late += outcome.receipt.late
        self.receipts.append(outcome.receipt)
        self.dead |= set(pl.concat([outcome.dead_letters.select(_PLACE), clashes.select(_PLACE)]).iter_rows())
        self._settle(outcome.verdicts)

    def _stored(self, order_ids: Sequence[str]) -> pl.DataFrame:
        rows = [(order_id, *self.stored[order_id]) for order_id in order_ids if order_id in self.stored]
        return pl.DataFrame(rows, {name: ORDER_SCHEMA[name] for name in ("order_id", *CONTENT)}, orient="row")

    def _clashes(self, verdicts: pl.DataFrame) -> pl.DataFrame:
        claims, found = dict(self.stored), []
        for row in verdicts.sort("received_at", "partition", "offset").iter_rows(named=True):
            content = tuple(row[name] for name in CONTENT)
            if claims.setdefault(row["order_id"], content) != content:
                found.append((row["partition"], row["offset"], row["order_id"]))
        return pl.DataFrame(found, CLASH_SCHEMA, orient="row")

    def _settle(self, verdicts: pl.DataFrame) -> None:
        kinds = zip(*(map(set, reason_lists(verdicts[column]).to_list()) for column in KINDS), strict=True)
        for row, (reasons, in_shadow, suppressed) in zip(verdicts.iter_rows(named=True), kinds, strict=True):
            assert not reasons & suppressed
            order_id = row["order_id"]
            is_known = order_id in self.stored
            self.stored.setdefault(order_id, tuple(row[name] for name in CONTENT))
            known, known_shadow, known_suppressed = (
                kind.setdefault(order_id, set()) for kind in (self.reasons, self.shadow_reasons, self.suppressed_reasons)
            )
            if is_known and known >= reasons and known_shadow >= in_shadow and known_suppressed | known >= suppressed:
                continue
            known |= reasons
            known_shadow |= in_shadow
            known_suppressed |= suppressed
            known_suppressed -= known
            # A reason is all that a suppressed one is, and more.
            said = {f"{reason} in shadow" for reason in known_shadow} | {
                f"{reason} or suppressed" for reason in known | known_suppressed
            }
            self.announced[order_id].append(frozenset(known | said))


def as_batch(messages: list[Message]) -> pa.RecordBatch:
    """Messages of one partition as Spark's Kafka source gives them."""
    return pa.record_batch(
        {
            "topic": pa.array([message.topic for message in messages]),
            "partition": pa.array([message.partition for message in messages], pa.int32()),
            "offset": pa.array([message.offset for message in messages], pa.int64()),
            "timestamp": pa.array([message.timestamp for message in messages], pa.timestamp("us", "UTC")),
            "value": pa.array([message.value for message in messages], pa.binary()),
        }
    )


def expected(case: OrderSet) -> dict[str, set[str]]:
    """The brute force's reasons for each order."""
    return reasons_of(judge(case.messages, case.rules))


def reasons_of(judgement: Judgement) -> dict[str, set[str]]:
    return {order_id: set(verdict.reasons) for order_id, verdict in judgement.orders.items()}


@settings(max_examples=100)
@given(st.data(), st.integers(1, 3))
def test_any_split_into_micro_batches_ends_in_the_brute_force_verdicts_each_announced_once(
    data: st.DataObject, buckets: int
) -> None:
    case = data.draw(order_sets())
    stream = Stream(case.rules, buckets)
    for batch in data.draw(micro_batches(case.messages)):
        stream.feed(batch)
    judgement = judge(case.messages, case.rules)
    assert stream.reasons == reasons_of(judgement)
    assert stream.dead == {(partition, offset) for _, partition, offset in judgement.dead_letters}
    for verdicts in stream.announced.values():
        assert all(earlier < later for earlier, later in pairwise(verdicts))
    before = {order_id: list(verdicts) for order_id, verdicts in stream.announced.items()}
    stream.feed(data.draw(shuffles(case.messages)))
    assert stream.announced == before


def at_home(messages: Sequence[Message], partitions: int) -> list[Message]:
    """The messages where a producer with the key `product_id` would have put them, as far as they can be read."""
    products = {message.place: 1 for message in messages}
    for partition in {message.partition for message in messages}:
        part = [message for message in messages if message.partition == partition]
        orders = read_messages(as_batch(part), timedelta(days=1), LONG_AFTER).orders
        places = zip(orders["partition"], orders["offset"], orders["product_id"], strict=True)
        products |= {("orders", partition, offset): product for partition, offset, product in places}
    return [
        replace(message, partition=keyed_partition(products[message.place], partitions), offset=number)
        for number, message in enumerate(messages)
    ]


@settings(max_examples=100)
@given(st.data(), st.integers(1, 5))
def test_where_partitions_are_buckets_any_split_ends_in_the_brute_force_verdicts(data: st.DataObject, partitions: int) -> None:
    case = data.draw(order_sets())
    used_ids = judge(case.messages, case.rules).dead_letters  # whose came first is not decided between partitions
    messages = at_home([message for message in case.messages if message.place not in used_ids], partitions)
    stream = Stream(case.rules, partitions, by=By.PARTITION)
    for batch in data.draw(micro_batches(messages)) if messages else []:
        stream.feed(batch)
    assert stream.reasons == reasons_of(judge(messages, case.rules))


def test_a_product_in_another_partition_than_its_own_is_refused_where_partitions_are_buckets() -> None:
    stream = Stream(FraudRules(version="test"), 4, by=By.PARTITION)
    order = plain_order(0, datetime(2026, 11, 1, tzinfo=UTC), user_id=1)
    stream.feed(at_home([order], 4))
    with pytest.raises(TopicNotKeyed, match="product 1 lies on partition"):
        stream.feed([replace(order, partition=(keyed_partition(1, 4) + 1) % 4)])


@settings(max_examples=40)
@given(st.data())
def test_orders_in_any_order_end_in_the_brute_force_verdicts_while_none_is_evicted(data: st.DataObject) -> None:
    case = data.draw(order_sets(on_time=False))
    patient = case.rules.model_copy(update={"lateness": timedelta(days=30)})
    stream = Stream(patient, buckets=2)
    for batch in data.draw(micro_batches(case.messages)):
        stream.feed(batch)
    assert stream.reasons == expected(case)


@settings(max_examples=40)
@given(st.data())
def test_no_order_is_late_in_a_backlog_of_partitions_that_differ_ten_to_one(data: st.DataObject) -> None:
    case = data.draw(order_sets(partitions=1))
    # Whose order_id came first is another matter, and not decided between partitions.
    used_ids = judge(case.messages, case.rules).dead_letters
    messages = [message for message in case.messages if message.place not in used_ids]
    # One order in eleven lies in the short partition; a batch takes a share of both in proportion, as Spark does.
    part = [message.__class__(**{**vars(message), "partition": int(i % 11 == 0)}) for i, message in enumerate(messages)]
    long, short = ([m for m in part if m.partition == partition] for partition in (0, 1))
    limit = data.draw(st.integers(2, 12))
    stream = Stream(case.rules, buckets=2, backlog_offsets=limit)
    while long or short:
        total = len(long) + len(short)
        taken = [part if total <= limit else part[: max(1, limit * len(part) // total)] for part in (long, short)]
        long, short = long[len(taken[0]) :], short[len(taken[1]) :]
        stream.feed([*taken[0], *taken[1]])
    assert stream.reasons == reasons_of(judge(part, case.rules))


def plain_order(number: int, stamp: datetime, *, user_id: int) -> Message:
    """An order of one product, received when it was placed."""
    value = (
        f'{{"order_id":"o{number}","user_id":{user_id},"product_id":1,"quantity":1,"amount":"1000","country":"ID",'
        f'"created_date":"{stamp.isoformat()}","event_ts":"{stamp.isoformat()}","status":"Pending","source":"web"}}'
    )
    return Message("orders", 0, number, stamp, b"1", value.encode())


# --- rules in shadow -----------------------------------------------------------------------------------------------


def in_mode(rules: FraudRules, names: Iterable[str], mode: str) -> FraudRules:
    """The same thresholds, these rules in this mode."""
    entries = {name: rule.model_dump() | ({"mode": mode} if name in set(names) else {}) for name, rule in rules.rules.items()}
    return FraudRules.model_validate(rules.model_dump() | {"rules": entries})


def split(case: OrderSet, shadowed: Iterable[str]) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """The brute force's reasons for each order: those of the rules in force, and those of the rules in shadow."""
    found = expected(case)
    return (
        {order_id: reasons - set(shadowed) for order_id, reasons in found.items()},
        {order_id: reasons & set(shadowed) for order_id, reasons in found.items()},
    )


@settings(max_examples=60)
@given(st.data(), st.sets(st.sampled_from(SIX)))
def test_reasons_are_those_of_the_rules_without_the_shadowed_ones_and_shadow_reasons_what_those_would_give(
    data: st.DataObject, shadowed: set[str]
) -> None:
    case = data.draw(order_sets())
    stream = Stream(in_mode(case.rules, shadowed, "shadow"), buckets=2)
    for batch in data.draw(micro_batches(case.messages)):
        stream.feed(batch)
    assert (stream.reasons, stream.shadow_reasons) == split(case, shadowed)
    for verdicts in stream.announced.values():
        assert all(earlier < later for earlier, later in pairwise(verdicts))


def test_a_pattern_that_a_later_batch_completes_in_shadow_sends_its_earlier_orders_out_again_as_genuine() -> None:
    rules = in_mode(FraudRules(version="test"), ["repeat_purchase"], "shadow")
    stream = Stream(rules, buckets=1)
    start = datetime(2026, 11, 1, 5, tzinfo=UTC)
    for second in range(3):
        stream.feed([plain_order(second, start + timedelta(seconds=second), user_id=1)])
    assert stream.announced == {
        "o0": [frozenset(), {"repeat_purchase in shadow"}],
        "o1": [frozenset(), {"repeat_purchase in shadow"}],
        "o2": [{"repeat_purchase in shadow"}],
    }
    assert [(receipt.orders, receipt.genuine, receipt.revisions, receipt.frauds) for receipt in stream.receipts] == [
        (1, 1, 0, 0),
        (1, 1, 0, 0),
        (1, 1, 2, 0),
    ]


@settings(max_examples=40)
@given(st.data(), st.sets(st.sampled_from(SIX), min_size=1), st.booleans())
def test_a_rule_that_enters_or_leaves_the_shadow_takes_nothing_back_and_misses_nothing(
    data: st.DataObject, moving: set[str], leaves: bool
) -> None:
    case = data.draw(order_sets())
    modes = ("shadow", "enforce") if leaves else ("enforce", "shadow")
    stream = Stream(in_mode(case.rules, moving, modes[0]), buckets=2)
    batches = data.draw(micro_batches(case.messages))
    change = data.draw(st.integers(0, len(batches)))
    for number, batch in enumerate(batches):
        if number == change:
            stream.rules = in_mode(case.rules, moving, modes[1])
        stream.feed(batch)
    either = {order_id: reasons | stream.shadow_reasons[order_id] for order_id, reasons in stream.reasons.items()}
    assert either == expected(case)
    for verdicts in stream.announced.values():
        assert all(earlier < later for earlier, later in pairwise(verdicts))


# --- lists that suppress -------------------------------------------------------------------------------------------


@st.composite
def allowing(draw: st.DrawFn, case: OrderSet, rules: FraudRules) -> FraudRules:
    """These rules with lists of users and products of these orders, some of whose entries end while orders come."""
    orders = list(judge(case.messages, rules).orders.values())
    lists = {}
    for number, by in enumerate(draw(st.lists(st.sampled_from(("user_id", "product_id")), max_size=3))):
        ids = st.sampled_from(sorted({str(getattr(order, by)) for order in orders}) or ["1"])
        expiries = st.none() | st.sampled_from([order.event_ts for order in orders] or [LONG_AFTER])
        chosen = sorted(draw(st.dictionaries(ids, expiries, max_size=4)).items())
        expiries_us = [None if expiry is None else epoch_us(expiry) for _, expiry in chosen]
        content = packed(Entries([value for value, _ in chosen], ["known"] * len(chosen), expiries_us))
        reasons = sorted(draw(st.sets(st.sampled_from(SIX), min_size=1)))
        lists[f"list{number}"] = {"file": "any.csv", "allows": {"by": by, "reasons": reasons}, "content": content}
    return FraudRules.model_validate(rules.model_dump() | {"lists": lists})


@settings(max_examples=100)
@given(st.data(), st.sets(st.sampled_from(SIX)))
def test_what_a_list_suppresses_is_no_reason_and_no_shadow_reason_and_counts_for_others_as_before(
    data: st.DataObject, shadowed: set[str]
) -> None:
    case = data.draw(order_sets())
    rules = data.draw(allowing(case, in_mode(case.rules, shadowed, "shadow")))
    stream = Stream(rules, buckets=2)
    for batch in data.draw(micro_batches(case.messages)):
        stream.feed(batch)
    judged = judge(case.messages, rules).orders
    assert stream.suppressed_reasons == {order_id: set(verdict.suppressed_reasons) for order_id, verdict in judged.items()}
    assert stream.reasons == {order_id: set(verdict.reasons) - shadowed for order_id, verdict in judged.items()}
    assert stream.shadow_reasons == {order_id: set(verdict.reasons) & shadowed for order_id, verdict in judged.items()}
    assert expected(case) == {order_id: {*verdict.reasons, *verdict.suppressed_reasons} for order_id, verdict in judged.items()}


@settings(max_examples=60)
@given(st.data())
def test_lists_that_change_take_no_reason_back_and_one_that_is_gone_gives_the_reason(data: st.DataObject) -> None:
    case = data.draw(order_sets())
    versions = [data.draw(allowing(case, case.rules)), data.draw(allowing(case, case.rules))]
    stream = Stream(versions[0], buckets=2)
    batches = data.draw(micro_batches(case.messages))
    change = data.draw(st.integers(0, len(batches)))
    for number, batch in enumerate(batches):
        stream.rules = versions[number >= change]
        stream.feed(batch)
    by_version = [judge(case.messages, rules).orders for rules in versions]
    for order_id, found in expected(case).items():
        given, suppressed = stream.reasons[order_id], stream.suppressed_reasons[order_id]
        assert given | suppressed == found
        assert set.intersection(*(set(judged[order_id].reasons) for judged in by_version)) <= given
        assert set.intersection(*(set(judged[order_id].suppressed_reasons) for judged in by_version)) <= suppressed
    for verdicts in stream.announced.values():
        assert all(earlier < later for earlier, later in pairwise(verdicts))


def test_a_pattern_of_which_one_order_is_allowed_is_one_still_and_by_a_list_without_it_that_order_is_fraud_too() -> None:
    plain = FraudRules(version="test")
    rules = FraudRules.model_validate(
        plain.model_dump()
        | {
            "lists": {
                "testers": {
                    "file": "testers.csv",
                    "allows": {"by": "user_id", "reasons": ["coordinated_users"]},
                    "content": packed(Entries(["7"], ["tests the shop"], [None])),
                }
            }
        }
    )
    stream, start = Stream(rules, buckets=1), datetime(2026, 11, 1, 5, tzinfo=UTC)
    for second, user_id in enumerate((7, 20, 30)):
        stream.feed([plain_order(second, start + timedelta(seconds=second), user_id=user_id)])
    found = {"coordinated_users"}
    assert stream.reasons == {"o0": set(), "o1": found, "o2": found}
    assert stream.suppressed_reasons == {"o0": found, "o1": set(), "o2": set()}
    assert [(one.genuine, one.frauds, one.revisions) for one in stream.receipts] == [(1, 0, 0), (1, 0, 0), (0, 2, 2)]
    assert stream.receipts[-1].suppressed_by_reason["coordinated_users"] == 1
    stream.rules = plain
    stream.feed([plain_order(3, start + timedelta(seconds=3), user_id=40)])
    assert stream.reasons["o0"] == found
    assert stream.suppressed_reasons["o0"] == set()


@settings(max_examples=40)
@given(st.data())
def test_receipts_count_what_was_announced(data: st.DataObject) -> None:
    case = data.draw(order_sets())
    shadowed = data.draw(st.sets(st.sampled_from(SIX)))
    messages = data.draw(
        micro_batches([m for m in case.messages if m.place not in judge(case.messages, case.rules).dead_letters])
    )
    stream = Stream(data.draw(allowing(case, in_mode(case.rules, shadowed, "shadow"))), buckets=2)
    for batch in messages:
        stream.feed(batch)
    verdicts = list(stream.announced.values())
    assert sum(receipt.genuine for receipt in stream.receipts) == sum(not (first[0] & set(SIX)) for first in verdicts)
    assert sum(receipt.revisions for receipt in stream.receipts) == sum(len(announced) - 1 for announced in verdicts)
    assert sum(receipt.frauds for receipt in stream.receipts) == sum(bool(reasons) for reasons in stream.reasons.values())
    for name, found in (
        ("by_reason", stream.reasons),
        ("shadow_by_reason", stream.shadow_reasons),
        ("suppressed_by_reason", stream.suppressed_reasons),
    ):
        counted = Counter[str]()
        for receipt in stream.receipts:
            counted.update(getattr(receipt, name))
        assert +counted == Counter(reason for reasons in found.values() for reason in reasons)
    assert {receipt.rules_version for receipt in stream.receipts} <= {case.rules.version}


def test_latencies_are_counted_per_bound_with_what_lies_beyond_and_what_has_not_happened_yet() -> None:
    announced = datetime(2026, 11, 1, tzinfo=UTC)
    waited = (-2.0, 0.1, 0.100001, 7.0, 300.0, 301.0)
    times = [announced - timedelta(seconds=seconds) for seconds in waited]
    columns = {"event_ts": [*times, announced], "received_at": [announced] * 7, "revision": [False] * 6 + [True]}
    verdicts = pl.DataFrame(columns, {"event_ts": _TIME, "received_at": _TIME, "revision": pl.Boolean})
    measured = latencies(verdicts, announced)
    assert dict(zip((*LATENCY_BOUNDS_SECONDS, "beyond"), measured["event_latency"], strict=True)) == {
        0.1: 2, 0.25: 1, 0.5: 0, 1: 0, 2.5: 0, 5: 0, 10: 1, 30: 0, 60: 0, 300: 1, "beyond": 1,
    }  # fmt: skip
    assert measured["event_latency_seconds"] == pytest.approx(0.1 + 0.100001 + 7 + 300 + 301)
    assert (measured["kafka_latency"][0], measured["kafka_latency_seconds"]) == (6, 0)


def test_receipts_add_up_and_the_watermark_is_that_of_the_bucket_furthest_behind() -> None:
    one = msgspec.structs.replace(NO_RECEIPT, orders=2, by_reason={"a": 2, "b": 0}, buckets=[BucketState(0, 0, 0, 2_000_000)])
    other = msgspec.structs.replace(NO_RECEIPT, orders=1, by_reason={"a": 1}, buckets=[BucketState(1, 0, 0, 1_000_000)])
    total = summed([one, other])
    assert (total["orders"], total["by_reason"]) == (3, {"a": 3})
    assert total["watermark"] == "1970-01-01T00:00:01+00:00"
    assert summed([])["watermark"] is None


def test_an_order_without_a_kafka_timestamp_has_a_latency_since_its_event_and_none_since_kafka() -> None:
    announced = datetime(2026, 11, 1, tzinfo=UTC)
    columns = {"event_ts": [announced], "received_at": [NO_TIMESTAMP], "revision": [False]}
    verdicts = pl.DataFrame(columns, {"event_ts": _TIME, "received_at": _TIME, "revision": pl.Boolean})
    measured = latencies(verdicts, announced)
    assert (sum(measured["event_latency"]), sum(measured["kafka_latency"])) == (1, 0)
    assert measured["kafka_latency_seconds"] == 0


# --- the watermark and the state -----------------------------------------------------------------------------------


def read(partition: int, first: int, last: int, newest_seconds: float) -> PartitionRead:
    return PartitionRead(partition, first, last, round(newest_seconds * SECOND_US))


def test_the_watermark_waits_for_the_partition_that_is_furthest_behind_while_there_is_a_backlog() -> None:
    behind = advance(Watermark(), [read(0, 0, 89, 900), read(1, 0, 9, 100)], LATENESS, 100, LONG_AFTER)
    assert behind.us == 70 * SECOND_US
    caught_up = advance(behind, [read(0, 90, 99, 1000), read(1, 10, 10, 110)], LATENESS, 100, LONG_AFTER)
    assert caught_up.us == 970 * SECOND_US


def test_the_watermark_waits_for_a_partition_in_a_backlog_that_has_brought_no_order_yet() -> None:
    nothing_readable = PartitionRead(1, 0, 9, None)
    watermark = advance(Watermark(), [read(0, 0, 89, 900), nothing_readable], LATENESS, 100, LONG_AFTER)
    assert watermark.us <= Watermark().us
    assert watermark.newest_us == {0: 900 * SECOND_US}


def test_the_watermark_never_moves_back() -> None:
    ahead = advance(Watermark(), [read(0, 0, 0, 1000)], LATENESS, None, LONG_AFTER)
    assert advance(ahead, [read(1, 0, 0, 10)], LATENESS, None, LONG_AFTER).us == ahead.us


def test_an_event_time_ahead_of_the_micro_batch_does_not_move_the_watermark_beyond_it() -> None:
    now = datetime.fromtimestamp(1000, UTC)
    ahead = advance(Watermark(), [read(0, 0, 0, 1000 + 3000)], LATENESS, None, now)
    assert ahead.us == 970 * SECOND_US
    later = advance(ahead, [read(0, 1, 1, 1001)], LATENESS, None, now + timedelta(seconds=2))
    assert later.us == 971 * SECOND_US


@pytest.mark.parametrize("backlog_offsets", [None, 1])
def test_a_watermark_from_beyond_the_micro_batch_comes_back(backlog_offsets: int | None) -> None:
    beyond = Watermark({0: 250_000_000_000 * SECOND_US}, us=249_999_999_970 * SECOND_US)
    back = advance(beyond, [read(0, 1, 1, 990)], LATENESS, backlog_offsets, datetime.fromtimestamp(1000, UTC))
    assert back == Watermark({0: 1000 * SECOND_US}, us=970 * SECOND_US)


def test_a_state_that_was_made_to_forget_the_future_remembers_again() -> None:
    rules = FraudRules(version="test", lateness=timedelta(seconds=30))
    far_us = 250_000_000_000 * SECOND_US
    start = datetime(2026, 11, 1, tzinfo=UTC)
    stream = Stream(rules, buckets=1, recent={0: Recent(Watermark({0: far_us}, far_us), far_us)})
    for second in (0, 100, 101, 102):
        moment = start + timedelta(seconds=second)
        stream.feed([plain_order(second, moment, user_id=1)], moment)
    repeat = {"repeat_purchase"}
    assert stream.reasons == {"o0": set(), "o100": repeat, "o101": repeat, "o102": repeat}


def test_an_order_from_a_clock_that_is_ahead_costs_no_other_order_its_pattern() -> None:
    """Its Kafka timestamp, which the same clock gave, does not vouch for its event time."""
    rules = FraudRules(version="test", lateness=timedelta(seconds=30))
    stream, start, ahead = Stream(rules, buckets=1), datetime(2026, 11, 1, 5, tzinfo=UTC), timedelta(minutes=50)
    stream.feed([plain_order(0, start + ahead, user_id=9)], start)
    for second in (1, 2, 3):
        moment = start + timedelta(seconds=second)
        stream.feed([plain_order(second, moment, user_id=1)], moment)
    assert stream.dead == {(0, 0)}
    assert stream.reasons == {f"o{second}": {"repeat_purchase"} for second in (1, 2, 3)}
    assert stream.late == 0


def test_the_state_holds_the_orders_of_lateness_and_the_widest_window_and_no_more() -> None:
    rules = FraudRules(version="test", lateness=timedelta(seconds=30))
    stream = Stream(rules, buckets=1)
    start = datetime(2026, 11, 1, tzinfo=UTC)
    for second in range(300):
        stream.feed([plain_order(second, start + timedelta(seconds=second), user_id=second + 1)])
    assert stream.recent[0].kept == len(whole(stream.recent[0])) == 30 + 10 + 1
