"""How products are divided: as Kafka's clients do it, and fast for as many products as there are."""

import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from streaming.contract import BIGINT_MAX
from streaming.screening.division import keyed_partitions
from streaming.screening.micro_batch import in_parts
from tests.oracle.kafka_keys import keyed_partition


@given(st.lists(st.integers(1, BIGINT_MAX), max_size=20), st.integers(1, 300))
def test_a_product_is_looked_for_where_kafkas_clients_put_its_key(products: list[int], partitions: int) -> None:
    found = keyed_partitions(np.array(products, np.int64), partitions)
    assert found.tolist() == [keyed_partition(product, partitions) for product in products]


def test_a_micro_batch_beyond_the_limit_is_divided_and_one_as_spark_plans_it_is_not() -> None:
    as_planned = {0: (0, 99), 1: (5, 6), 2: (7, 8), 3: (0, 0)}  # Spark starves no partition
    assert in_parts(as_planned, 100) == [as_planned]
    assert in_parts(as_planned, None) == [as_planned]
    parts = in_parts({0: (10, 1_000), 1: (0, 7)}, 100)
    assert len(parts) == 10
    for partition, (first, end) in {0: (10, 1_000), 1: (0, 7)}.items():
        assert [part[partition][0] for part in parts] == [first, *(part[partition][1] for part in parts[:-1])]
        assert parts[-1][partition][1] == end


def test_many_products_take_no_time() -> None:
    products = np.arange(1, 300_001)
    started = time.process_time()
    keyed_partitions(products, 12)
    assert time.process_time() - started < 0.5  # a loop in Python takes seconds
