"""How products are divided into buckets: a bucket is screened by one task, which then knows all neighbours of its orders.

Where each product's orders lie in the partition that Kafka's own clients choose for the key `product_id`, a bucket is a
partition, and is screened by the task that reads it. Otherwise products are divided by number, and orders are shuffled.

For rules across products, orders are divided a second time, by the values of another field.
"""

from dataclasses import dataclass
from enum import StrEnum

import mmh3
import numpy as np
import polars as pl
from numpy.typing import NDArray

from conf.errors import TopicNotKeyed
from streaming.rules.windows import Ints, ints


class By(StrEnum):
    """What a bucket is."""

    PARTITION = "partition"
    PRODUCT = "product"
    FIELD = "by"


# Whose value it is that divides orders across products, as an integer.
KEY = "key"


@dataclass(frozen=True)
class Division:
    """All products, divided; or all values of another field.

    Attributes:
        by: what a bucket is.
        buckets: how many there are.
        of: where it is a share of the values of another field: which, and what else is remembered of an order.
    """

    by: By
    buckets: int
    of: str = ""

    def __str__(self) -> str:
        return f"{self.family}{self.buckets}" if self.family else f"{self.by}/{self.buckets}"

    @property
    def family(self) -> str:
        """What the names of divisions across products begin with whose states hold the same; blank for all by product."""
        return f"{By.FIELD} {self.of}/" if self.by is By.FIELD else ""

    @property
    def key(self) -> str:
        """The column of which orders that may be neighbours have one value, an integer."""
        return KEY if self.by is By.FIELD else "product_id"

    def bucket_of(self, orders: pl.DataFrame) -> Ints:
        """The bucket of each order: of its product, wherever it was read, or of its `key`."""
        if self.by is not By.PARTITION:
            return ints(orders[self.key]) % self.buckets
        products, row = np.unique(ints(orders["product_id"]), return_inverse=True)
        return keyed_partitions(products, self.buckets)[row]

    def require_keyed(self, orders: pl.DataFrame) -> None:
        """Check that orders (ORDER_SCHEMA) were read where all others of their product are.

        Raises:
            TopicNotKeyed: one was not.
        """
        if self.by is not By.PARTITION:
            return
        partitions = ints(orders["partition"])
        elsewhere = np.flatnonzero(self.bucket_of(orders) != partitions)
        if len(elsewhere):
            product, partition = orders["product_id"][int(elsewhere[0])], partitions[elsewhere[0]]
            raise TopicNotKeyed(
                f"product {product} lies on partition {partition} of orders, where the key {product} would not lead to"
            )


def keys_of(values: pl.Series) -> Ints:
    """The values of a field, none of them null, as integers that are the same everywhere and always.

    Two texts may have the same: these are then together for nothing, and rules tell them apart.
    """
    if values.dtype == pl.String:
        hashes = {text: mmh3.hash64(text.encode(), signed=True)[0] for text in values.unique()}
        return np.array([hashes[text] for text in values], np.int64)
    if values.dtype == pl.Float64:
        return (values.to_numpy() + 0.0).view(np.int64)  # 0.0 and -0.0 are equal
    return ints(values.to_physical().cast(pl.Int64))


def keyed_partitions(products: Ints, partitions: int) -> Ints:
    """The partition that Kafka's Java and Python clients choose for the key `product_id` (from 1), for each product."""
    texts = products.astype("S19")
    lengths = np.char.str_len(texts)
    digits = texts.view(np.uint8).reshape(len(products), 19)
    hashes = np.zeros(len(products), np.uint32)
    for length in np.unique(lengths):
        is_so_long = lengths == length
        hashes[is_so_long] = _murmur2(digits[is_so_long, :length])
    return (hashes & 0x7FFFFFFF).astype(np.int64) % partitions


def _murmur2(keys: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """The hash of each row, by which Kafka's clients choose: MurmurHash2 (Appleby, 2008), seed 0x9747b28c."""
    length = keys.shape[1]
    whole = length - length % 4
    multiplier = np.uint32(0x5BD1E995)
    hashes = np.full(len(keys), np.uint32(0x9747B28C ^ length))
    for block in np.ascontiguousarray(keys[:, :whole]).view("<u4").T:
        mixed = block * multiplier
        mixed ^= mixed >> 24
        hashes = hashes * multiplier ^ mixed * multiplier
    for place in range(whole, length):
        hashes ^= keys[:, place].astype(np.uint32) << np.uint32(8 * (place - whole))
    if whole < length:
        hashes *= multiplier
    hashes ^= hashes >> 13
    hashes *= multiplier
    hashes ^= hashes >> 15
    return hashes
