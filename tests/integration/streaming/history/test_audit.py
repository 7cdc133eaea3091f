"""The audit on lakehouses made by hand, and the whole of it on the real platform: nothing differs without being found."""

import subprocess
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from confluent_kafka.admin import AdminClient
from pyspark.sql import Row, SparkSession

from batch.postgres import connect
from conf.former_rules import CoordinatedUsers, NightQuantity
from conf.lists import Entries, packed
from conf.rules import FraudRules, load_rules
from conf.settings import Settings
from jobs.replay import sinks_of
from streaming.history import causes, differences
from streaming.history.audit import Audit, Counts, audit
from streaming.history.causes import Reached
from streaming.history.differences import UNCAUSED, snapshot
from streaming.history.replay import Draft
from streaming.history.rescreening import Period
from streaming.history.unarchived import reached
from streaming.kafka import ORDERS, TOPICS, create_topics, existing_topics, librdkafka_config
from streaming.lakehouse.tables import silver_orders
from streaming.rules.proposals import Application
from streaming.rules.recorded import RulesInForce
from tests.oracle.bad_messages import BAD
from tests.oracle.brute_force import NO_TIMESTAMP, Judgement, Message
from tests.oracle.lakes import RECEIVED, START, Lake, in_turn, lake_of, purchase, received
from tests.oracle.order_sets import six_rules, spelled
from tests.runs import screening as screening_runs
from tests.runs.archive import archive_all, committed, raw_orders, rows, wait_until
from tests.runs.commands import FINPRO, finpro
from tests.runs.exports import execute
from tests.runs.screening import dense_orders, repeated

RULES = FraudRules(version="1")
ACROSS = FraudRules.model_validate(tomllib.loads(Path("conf/fraud_rules.toml").read_text() + screening_runs.ACROSS_PRODUCTS))
ALWAYS = Period(None, None)
STEP = timedelta(milliseconds=400)


def dense_lake() -> tuple[Lake, Judgement]:
    """500 orders that hit all rules, across products too, some twice, some ids used twice, and bad messages of every kind."""
    values = repeated(dense_orders(500, RULES, seed=1, start=START, step=STEP), seed=1)
    for number, message in enumerate(BAD):
        values.insert(number, (message.value, number % 4))
    return lake_of(received(values, START + timedelta(seconds=1), STEP), ACROSS)


def found_in(spark: SparkSession, lake: Lake, period: Period = ALWAYS, reached: Reached | None = None) -> Audit:
    return audit(lake.snapshot(spark), period, reached or Reached())


def lines(found: Audit) -> list[Row]:
    return found.findings.collect()


def summary(found: Audit) -> set[tuple[str, str, Any]]:
    """What is wrong, why, and with which order or message."""
    return {(row["wrong"], row["cause"], row["order_id"] or (row["partition"], row["offset"])) for row in lines(found)}


def unexplained(*findings: tuple[str, Any]) -> set[tuple[str, str, Any]]:
    return {(wrong, causes.UNEXPLAINED, what) for wrong, what in findings}


def test_where_everything_is_as_the_brute_force_says_the_audit_is_empty_and_says_over_how_much(
    spark_session: SparkSession,
) -> None:
    lake, judgement = dense_lake()
    found = found_in(spark_session, lake)
    assert summary(found) == set()
    assert found.counts == Counts(len(judgement.orders), judgement.duplicates, len(judgement.dead_letters))
    assert found.counts.messages == len(lake.messages)


def test_whatever_is_tampered_with_is_found_and_has_no_excuse(spark_session: SparkSession) -> None:
    lake, judgement = dense_lake()
    having = {
        reason: [order_id for order_id, verdict in judgement.orders.items() if reason in verdict.reasons]
        for reason in ("foreign_country", "coordinated_users", "busy_user")
    }
    genuine = [order_id for order_id, verdict in judgement.orders.items() if not verdict.reasons]
    single, pattern = (
        having["foreign_country"][0],
        next(one for one in having["coordinated_users"] if one != having["foreign_country"][0]),
    )
    across = next(one for one in having["busy_user"] if one not in (single, pattern))
    for order_id, reason in ((single, "foreign_country"), (pattern, "coordinated_users"), (across, "busy_user")):
        lake.says(order_id, *(one for one in judgement.orders[order_id].reasons if one != reason))
    lake.says(genuine[0], "repeat_purchase")
    lake.silver.remove(lake.order(genuine[1]))
    lake.order(genuine[2])["status"] = "Fraud"
    lake.silver.append(lake.order(genuine[3]) | {"order_id": "ghost"})
    lake.silver.append(lake.order(genuine[4]))
    lake.order(genuine[5])["amount_numeric"] += 1
    lake.order(genuine[6])["rules_version"] = "never"
    lake.order(genuine[7])["shadow_reasons"] = ["night_amount"]
    lake.order(genuine[8])["suppressed_reasons"] = ["night_amount"]
    lost, doubled, *_ = lake.quarantine
    lake.quarantine.remove(lost)
    standing = next(
        message for message in lake.messages if judgement.orders.keys() and message.place not in judgement.dead_letters
    )
    lake.quarantine += [doubled, doubled | {"partition": standing.partition, "offset": standing.offset}]
    assert summary(found_in(spark_session, lake)) == unexplained(
        (differences.REASONS_MISSING, single),
        (differences.REASONS_MISSING, pattern),
        (differences.REASONS_MISSING, across),
        (differences.REASONS_SURPLUS, genuine[0]),
        (differences.ORDER_MISSING, genuine[1]),
        (differences.STATUS_WRONG, genuine[2]),
        (differences.ORDER_UNKNOWN, "ghost"),
        (differences.ORDER_DOUBLED, genuine[4]),
        (differences.ORDER_DIFFERS, genuine[5]),
        (differences.RULES_UNKNOWN, genuine[6]),
        (differences.REASONS_SURPLUS, genuine[7]),
        (differences.REASONS_SURPLUS, genuine[8]),
        (differences.DEAD_LETTER_MISSING, (lost["partition"], lost["offset"])),
        (differences.DEAD_LETTER_DOUBLED, (doubled["partition"], doubled["offset"])),
        (differences.DEAD_LETTER_SURPLUS, (standing.partition, standing.offset)),
    )


def test_a_period_is_audited_with_the_neighbours_around_it_and_nothing_else(spark_session: SparkSession) -> None:
    lake, judgement = dense_lake()
    since, until = START + timedelta(seconds=60), START + timedelta(seconds=120)
    for row in lake.silver[::7]:
        row["reasons"], row["status"] = [], "Genuine"
    tampered = {row["order_id"] for row in lake.silver[::7] if judgement.orders[row["order_id"]].reasons}
    inside = {order_id for order_id in tampered if since <= judgement.orders[order_id].event_ts < until}
    assert 0 < len(inside) < len(tampered)
    found = found_in(spark_session, lake, Period(since, until))
    assert summary(found) == unexplained(*((differences.REASONS_MISSING, order_id) for order_id in inside))
    assert found.counts.orders == sum(since <= verdict.event_ts < until for verdict in judgement.orders.values())


def test_only_what_a_late_order_would_have_completed_is_late(spark_session: SparkSession) -> None:
    newest = purchase("newest", 99, 100, product=9)
    on_time = [purchase("a", 1, 0), purchase("b", 7, 1), *(purchase(f"d{user}", user, 0, product=6) for user in (1, 7, 20))]
    late = [purchase("c", 20, 2), purchase("e", 30, 2, product=6), purchase("f", 40, 3, product=8, country="SG")]
    lake, judgement = lake_of(in_turn([*on_time, newest, *late]), RULES)
    assert {order_id for order_id, verdict in judgement.orders.items() if "coordinated_users" in verdict.reasons} == {
        *("a", "b", "c"),
        *("d1", "d7", "d20", "e"),
    }
    for order_id in ("a", "b", "c", "e", "d7", "f"):
        lake.says(order_id)
    found = lines(found_in(spark_session, lake))
    cause = {row["order_id"]: row["cause"] for row in found}
    assert cause == dict.fromkeys(("a", "b", "c", "e"), causes.LATE) | dict.fromkeys(("d7", "f"), causes.UNEXPLAINED)
    why = {row["order_id"]: row["why"] for row in found}
    late_by = "needs order c, which came 98.0 s behind the newest event time received until then (30.0 s are on time)"
    assert why["a"] == f"coordinated_users {late_by}"
    assert why["d7"] == UNCAUSED[differences.REASONS_MISSING]


def test_across_products_too_only_what_a_late_order_would_have_completed_is_late(spark_session: SparkSession) -> None:
    entries = {
        "three": {"by": ["user_id"], "count": {"at_least": 3, "within": "1 h"}},
        "many": {"by": ["user_id"], "when": "quantity = 2", "count": {"at_least": 25, "within": "1 h"}},
    }
    rules = FraudRules.model_validate({"version": "1", "rules": entries})
    many = [purchase(f"m{number}", 5, number, product=number % 3 + 1, quantity=2) for number in range(24)]
    others = [("a", 1, 0), ("b", 1, 9), ("c", 1, 20), ("d", 2, 1), ("e", 2, 2), ("newest", 99, 100)]
    on_time = [purchase(name, user, second, product=len(name) + second + 1) for name, user, second in others]
    late = [purchase("f", 2, 3, product=8), purchase("z", 5, 22.5, product=9, quantity=2)]
    lake, judgement = lake_of(in_turn([*many, *on_time, *late]), rules)
    assert judgement.orders["m0"].reasons == ["many", "three"]
    assert summary(found_in(spark_session, lake)) == set()
    lake.says("a")
    lake.says("d")
    lake.says("m0", "three")
    found = {row["order_id"]: (row["cause"], row["why"]) for row in lines(found_in(spark_session, lake))}
    late_by = "needs order f, which came 97.0 s behind the newest event time received until then (30.0 s are on time)"
    assert found == {
        "a": (causes.UNEXPLAINED, UNCAUSED[differences.REASONS_MISSING]),
        "d": (causes.LATE, f"three {late_by}"),
        "m0": (causes.LATE, "many needs more orders than the 20 that are named"),
    }


def test_a_pattern_across_a_change_of_the_rules_is_explained_and_one_on_either_side_is_not(spark_session: SparkSession) -> None:
    changed = RECEIVED + timedelta(seconds=3.5)  # between the fourth message and the fifth
    stricter = six_rules("2", coordinated_users=CoordinatedUsers(users=4))
    before = [
        purchase("a", 1, 0),
        purchase("x", 1, 0, product=6),
        purchase("y", 7, 0, product=6),
        purchase("z", 20, 0, product=6),
    ]
    after = [
        purchase("c", 20, 2),
        purchase("b", 7, 1),
        *(purchase(f"x{number}", 1, 3, product=6, quantity=number) for number in (2, 3)),
        *(purchase(f"n{user}", user, 4, product=7) for user in (1, 7, 20, 30)),
    ]
    lake, _ = lake_of(in_turn([*before, *after]), RULES)
    lake.history.append(RulesInForce(changed, stricter))
    for order in after:
        lake.says(order.order_id, rules_version="2")
    lake.says("a")  # under the rules of its time three users are enough, but the third came under the others
    lake.says("x", "coordinated_users", "repeat_purchase", rules_version="2")  # the one by the old rules, the other by the new
    lake.says("x2", "repeat_purchase", rules_version="2")
    lake.says("x3", "repeat_purchase", rules_version="2")
    for user in (1, 7, 20):
        lake.says(f"n{user}", "coordinated_users", rules_version="2")
    lake.says("b", "coordinated_users", rules_version="2")  # no rules in force since it was received give it that
    found = lines(found_in(spark_session, lake))
    assert {(row["order_id"], row["wrong"], row["cause"]) for row in found} == {
        ("a", differences.REASONS_MISSING, causes.RULES_CHANGED),
        ("x", differences.REASONS_SURPLUS, causes.RULES_CHANGED),
        ("n30", differences.REASONS_MISSING, causes.UNEXPLAINED),
        ("b", differences.REASONS_SURPLUS, causes.UNEXPLAINED),
    }


def test_a_list_suppresses_what_it_suppressed_then(spark_session: SparkSession) -> None:
    """Until the fifth message user 1 is on a list."""
    content = packed(Entries(["1"], ["known"], [None]))
    allowing = {"file": "known.csv", "allows": {"by": "user_id", "reasons": ["foreign_country"]}, "content": content}
    listing = FraudRules.model_validate(RULES.model_dump() | {"lists": {"known": allowing}})
    then = ["suppressed", "given", "lacking", "moved"]
    later = ["given later", "suppressed later"]
    placed = [purchase(name, 1, 20 * number, country="SG") for number, name in enumerate([*then, *later])]
    lake, judgement = lake_of(in_turn(placed), listing)
    assert {tuple(verdict.suppressed_reasons) for verdict in judgement.orders.values()} == {("foreign_country",)}
    lake.history.append(RulesInForce(RECEIVED + timedelta(seconds=3.5), six_rules("2")))
    lake.says("given", "foreign_country", suppressed_reasons=[])
    lake.says("lacking", suppressed_reasons=None)
    for order_id in ("moved", "given later"):
        lake.says(order_id, "foreign_country", rules_version="2", suppressed_reasons=[])
    lake.says("suppressed later", rules_version="2")
    found = lines(found_in(spark_session, lake))
    reason, suppressed = ["foreign_country"], ["foreign_country (suppressed)"]
    assert {row["order_id"]: (row["wrong"], row["streamed"], row["expected"]) for row in found} == {
        "given": (differences.REASONS_SURPLUS, reason, suppressed),
        "lacking": (differences.REASONS_MISSING, [], suppressed),
        "suppressed later": (differences.REASONS_MISSING, suppressed, reason),
    }
    assert {row["cause"] for row in found} == {causes.UNEXPLAINED}


@pytest.mark.parametrize("is_known", [True, False])
def test_the_stream_was_not_certain_to_see_an_order_that_rules_were_applied_to_later_and_these_have_no_excuse(
    spark_session: SparkSession, is_known: bool
) -> None:
    """`a` and `d` to `g` came before the rules of today, `b` and `c` after; then these were applied to those."""
    former = six_rules("1", coordinated_users=CoordinatedUsers(users=4), night_quantity=NightQuantity(above=1000))
    before = [
        purchase("a", 1, 0),
        purchase("d", 2, -8 * 3600, product=7, quantity=101),
        *(purchase(f"{name}", user, 0, product=6) for name, user in zip("efg", (1, 7, 20), strict=True)),
    ]
    lake, _ = lake_of(in_turn([*before, purchase("b", 7, 1), purchase("c", 20, 2)]), former)
    lake.history.append(RulesInForce(RECEIVED + timedelta(seconds=4.5), RULES.model_copy(update={"version": "2"})))
    at = RECEIVED + timedelta(seconds=5.5)  # between b and c
    for order_id in "adefg":
        lake.says(order_id, *(["coordinated_users"] if order_id in "fg" else []), rules_version="2", screened_at=at)
    for order_id in "bc":  # the stream no longer knew a
        lake.says(order_id, rules_version="2")
    if is_known:
        lake.applications.append(Application(1, "2", START - timedelta(days=1), None, at, "sari", "INC-481", 5, []))
    found = lines(found_in(spark_session, lake))
    cause = {row["order_id"]: row["cause"] for row in found}
    assert {row["wrong"] for row in found} == {differences.REASONS_MISSING}
    assert cause == dict.fromkeys("abc", causes.APPLIED if is_known else causes.UNEXPLAINED) | dict.fromkeys(
        "de", causes.UNEXPLAINED
    )
    why = {row["order_id"]: row["why"] for row in found}
    if is_known:
        assert why["b"] == (
            "coordinated_users needs order a, which the stream screened by rules version 1;"
            " later version 2 was applied to it by sari: INC-481"
        )


def test_declared_fields_are_read_as_the_rules_of_then_declared_them(spark_session: SparkSession) -> None:
    """The stream has read the first four messages only after the field was declared, but for `before`."""
    fields: dict[str, dict[str, Any]] = {
        "before": {"device": 5},
        "behind": {"device": "d666"},
        "refused": {"device": 5},
        "plain": {"device": "d666"},  # screened by the rules that do not know it
        "on time": {"device": "d666"},
        "lost": {"device": "d666"},
        "broken": {"device": 5},
        "unseen": {"device": 5},
    }
    values = [
        msgspec.json.encode(msgspec.json.decode(spelled(purchase(order_id, user, 20 * user))) | more)
        for user, (order_id, more) in enumerate(fields.items(), 1)
    ]
    lake, _ = lake_of(received([(value, 0) for value in values], RECEIVED, timedelta(seconds=1)), RULES)
    declared = FraudRules.model_validate(
        {"version": "2", "fields": {"device": "string"}, "rules": {"bad_device": {"when": "device = 'd666'"}}}
    )
    lake.history.append(RulesInForce(RECEIVED + timedelta(seconds=3.5), declared))
    for order_id in ("behind", "on time"):
        lake.says(order_id, "bad_device", rules_version="2")
    lake.says("lost", rules_version="2")
    for order_id in ("refused", "broken", "unseen"):
        lake.silver.remove(lake.order(order_id))
    for offset in (2, 6):
        message = lake.messages[offset]
        lake.quarantine.append(
            {"topic": ORDERS, "partition": 0, "offset": offset, "received_at": message.timestamp, "value": message.value}
            | {"reason": "breaks the contract", "received_date": message.timestamp.date()}
        )
    assert summary(found_in(spark_session, lake)) == unexplained(
        (differences.REASONS_MISSING, "lost"), (differences.DEAD_LETTER_MISSING, (0, 7))
    )


@pytest.mark.parametrize(
    ("partition", "offset", "cause"), [(1, 0, causes.STORED_FIRST), (0, 0, causes.STORED_FIRST), (0, 6, causes.UNEXPLAINED)]
)
def test_of_two_orders_with_one_id_the_first_may_lose_only_to_another_partition_or_a_smaller_offset(
    spark_session: SparkSession, partition: int, offset: int, cause: str
) -> None:
    first, second = purchase("o", 1, 0), purchase("o", 2, 0)
    lake, _ = lake_of([Message(ORDERS, partition, offset, START, None, spelled(second))], RULES)
    lake.messages.append(lake.messages[0].__class__(ORDERS, 0, 5, START - STEP, None, spelled(first)))
    lake.quarantine.append(
        {"topic": ORDERS, "partition": 0, "offset": 5, "received_at": START - STEP, "value": spelled(first)}
        | {"reason": "used", "received_date": START.date()}
    )
    assert summary(found_in(spark_session, lake)) == {(differences.NOT_THE_FIRST, cause, "o")}


def test_what_has_not_come_so_far_is_no_fault_and_what_should_have_is(spark_session: SparkSession) -> None:
    lake, _ = lake_of(in_turn([purchase(name, number, 20 * number) for number, name in enumerate("abcd", 1)]), RULES)
    lake.silver = lake.silver[:1]
    announced = spark_session.createDataFrame([("b", [])], "order_id string, announced array<string>")
    assert summary(found_in(spark_session, lake, reached=Reached({0: 3}, announced, None))) == {
        (differences.ORDER_MISSING, causes.NOT_ARCHIVED, "b"),
        (differences.ORDER_MISSING, causes.UNEXPLAINED, "c"),
        (differences.ORDER_MISSING, causes.NOT_SCREENED, "d"),
    }


AHEAD_OF_START = (
    f"event_ts lies in the future of {START:%Y-%m-%dT%H:%M:%S}.000000Z, when it was read, as its Kafka timestamp does"
)


@pytest.mark.parametrize("is_archived", [True, False])
def test_what_was_ahead_of_when_the_stream_read_it_is_a_dead_letter_to_the_audit_too(
    spark_session: SparkSession, is_archived: bool
) -> None:
    """The Kafka timestamps are a producer's whose clock is 50 minutes ahead, and all of it has happened by now."""
    orders = [purchase("ahead", 9, 3000), purchase("lost", 9, 2900), purchase("told too much", 8, 50), purchase("fine", 7, 3)]
    stamped = received([(spelled(order), 0) for order in orders], START + timedelta(minutes=50), timedelta(0))
    lake, judgement = lake_of(stamped, RULES)
    assert len(judgement.orders) == 4
    dead_letters = [
        {"topic": ORDERS, "partition": 0, "offset": offset, "received_at": stamped[offset].timestamp, "value": b""}
        | {"reason": AHEAD_OF_START, "received_date": START.date()}
        for offset in (0, 2)
    ]
    lake.silver = [row for row in lake.silver if row["order_id"] == "fine"]
    on_kafka = None
    if is_archived:
        lake.quarantine = dead_letters
    else:
        places = [(dead_letter["partition"], dead_letter["offset"], dead_letter["reason"]) for dead_letter in dead_letters]
        on_kafka = spark_session.createDataFrame(places, "partition int, offset bigint, reason string")
    found = summary(found_in(spark_session, lake, reached=Reached(dead_letters=on_kafka)))
    lost = {(differences.ORDER_MISSING, "lost"), (differences.ORDER_MISSING, "told too much")}
    surplus = {(differences.DEAD_LETTER_SURPLUS, (0, 2))} if is_archived else set()
    missing = set() if is_archived else {(differences.DEAD_LETTER_MISSING, causes.NOT_ARCHIVED, "ahead")}
    assert found == unexplained(*lost, *surplus) | missing


def test_what_is_ahead_of_the_audit_itself_has_to_be_a_dead_letter(spark_session: SparkSession) -> None:
    stamped = received([(spelled(purchase("ahead", 9, 3000)), 0)], START + timedelta(minutes=50), timedelta(0))
    lake, _ = lake_of(stamped, RULES)
    lake.looked_at = START
    assert summary(found_in(spark_session, lake)) == unexplained(
        (differences.DEAD_LETTER_MISSING, (0, 0)), (differences.ORDER_UNKNOWN, "ahead")
    )


def test_an_order_without_a_kafka_timestamp_belongs_to_its_period_and_makes_no_other_late(spark_session: SparkSession) -> None:
    users = (1, 7, 20)
    early = [purchase(f"early-{user}", user, second) for second, user in enumerate(users)]
    undated = [purchase(f"undated-{user}", user, 5000 + second) for second, user in enumerate(users)]
    lake, judgement = lake_of(
        [
            *in_turn(early),
            *(Message(ORDERS, 1, offset, NO_TIMESTAMP, None, spelled(order)) for offset, order in enumerate(undated)),
        ],
        RULES,
    )
    assert {tuple(verdict.reasons) for verdict in judgement.orders.values()} == {("coordinated_users",)}
    period = Period(START + timedelta(seconds=4000), None)
    assert summary(found_in(spark_session, lake, period)) == set()
    assert found_in(spark_session, lake, period).counts.orders == 3
    lake.says("early-1")
    lake.says("undated-1")
    assert summary(found_in(spark_session, lake)) == unexplained(
        (differences.REASONS_MISSING, "early-1"), (differences.REASONS_MISSING, "undated-1")
    )


@pytest.mark.timeout(600)
def test_late_orders_are_named_repair_mends_their_patterns_and_time_travel_still_shows_the_old_verdicts(
    spark_session: SparkSession, settings: Settings, tmp_path: Path
) -> None:
    rules = load_rules(settings.rules)
    orders = dense_orders(600, rules, seed=5, start=datetime.now(UTC) - timedelta(hours=1), step=STEP)
    late = orders[3::10]
    screening_runs.send(settings, screening_runs.by_product([order for order in orders if order not in late]))
    assert screening_runs.run_screen("--available-now").returncode == 0
    screening_runs.send(settings, screening_runs.by_product(late))
    assert screening_runs.run_screen("--available-now").returncode == 0
    archive_all()
    before = rows(spark_session, silver_orders(settings.lakehouse)).sort("order_id")
    version = committed(silver_orders(settings.lakehouse)) - 1
    expected = screening_runs.judged(settings, rules)

    repaired = finpro("audit", "--repair", "--output", str(tmp_path / "findings.csv"))
    assert repaired.returncode == 0, repaired.stderr
    assert "behind the newest event time received until then" in repaired.stdout
    found = spark_session.read.option("header", True).csv(str(tmp_path / "findings.csv")).collect()
    reasons = {row["order_id"]: row["reasons"] for row in before.to_dicts()}
    lacking = {order_id for order_id, verdict in expected.orders.items() if verdict.reasons != reasons[order_id]}
    assert lacking
    assert {row["order_id"] for row in found} == lacking
    assert {row["cause"] for row in found} == {causes.LATE}

    archive_all()
    assert audit(snapshot(spark_session, settings.lakehouse, settings.topic(ORDERS)), ALWAYS, Reached()).found == {}
    screening_runs.assert_agrees(screening_runs.outcome(settings), expected)
    assert rows(spark_session, silver_orders(settings.lakehouse), version).sort("order_id").equals(before)

    stored = raw_orders(settings)
    forget(settings)
    assert raw_orders(settings) == []
    replayed = finpro("screen", "--from-bronze")
    assert replayed.returncode == 0, replayed.stderr
    assert without_times(raw_orders(settings)) == without_times(stored)
    screening_runs.assert_agrees(screening_runs.outcome(settings), expected)
    assert "--starting-offsets 'earliest'" in replayed.stdout


APPLY = ("rules", "apply", "--by", "sari", "--why", "INC-481")


@pytest.mark.timeout(600)
def test_rules_applied_to_orders_of_before_are_announced_once_whatever_is_killed_and_the_audit_is_empty(
    spark_session: SparkSession, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than half a minute: it screens and archives twice, and is killed as a process of its own."""
    path = tmp_path / "rules.toml"
    monkeypatch.setenv("FINPRO_RULES", str(path))
    path.write_text('version = "1"\n')
    first_day = datetime.now(UTC).replace(hour=3, minute=0) - timedelta(days=6)
    days = [dense_orders(120, RULES, seed=day, start=first_day + timedelta(days=day), step=STEP) for day in range(5)]
    screening_runs.send(settings, screening_runs.by_product([order for orders in days for order in orders]))
    assert screening_runs.run_screen("--available-now").returncode == 0
    since = (*APPLY, "--since", days[1][0].event_ts.date().isoformat())
    assert finpro(*since).returncode == 15  # no lakehouse

    wider = 'version = "2"\n[coordinated_users]\nusers = 2\n[repeat_purchase]\norders = 2\n'
    path.write_text(wider)
    refused = finpro(*since)
    assert (refused.returncode, "has not taken up" in refused.stderr) == (21, True)
    assert screening_runs.run_screen("--available-now").returncode == 0
    archive_all()
    stored = raw_orders(settings)
    before = {row["order_id"]: row["reasons"] for row in stored}
    sent = screening_runs.outcome(settings).verdicts_sent
    expected = screening_runs.judged(settings, load_rules(path))
    later = {order.order_id for orders in days[1:] for order in orders}
    grown = {name for name in later if set(expected.orders[name].reasons) - set(before[name])}
    assert 0 < len(grown) < len(later)

    newest = "where number = (select max(number) from screening_ledger)"
    execute(settings, f"update screening_ledger set settled_at = null {newest}")  # as if it were at work still
    refused = finpro(*since)
    assert (refused.returncode, "is being screened by rules 1" in refused.stderr) == (21, True)
    execute(settings, f"update screening_ledger set settled_at = moment {newest}")

    tried = finpro("rules", "apply", *since[len(APPLY) :], "--dry-run")
    assert (tried.returncode, f"{len(grown):,} orders get further reasons" in tried.stdout) == (0, True), tried.stderr
    limited = finpro(*since, "--max-alerts", str(len(grown) - 1))
    assert (limited.returncode, f"{len(grown):,} alerts" in limited.stderr) == (19, True)
    assert raw_orders(settings) == stored
    assert screening_runs.outcome(settings).verdicts_sent == sent

    killed = subprocess.Popen([FINPRO, *since, "--max-alerts", str(len(grown))], start_new_session=True, text=True)
    try:
        wait_until(lambda: days_done(settings) > 0)
    finally:
        screening_runs.kill_group(killed)
    done = days_done(settings)
    assert 0 < done < 4
    other = finpro(*since, "--until", datetime.now(UTC).isoformat())
    assert (other.returncode, "is unfinished" in other.stderr) == (21, True)
    rest = finpro(*since)
    assert rest.returncode == 0, rest.stderr
    assert f"application 1, which sari began, has {4 - done} days left" in rest.stdout

    now = {row["order_id"]: row for row in raw_orders(settings)}
    assert {name: now[name]["reasons"] for name in later} == {name: expected.orders[name].reasons for name in later}
    assert {name: row["reasons"] for name, row in now.items() if name not in later} == {
        name: reasons for name, reasons in before.items() if name not in later
    }
    assert {name for name, row in now.items() if row["rules_version"] == "2"} == grown
    found = screening_runs.outcome(settings)
    marked = {name: verdict for name, verdict in found.last_verdicts.items() if verdict.get("application") == 1}
    assert marked.keys() == grown
    for name, verdict in marked.items():
        assert verdict["reasons"] == sorted(found.alerts[name]["evidence"]) == now[name]["reasons"]
        assert datetime.fromisoformat(verdict["screened_at"]) == now[name]["screened_at"]
        assert found.alerts[name]["application"] == 1

    said = found.verdicts_sent
    again = finpro(*since)  # before the archive knows of it
    assert "0 orders get further reasons" in again.stdout
    archive_all()
    audited = finpro("audit")
    assert audited.returncode == 0, audited.stdout
    assert f"rules 2 were applied to orders of before by sari: {len(grown):,} orders (INC-481)" in audited.stdout
    assert "every verdict and every dead letter is what it has to be" in audited.stdout
    again = finpro(*since)
    assert (again.returncode, "0 orders get further reasons" in again.stdout) == (0, True), again.stderr
    assert screening_runs.outcome(settings).verdicts_sent == said
    assert f"(applied to {len(grown):,} orders of before" in finpro("rules", "history").stdout


def days_done(settings: Settings) -> int:
    with connect(settings.require("postgres_dsn")) as connection, connection.cursor() as cursor:
        cursor.execute("select count(*) from rules_application_days")
        return int(cursor.fetchall()[0][0])


def test_a_replay_goes_on_where_it_was_stopped_and_doubles_nothing(
    spark_session: SparkSession, settings: Settings, tmp_path: Path
) -> None:
    days = [dense_orders(120, RULES, seed=day, start=START + timedelta(days=day), step=STEP) for day in range(3)]
    values = [(spelled(order), order.product_id % 4) for orders in days for order in orders] + [(b"{", 0)]
    lake, judgement = lake_of(received(values, START + timedelta(days=3), STEP), RULES)
    stripped = next(row for row in lake.silver if row["reasons"])  # a verdict in force stays, right or wrong
    stripped.update({"reasons": [], "status": "Genuine"})
    lost = lake.silver.pop()
    where = sinks_of(settings)
    draft = Draft(spark_session, str(tmp_path), where.screened_at)
    draft.write(lake.snapshot(spark_session))
    stopped = next(draft.publish(where))
    resumed = Draft.unfinished(spark_session, str(tmp_path))
    assert resumed is not None
    rest = list(resumed.publish(sinks_of(settings)))
    assert sum(day.orders.announced for day in [stopped, *rest]) == len(judgement.orders)
    assert sum(day.dead_letters.announced for day in [stopped, *rest]) == 1
    on_their_way = reached(spark_session, settings).verdicts  # the archive has committed nothing: all that Kafka holds
    assert on_their_way is not None
    assert {row["order_id"] for row in on_their_way.collect()} == judgement.orders.keys()
    compared = ("order_id", "reasons", "status", "rules_version")
    expected = {row["order_id"]: tuple(row[name] for name in compared) for row in [*lake.silver, lost]}
    assert {row["order_id"]: tuple(row[name] for name in compared) for row in raw_orders(settings)} == expected
    assert {row["screened_at"] for row in raw_orders(settings)} == {where.screened_at}
    sent = screening_runs.outcome(settings)
    assert set(sent.verdicts_sent.values()) == {1}
    assert {order_id: verdict["reasons"] for order_id, verdict in sent.last_verdicts.items()} == {
        order_id: reasons for order_id, reasons, *_ in expected.values()
    }
    assert list(sent.dead_letters_sent.values()) == [1]


def forget(settings: Settings) -> None:
    """Empty Postgres and all topics, as if they had been lost."""
    with connect(settings.require("postgres_dsn")) as connection, connection.cursor() as cursor:
        cursor.execute("truncate raw_orders")
    admin = AdminClient(librdkafka_config(settings))
    for deleted in admin.delete_topics([settings.topic(topic) for topic in TOPICS]).values():
        deleted.result(timeout=20)
    wait_until(lambda: not {settings.topic(topic) for topic in TOPICS} & existing_topics(settings).keys())
    create_topics(settings, partitions=4)


def without_times(stored: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "screened_at"} for row in stored]
