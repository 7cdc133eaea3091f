"""How products are divided: as Kafka's clients do it, and fast for as many products as there are."""

import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from streaming.contract import BIGINT_MAX
from streaming.screening.division import keyed_partitions
from tests.oracle.kafka_keys import keyed_partition


@given(st.lists(st.integers(1, BIGINT_MAX), max_size=20), st.integers(1, 300))
def test_a_product_is_looked_for_where_kafkas_clients_put_its_key(products: list[int], partitions: int) -> None:
    found = keyed_partitions(np.array(products, np.int64), partitions)
    assert found.tolist() == [keyed_partition(product, partitions) for product in products]


def test_many_products_take_no_time() -> None:
    products = np.arange(1, 300_001)
    started = time.process_time()
    keyed_partitions(products, 12)
    assert time.process_time() - started < 0.5  # a loop in Python takes seconds
