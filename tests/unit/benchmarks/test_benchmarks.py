"""The benchmark's own claims: its load is what it says, its rival applies the rules, and its clock reads a checkpoint."""

import json
import os
from collections import Counter, defaultdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from confluent_kafka import Message as Received

from conf.rules import load_rules
from tests.benchmarks.arena import RULES
from tests.benchmarks.load import encode, make_orders
from tests.benchmarks.measure import BenchmarkError, Usage, timeline
from tests.benchmarks.rivals import peer
from tests.oracle.brute_force import Message, Verdict, judge, read, screen

START = datetime(2026, 11, 20, 9, 0, tzinfo=UTC)
COUNT = 4_000


@pytest.fixture(scope="module")
def orders() -> pl.DataFrame:
    return make_orders(COUNT, rules=load_rules(RULES), rate=2_000, start=START, seed=7)


def messages(orders: pl.DataFrame) -> list[Message]:
    received = START + timedelta(seconds=COUNT / 2_000)
    return [Message("orders", 0, offset, received, key, value) for offset, (key, value) in enumerate(encode(orders))]


def verdicts(orders: pl.DataFrame) -> dict[str, Verdict]:
    return judge(messages(orders), load_rules(RULES)).orders


def test_every_planted_order_is_a_fraud_for_its_label_and_frauds_are_about_four_percent(orders: pl.DataFrame) -> None:
    judged = verdicts(orders)
    labels = dict(orders.filter(pl.col("label").is_not_null()).select("order_id", "label").iter_rows())
    assert [order_id for order_id, label in labels.items() if label not in judged[order_id].reasons] == []
    assert len(set(labels.values())) == 6
    assert 0.04 <= sum(verdict.status == "Fraud" for verdict in judged.values()) / COUNT <= 0.05


def test_the_load_is_the_same_for_the_same_seed(orders: pl.DataFrame) -> None:
    assert make_orders(COUNT, rules=load_rules(RULES), rate=2_000, start=START, seed=7).equals(orders)
    assert not make_orders(COUNT, rules=load_rules(RULES), rate=2_000, start=START, seed=8).equals(orders)


def test_the_peer_gives_each_order_the_reasons_that_it_and_the_orders_before_it_make(orders: pl.DataFrame) -> None:
    rules, expected, of_product = load_rules(RULES), {}, defaultdict(list)
    for message in messages(orders):
        order = read(message, rules.max_future_skew)
        of_product[order.product_id].append(order)
        expected[order.order_id] = tuple(screen(of_product[order.product_id], rules)[order.order_id].reasons)
    received = [Received(topic="orders", partition=0, value=value) for _, value in encode(orders)]
    screened = peer.screener(rules)(received)
    assert {order.order_id: order.reasons for order in screened} == expected
    assert len(Counter(reason for reasons in expected.values() for reason in reasons)) == 6


def test_a_query_is_timed_from_its_start_to_its_last_commit(tmp_path: Path) -> None:
    query = tmp_path / "query"
    write(query / "metadata", "{}", at=100.0)
    for batch, (end, at) in enumerate([(10, 110.0), (40, 112.0), (70, 114.0)]):
        write(query / "offsets" / str(batch), "v1\n{}\n" + json.dumps({"orders": {"0": end, "1": end}}), at=at - 1)
        write(query / "commits" / str(batch), "v1\n{}", at=at)
    measured = timeline(tmp_path)
    assert (measured.seconds, measured.orders, measured.steady_rate) == (14.0, [20, 60, 60], 30.0)


def test_a_run_without_a_committed_batch_does_not_count(tmp_path: Path) -> None:
    write(tmp_path / "query" / "metadata", "{}", at=100.0)
    with pytest.raises(BenchmarkError, match="0 queries with a committed batch"):
        timeline(tmp_path)


def test_memory_that_grows_after_warming_up_shows() -> None:
    assert Usage(rss_mib=[10, 20, 40, 90, 100, 100, 100, 100, 100, 100, 100, 100]).growth == 1.0
    assert Usage(rss_mib=[10, 20, 40, 90, 100, 100, 100, 100, 150, 150, 200, 200]).growth == 2.0


def write(path: Path, text: str, *, at: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, (at, at))
