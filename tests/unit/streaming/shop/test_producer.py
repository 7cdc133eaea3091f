"""Synthetic orders and their messages, held against the independent reading of contract and rules in `brute_force`."""

import re
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import polars as pl
import pytest

from batch.reference_data import products
from conf.errors import PostgresError, PostgresUnavailable, RulesError, SettingsError
from conf.former_rules import CoordinatedUsers, ForeignCountry, NightAmount, NightQuantity, RepeatPurchase, SequentialUsers
from conf.rules import FraudRules
from streaming.shop.messages import BREAKS, DUPLICATE, ORDER, USED_ORDER_ID, Message, messages
from streaming.shop.orders import Shop, order_batches
from streaming.shop.producer import ProduceReport, Progress, patient, start_of_run
from tests.oracle import brute_force
from tests.oracle.order_sets import six_rules

RULES = FraudRules(version="test")
USERS = pl.Series("user_id", range(1, 20_001))
PRODUCTS = next(products(1_000, seed=1)).select("product_id", "price")
AFTERNOON = datetime(2026, 11, 22, 7, 30, tzinfo=UTC)  # 14:30 in Jakarta
NIGHT = datetime(2026, 11, 21, 18, 30, tzinfo=UTC)  # 01:30 in Jakarta
STRICT = six_rules(
    version="strict",
    time_zone="America/New_York",
    foreign_country=ForeignCountry(home="SG"),
    night_quantity=NightQuantity(above=3),
    night_amount=NightAmount(above=50_000),
    repeat_purchase=RepeatPurchase(orders=2, within=timedelta(0)),
    sequential_users=SequentialUsers(users=4, within=timedelta(seconds=60)),
    coordinated_users=CoordinatedUsers(users=5, within=timedelta(seconds=1)),
)
PAIRS = six_rules(version="pairs", sequential_users=SequentialUsers(users=2), coordinated_users=CoordinatedUsers(users=4))


def planned(orders: int = 12_000, rules: FraudRules = RULES, start: datetime = AFTERNOON, **changes: Any) -> pl.DataFrame:
    """Orders of one run, all batches together."""
    options: dict[str, Any] = {"seed": 3, "rate": 200.0, "bursts": 0.04} | changes
    shop = Shop(options.pop("users", USERS), options.pop("products", PRODUCTS))
    return pl.concat(order_batches(lambda: shop, rules, orders=orders, start=start, **options))


def as_messages(orders: pl.DataFrame, broken: float = 0.0, duplicates: float = 0.0) -> list[Message]:
    return messages(orders, np.random.default_rng(5), broken=broken, duplicates=duplicates)


def received(sent: list[Message], at: datetime) -> list[brute_force.Message]:
    """The messages as one partition of Kafka has them."""
    return [brute_force.Message("orders", 0, offset, at, each.key, each.value) for offset, each in enumerate(sent)]


def judged(orders: pl.DataFrame, rules: FraudRules) -> dict[str, list[str]]:
    """Order id → reasons, as the brute force finds them."""
    latest = orders["event_ts"].max()
    assert isinstance(latest, datetime)
    judgement = brute_force.judge(received(as_messages(orders), latest), rules)
    assert not judgement.dead_letters
    return {order_id: verdict.reasons for order_id, verdict in judgement.orders.items()}


def labels(orders: pl.DataFrame) -> dict[str, list[str]]:
    """Planted order id → labels."""
    planted = orders.drop_nulls("label")
    return dict(zip(planted["order_id"], planted["label"].str.split(","), strict=True))


RUNS = {
    "default rules by day": {},
    "default rules by night": {"start": NIGHT},
    "default rules just after the night": {"start": NIGHT + timedelta(hours=3), "orders": 3_000},
    "rules that see a sequence sooner than a cluster": {"rules": PAIRS, "orders": 3_000},
    "strict rules": {"rules": STRICT, "orders": 3_000},
    "strict rules, only frauds": {"rules": STRICT, "orders": 1_500, "bursts": 1.0},
    "ten orders an hour": {"rate": 1 / 360, "orders": 1_500},
    "a hundred thousand orders a second": {"rate": 100_000.0, "orders": 2_000},
    "few users and products": {"users": USERS.head(3), "products": PRODUCTS.head(2), "orders": 400},
    "clocks go forward": {"rules": STRICT, "orders": 1_500, "start": datetime(2026, 3, 8, 12, tzinfo=UTC)},
    "clocks go back": {"rules": STRICT, "orders": 1_500, "start": datetime(2026, 11, 1, 12, tzinfo=UTC)},
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
def test_every_label_is_a_reason_that_the_rules_in_force_give(run: dict[str, Any]) -> None:
    orders = planned(**run)
    verdicts = judged(orders, run.get("rules", RULES))
    unfounded = {order_id for order_id, label in labels(orders).items() if not set(label) <= set(verdicts[order_id])}
    assert labels(orders)
    assert not unfounded


@pytest.mark.parametrize("rules", [RULES, STRICT], ids=["default", "strict"])
def test_all_six_kinds_are_planted(rules: FraudRules) -> None:
    counts = Counter(reason for label in labels(planned(rules=rules)).values() for reason in label)
    assert set(counts) == set(rules.rules)
    assert min(counts.values()) >= 15


@pytest.mark.parametrize("start", [AFTERNOON, NIGHT], ids=["day", "night"])
def test_ordinary_orders_are_genuine_at_the_default_rates(start: datetime) -> None:
    orders = planned(start=start)
    verdicts = judged(orders, RULES)
    surprises = [order_id for order_id in orders.filter(pl.col("label").is_null())["order_id"] if verdicts[order_id]]
    assert len(surprises) <= len(orders) // 1_000


@pytest.mark.parametrize(("bursts", "expected"), [(0.0, 0), (0.04, 800), (0.5, 10_000), (1.0, 20_000)])
def test_the_share_of_planted_frauds_is_exact(bursts: float, expected: int) -> None:
    assert planned(20_000, bursts=bursts)["label"].count() == expected


def test_shares_of_a_few_orders_add_up_over_many_runs() -> None:
    assert 15 <= sum(planned(10, seed=seed)["label"].count() for seed in range(60)) <= 33


@pytest.mark.parametrize("orders", [1, 9_999, 10_000, 10_001, 23_456])
def test_a_run_has_as_many_orders_as_asked_for_each_with_an_id_of_its_own(orders: int) -> None:
    run = planned(orders)
    assert len(run) == orders
    assert run["order_id"].is_unique().all()
    assert run["order_id"].str.contains(r"^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-a[0-9a-f]{3}-[0-9a-f]{12}$").all()


def test_while_postgres_is_away_a_run_goes_on_with_the_users_and_products_that_it_knows() -> None:
    few, all_of_them = Shop(USERS.head(60), PRODUCTS.head(50)), Shop(USERS, PRODUCTS)
    answers: list[Shop | None] = [None, few, None, all_of_them, None]

    def ask() -> Shop:
        answer = answers.pop(0)
        if answer is None:
            raise PostgresUnavailable("it is restarting")
        return answer

    shop = patient(ask)
    with pytest.raises(PostgresUnavailable):
        shop()
    assert [shop() for _ in range(4)] == [few, few, all_of_them, all_of_them]


def test_a_run_without_end_makes_orders_of_the_users_and_products_that_are_there_by_then() -> None:
    few = Shop(USERS.head(60), PRODUCTS.head(50))
    shops = iter([few, few, Shop(USERS, PRODUCTS), Shop(USERS, PRODUCTS)])
    batches = order_batches(lambda: next(shops), RULES, orders=0, seed=3, start=AFTERNOON, rate=10.0, bursts=0.04)
    first, second, third, fourth = (next(batches) for _ in range(4))
    assert [len(batch) for batch in (first, second, third, fourth)] == [600] * 4, "a minute's orders"
    assert max(first["user_id"].max(), second["user_id"].max()) == few.users.max()  # type: ignore[type-var]
    assert third["user_id"].max() > few.users.max()  # type: ignore[operator]
    assert third["product_id"].max() > few.products["product_id"].max()  # type: ignore[operator]
    due = pl.concat([first, second, third, fourth])["due"]
    assert due.is_sorted()
    assert 239 < due.max() < 240  # type: ignore[operator]


def test_one_seed_and_start_make_the_same_messages_again() -> None:
    first, second = (as_messages(planned(), broken=0.05, duplicates=0.05) for _ in range(2))
    assert first == second


def test_one_seed_at_another_start_makes_the_same_purchases_with_new_ids_and_times() -> None:
    first, later = planned(), planned(start=AFTERNOON + timedelta(hours=1))
    assert not set(first["order_id"]) & set(later["order_id"])
    same = ["user_id", "product_id", "quantity", "amount", "country", "source", "label"]
    assert first.select(same).equals(later.select(same))


def test_another_seed_makes_other_purchases() -> None:
    assert not planned()["user_id"].equals(planned(seed=4)["user_id"])


def test_orders_are_of_given_users_and_products_at_their_prices() -> None:
    users, products = (
        pl.Series("user_id", [5, 6, 7, 90, 1_000]),
        pl.DataFrame({"product_id": [3, 44], "price": [99_900, 12_000]}),
    )
    orders = planned(500, users=users, products=products)
    amounts = orders.join(products, on="product_id").select(expected=pl.col("price") * pl.col("quantity"), amount="amount")
    assert set(orders["user_id"]) == set(users)
    assert set(orders["product_id"]) == {3, 44}
    assert [int(re.sub(r"\D", "", text)) for text in amounts["amount"]] == amounts["expected"].to_list()


def test_amounts_are_written_in_all_three_ways() -> None:
    spellings = {re.sub(r"\d{1,3}(\.\d{3})+", "1.000", text) for text in planned(1_000)["amount"]}
    assert {re.sub(r"\d+$", "1", text) if "." not in text else text for text in spellings} == {"Rp.1.000", "IDR 1", "1"}


def test_orders_are_due_in_order_and_evenly_over_the_time_that_their_rate_takes() -> None:
    orders = planned(20_000, rate=200.0)
    due = orders["due"].to_numpy()
    assert (np.diff(due) >= 0).all()
    a_second_each = np.histogram(due, bins=100, range=(0, 100))[0]
    assert a_second_each.sum() == 20_000
    assert 170 <= a_second_each.min() <= a_second_each.max() <= 230


def test_an_order_happens_when_it_is_due_unless_it_is_back_dated() -> None:
    orders = planned()
    happened = orders["event_ts"].dt.convert_time_zone("UTC") - AFTERNOON
    late = happened.dt.total_microseconds() - (orders["due"] * 1e6).cast(pl.Int64)
    is_night_kind = orders["label"].fill_null("").str.contains("night")
    assert late.filter(~is_night_kind).unique().to_list() == [0]
    assert (late.filter(is_night_kind) < 0).all()
    assert (orders["created_date"] == orders["event_ts"]).all()


@pytest.mark.parametrize("day", ["2026-03-08", "2026-11-01", "2026-07-01"], ids=["short", "long", "usual"])
def test_night_orders_fall_in_the_last_night_of_the_rules_zone(day: str) -> None:
    zone = ZoneInfo(STRICT.time_zone)
    start = datetime.fromisoformat(f"{day}T15:00").replace(tzinfo=zone)
    by_night = planned(2_000, STRICT, start.astimezone(UTC)).filter(pl.col("label").str.contains("night"))
    local = [moment.astimezone(zone) for moment in by_night["event_ts"]]
    assert {moment.date() for moment in local} == {start.date()}
    assert {moment.hour for moment in local} <= {0, 1, 2, 3}


def test_night_orders_are_not_back_dated_when_it_is_night() -> None:
    orders = planned(2_000, start=NIGHT)
    assert min(orders["event_ts"]) >= NIGHT


def test_too_few_users_for_a_pattern_is_one_clear_message() -> None:
    with pytest.raises(PostgresError, match=r"3 users with consecutive ids .* there are 2: `finpro generate` makes more"):
        planned(users=USERS.head(2))
    with pytest.raises(PostgresError, match="3 users with consecutive ids"):
        planned(users=pl.Series("user_id", [1, 2, 4, 5, 7]))
    assert len(planned(100, users=USERS.head(2), bursts=0.0)) == 100


@pytest.mark.parametrize(
    ("users", "products"), [(USERS.head(0), PRODUCTS), (USERS, PRODUCTS.head(0))], ids=["users", "products"]
)
def test_without_users_or_products_the_message_names_the_command_that_makes_them(
    users: pl.Series, products: pl.DataFrame
) -> None:
    with pytest.raises(PostgresError, match="`finpro generate`"):
        planned(users=users, products=products)


def test_a_limit_that_no_order_can_exceed_is_an_error() -> None:
    out_of_reach = six_rules(night_amount=NightAmount(above=2**63 - 1))
    with pytest.raises(RulesError, match="higher than any order"):
        planned(rules=out_of_reach)


def test_every_order_becomes_one_message_that_keeps_the_contract() -> None:
    orders = planned(3_000)
    sent = as_messages(orders)
    read = [brute_force.read(message, RULES.max_future_skew) for message in received(sent, AFTERNOON + timedelta(minutes=1))]
    assert [order.order_id for order in read] == orders["order_id"].to_list()
    assert [(order.user_id, order.product_id) for order in read] == list(orders.select("user_id", "product_id").iter_rows())
    assert [order.event_ts for order in read] == orders["event_ts"].to_list()


def test_a_message_is_keyed_by_its_product_and_carries_its_label_in_a_header() -> None:
    orders = planned(3_000)
    sent = as_messages(orders)
    assert [int(message.key) for message in sent] == orders["product_id"].to_list()
    expected = [[("label", label.encode())] if label else [] for label in orders["label"]]
    assert [message.headers for message in sent] == expected
    assert all(label == ",".join(sorted(label.split(","))) for label in orders["label"].drop_nulls())


def test_one_source_writes_ids_as_text() -> None:
    values = [message.value or b"" for message in as_messages(planned(1_000))]
    as_text = [value for value in values if re.search(rb'"user_id":"U\d+","product_id":"P\d+"', value)]
    assert as_text == [value for value in values if b'"source":"marketplace"' in value]
    assert 0 < len(as_text) < len(values)


def test_a_duplicate_has_the_bytes_and_key_of_an_order_before_it() -> None:
    sent = as_messages(planned(5_000), duplicates=0.1)
    before: set[tuple[bytes, bytes | None, str | None]] = set()
    for message in sent:
        if message.kind == DUPLICATE:
            assert (message.key, message.value, message.label) in before
        before.add((message.key, message.value, message.label))
    kinds = Counter(message.kind for message in sent)
    assert kinds[ORDER] == 5_000
    assert 400 < kinds[DUPLICATE] < 600


def test_every_broken_message_is_a_dead_letter_and_no_other_is() -> None:
    orders = planned(5_000)
    sent = as_messages(orders, broken=0.1, duplicates=0.1)
    judgement = brute_force.judge(received(sent, AFTERNOON + timedelta(minutes=1)), RULES)
    kinds = Counter(message.kind for message in sent)
    dead = Counter(sent[offset].kind for _, _, offset in judgement.dead_letters)
    assert set(dead) == {*BREAKS, USED_ORDER_ID}
    assert dead == kinds - Counter({ORDER: kinds[ORDER], DUPLICATE: kinds[DUPLICATE]})
    assert set(judgement.orders) == set(orders["order_id"])
    assert judgement.duplicates == kinds[DUPLICATE]


def test_messages_are_due_in_the_order_in_which_they_are_sent() -> None:
    due = [message.due for message in as_messages(planned(5_000), broken=0.1, duplicates=0.1)]
    assert due == sorted(due)


def test_a_start_that_would_put_event_times_into_the_future_is_refused() -> None:
    now = datetime.now(UTC)
    with pytest.raises(SettingsError, match="into the future"):
        start_of_run(now + timedelta(minutes=5), history=timedelta(0), skew=timedelta(seconds=60))
    with pytest.raises(SettingsError, match="into the future"):
        start_of_run(now - timedelta(minutes=5), history=timedelta(hours=1), skew=timedelta(seconds=60))
    with pytest.raises(SettingsError, match="has no offset"):
        start_of_run(datetime(2026, 1, 1), history=timedelta(0), skew=timedelta(0))  # noqa: DTZ001
    assert start_of_run(now, history=timedelta(0), skew=timedelta(0)) == now


def test_history_ends_now() -> None:
    start = start_of_run(None, history=timedelta(hours=1), skew=timedelta(0))
    assert abs(start + timedelta(hours=1) - datetime.now(UTC)) < timedelta(seconds=5)


def test_progress_says_how_far_behind_a_run_is_only_when_it_is() -> None:
    on_time = Progress(sent=998, orders=20_000, unacknowledged=3, behind_orders=0, behind_seconds=0.01)
    late = Progress(sent=998, orders=20_000, unacknowledged=3, behind_orders=1_234, behind_seconds=2.1)
    assert str(on_time) == "998 of 20,000 orders sent"
    assert str(late) == "998 of 20,000 orders sent, behind by 1,234 orders (2.1 s)"


def test_a_report_names_counts_by_label_and_kind_and_how_to_repeat_the_run() -> None:
    report = ProduceReport(
        orders=1_000,
        labels={"foreign_country": 7},
        planted=7,
        duplicates=2,
        broken={"empty": 3},
        seconds=4.0,
        behind_seconds=1.5,
        start=AFTERNOON,
        interrupted=True,
    )
    assert str(report).splitlines() == [
        "1,000 orders acknowledged in 4.0 s: 250 orders/s, at worst 1.5 s behind",
        "7 of them planted frauds",
        "  foreign_country           7",
        "2 orders sent twice",
        "3 messages that break the contract",
        "  empty                     3",
        "stopped before the end, as asked",
        "--start 2026-11-22T07:30:00.000000+00:00 makes the same messages again",
    ]
