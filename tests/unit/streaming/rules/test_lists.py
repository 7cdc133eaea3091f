"""What a condition finds in a list. No JVM."""

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from conf.errors import RulesError
from conf.rules import FraudRules, load_rules
from streaming.contract import UTC_MICROSECONDS
from streaming.rules.examples import tried
from streaming.rules.lists import allowed
from streaming.rules.rules import findings

NOON = datetime(2026, 11, 1, 12, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
RULES = """
version = "1"
[fields]
device_id = "string"
[lists.devices]
file = "devices.csv"
[lists.users]
file = "users.csv"
[rules.device]
when = "listed(device_id, 'devices')"
[rules.user]
when = "quantity > 1 and listed(user_id, 'users')"
[rules.other]
when = "not listed(device_id, 'devices')"
[rules.pair]
by = ["product_id", "user_id"]
count = { at_least = 2, within = "10 s" }
when = "listed(device_id, 'devices')"
[[rules.device.examples]]
hit = true
orders = [{ device_id = "d1" }]
[[rules.device.examples]]
hit = false
orders = [{ device_id = "d3" }, {}]
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "devices.csv").write_text("value,reason,expiry\nd1,stolen,\nd2,lost,2026-11-01T12:00:00Z\n")
    (tmp_path / "users.csv").write_text("value,reason,expiry\n7,,\n70,x,\n")
    (tmp_path / "rules.toml").write_text(RULES)
    return tmp_path / "rules.toml"


def table(*orders: tuple[str | None, int, datetime]) -> pl.DataFrame:
    """Orders of a device, a user, at a moment."""
    return pl.DataFrame(
        {
            "order_id": [f"o{number}" for number in range(len(orders))],
            "user_id": [user for _, user, _ in orders],
            "product_id": [1] * len(orders),
            "quantity": [2] * len(orders),
            "event_ts": pl.Series([moment for *_, moment in orders], dtype=UTC_MICROSECONDS),
            "attributes": [device and f'{{"device_id":"{device}"}}' for device, *_ in orders],
        },
        schema_overrides={"attributes": pl.String()},
    )


def rows(orders: pl.DataFrame, rules: FraudRules) -> dict[str, list[int]]:
    return {name: sorted(finding.rows.tolist()) for name, finding in findings(orders, rules).items()}


def test_an_order_is_hit_by_what_is_listed_at_its_event_time_and_what_it_lacks_is_neither_listed_nor_not(path: Path) -> None:
    orders = table(("d1", 1, NOON), ("d2", 1, NOON - MICROSECOND), ("d2", 7, NOON), (None, 70, NOON), ("d3", 8, NOON))
    assert rows(orders, load_rules(path)) == {"device": [0, 1], "other": [2, 4], "pair": [0, 1], "user": [2, 3]}


ALLOWING = """
[lists.testers]
file = "users.csv"
allows = { by = "user_id", reasons = ["user", "pair"] }
[lists.known_products]
file = "products.csv"
allows = { by = "product_id", reasons = ["user"] }
"""


def test_an_order_is_allowed_by_an_entry_that_holds_at_its_event_time_whichever_list_it_is_on(path: Path) -> None:
    path.write_text(RULES + ALLOWING)
    path.with_name("users.csv").write_text("value,reason,expiry\n7,,2026-11-01T12:00:00Z\n70,x,\n")
    path.with_name("products.csv").write_text("value,reason,expiry\n2,,\n")
    orders = table(("d1", 7, NOON - MICROSECOND), ("d1", 7, NOON), ("d1", 70, NOON), ("d1", 8, NOON))
    found = allowed(orders, load_rules(path))
    assert {name: which.tolist() for name, which in found.items()} == {
        "user": [True, False, True, False],
        "pair": [True, False, True, False],
    }
    of_product = allowed(orders.with_columns(product_id=2), load_rules(path))
    assert [of_product["user"].all(), of_product["pair"].all()] == [True, False]
    path.write_text(RULES)
    assert allowed(orders, load_rules(path)) == {}


def test_an_example_of_somebody_who_is_on_a_list_is_not_hit(path: Path) -> None:
    example = "[[rules.other.examples]]\nhit = {hit}\norders = [{{ user_id = {user}, device_id = 'd9' }}]\n"
    allowing = ALLOWING.replace('["user", "pair"]', '["other", "user"]')
    path.with_name("products.csv").write_text("value,reason,expiry\n2,,\n")
    path.write_text(RULES + allowing + example.format(hit="false", user=7) + example.format(hit="true", user=8))
    assert tried(path) == "4 examples of 2 rules hold."
    path.write_text(RULES + allowing + example.format(hit="true", user=7))
    with pytest.raises(RulesError, match="other, example 1: order 1 must be hit and is not"):
        tried(path)


def test_the_evidence_says_why_it_is_listed(path: Path) -> None:
    found = findings(table(("d1", 7, NOON)), load_rules(path))
    assert found["device"].value.to_list() == [{"device_id": "d1", "listed(device_id, 'devices')": "stolen"}]
    assert found["user"].value.to_list() == [{"quantity": 2, "user_id": 7, "listed(user_id, 'users')": ""}]
    assert found["device"].limit == "listed(device_id, 'devices')"


def test_examples_know_lists(path: Path) -> None:
    assert tried(path) == "2 examples of 1 rules hold."


def test_another_list_is_another_content_of_the_rules(path: Path) -> None:
    before = load_rules(path)
    assert before == load_rules(path) == FraudRules.model_validate_json(before.model_dump_json())
    path.with_name("devices.csv").write_text("value,reason,expiry\nd3,,\n")
    after = load_rules(path)
    orders = table(("d1", 1, NOON), ("d3", 2, NOON))
    assert after != before
    assert [rows(orders, rules)["device"] for rules in (before, after)] == [[0], [1]]


def test_a_long_list_costs_a_micro_batch_next_to_nothing(path: Path) -> None:
    lines = [f"device-{number * 7_919 % 1_000_003},stolen,\n" for number in range(100_000)]
    path.with_name("devices.csv").write_text("value,reason,expiry\n" + "".join(lines))
    rules, orders = load_rules(path), table(("device-7919", 1, NOON), ("d1", 2, NOON))
    assert rows(orders, rules)["device"] == [0]
    taken = []
    for _ in range(5):
        begun = time.process_time()
        findings(orders, FraudRules.model_validate(rules))
        taken.append(time.process_time() - begun)
    assert min(taken) < 0.1, "to unpack it takes twice as long, once"
