"""How orders are shuffled: whole tables as one binary value, never a row an order.

A chunk is one Spark row: a key to shuffle by, and a bucket's share of what one task read. Everything else in `streaming`
sees tables of orders.
"""

import io
from typing import Literal, NamedTuple

import mmh3
import msgspec
import polars as pl

from streaming.contract import NO_DEAD_LETTERS, NO_ORDERS

# Spark's own hash seed: see HashPartitioning, pmod(Murmur3Hash(key, 42), numPartitions).
_SPARK_HASH_SEED = 42


class PartitionRead(msgspec.Struct, frozen=True):
    """What a task read from one Kafka partition.

    Attributes:
        partition: its number.
        first_offset, last_offset: the range, both ends included.
        newest_us: the newest event time among its orders, epoch microseconds; None where it held none.
    """

    partition: int
    first_offset: int
    last_offset: int
    newest_us: int | None


class Arrivals(NamedTuple):
    """What one task read, or a bucket's share of it.

    Every bucket hears of every partition read, also where none of the orders are its own: that is how all buckets
    agree on the watermark without talking to each other.

    Attributes:
        reads: of each partition.
        orders: ORDER_SCHEMA.
        dead_letters: DEAD_LETTER_SCHEMA.
    """

    reads: list[PartitionRead]
    orders: pl.DataFrame
    dead_letters: pl.DataFrame


class _Chunk(msgspec.Struct, frozen=True):
    reads: list[PartitionRead]
    orders: bytes
    dead_letters: bytes


def pack_arrivals(arrivals: Arrivals) -> bytes:
    """As one binary value: read once, by the next stage, so it is not worth more than a quick compression."""
    chunk = _Chunk(arrivals.reads, pack_table(arrivals.orders, "lz4"), pack_table(arrivals.dead_letters, "lz4"))
    return msgspec.msgpack.encode(chunk)


def unpack_arrivals(value: bytes) -> Arrivals:
    """Back from its binary value."""
    chunk = msgspec.msgpack.decode(value, type=_Chunk)
    return Arrivals(chunk.reads, unpack_table(chunk.orders, NO_ORDERS), unpack_table(chunk.dead_letters, NO_DEAD_LETTERS))


def pack_table(table: pl.DataFrame, compression: Literal["lz4", "zstd"] = "zstd") -> bytes:
    """A table as a compressed Arrow IPC stream; nothing for an empty one."""
    if table.is_empty():
        return b""
    buffer = io.BytesIO()
    table.write_ipc_stream(buffer, compression=compression)
    return buffer.getvalue()


def unpack_table(value: bytes, empty: pl.DataFrame) -> pl.DataFrame:
    """A table back from its binary value, or an `empty` one."""
    return pl.read_ipc_stream(io.BytesIO(value)) if value else empty


def bucket_keys(buckets: int) -> list[int]:
    """One grouping key a bucket, chosen so that Spark's shuffle sends each to a partition of its own.

    Plain bucket numbers would collide: Spark hashes keys, and two of four buckets may well land in one task.
    """
    keys: dict[int, int] = {}
    candidate = 0
    while len(keys) < buckets:
        shuffle_partition = mmh3.hash(candidate.to_bytes(4, "little"), _SPARK_HASH_SEED) % buckets
        keys.setdefault(shuffle_partition, candidate)
        candidate += 1
    return [keys[partition] for partition in range(buckets)]
