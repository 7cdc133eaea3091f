"""How products are divided into buckets: a bucket is screened by one task, which then knows all neighbours of its orders.

Where each product's orders lie in the partition that Kafka's own clients choose for the key `product_id`, a bucket is a
partition, and is screened by the task that reads it. Otherwise products are divided by number, and orders are shuffled.
"""

from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import numpy as np
import polars as pl
from kafka.partitioner.default import murmur2

from conf.errors import TopicNotKeyed
from streaming.rules.windows import Ints, ints


class By(StrEnum):
    """What a bucket is."""

    PARTITION = "partition"
    PRODUCT = "product"


@dataclass(frozen=True)
class Division:
    """All products, divided.

    Attributes:
        by: what a bucket is.
        buckets: how many there are.
    """

    by: By
    buckets: int

    def __str__(self) -> str:
        return f"{self.by}/{self.buckets}"

    def bucket_of(self, orders: pl.DataFrame) -> Ints:
        """The bucket of each order (ORDER_SCHEMA): of its product, wherever it was read."""
        if self.by is By.PRODUCT:
            return ints(orders["product_id"]) % self.buckets
        products, row = np.unique(ints(orders["product_id"]), return_inverse=True)
        homes = np.array([keyed_partition(int(product), self.buckets) for product in products], np.int64)
        return homes[row]

    def require_keyed(self, orders: pl.DataFrame) -> None:
        """Check that orders (ORDER_SCHEMA) were read where all others of their product are.

        Raises:
            TopicNotKeyed: one was not.
        """
        if self.by is By.PRODUCT:
            return
        partitions = ints(orders["partition"])
        elsewhere = np.flatnonzero(self.bucket_of(orders) != partitions)
        if len(elsewhere):
            product, partition = orders["product_id"][int(elsewhere[0])], partitions[elsewhere[0]]
            raise TopicNotKeyed(
                f"product {product} lies on partition {partition} of orders, where the key {product} would not lead to"
            )


@lru_cache(maxsize=100_000)
def keyed_partition(product_id: int, partitions: int) -> int:
    """The partition that Kafka's Java and Python clients choose for the key `product_id`."""
    return int((murmur2(str(product_id).encode()) & 0x7FFFFFFF) % partitions)
