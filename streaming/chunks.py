"""How orders travel through Spark: whole tables as one binary value, never a row an order.

A chunk is one Spark row: a few columns that Spark itself needs (the key to shuffle by, the event time to derive a
watermark from) and a payload. Everything else in `streaming` sees tables of orders.
"""

import io
from typing import Any, Literal, TypeVar

import mmh3
import msgspec
import polars as pl

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


class Arrivals(msgspec.Struct, frozen=True):
    """From parsing to a bucket's state: the bucket's share of what one task read, from one Kafka partition or several.

    Every bucket hears of every partition read, also where none of the orders are its own: that is how all buckets
    agree on the watermark without talking to each other.
    """

    reads: list[PartitionRead]
    orders: bytes
    dead_letters: bytes


_Payload = TypeVar("_Payload", bound=msgspec.Struct)
_encoder = msgspec.msgpack.Encoder()


def pack(payload: msgspec.Struct) -> bytes:
    """A payload as one binary value."""
    return _encoder.encode(payload)


def unpack(value: bytes, kind: type[_Payload]) -> _Payload:
    """A payload back from its binary value."""
    return msgspec.msgpack.decode(value, type=kind)


def pack_table(table: pl.DataFrame, compression: Literal["lz4", "zstd"] = "zstd") -> bytes:
    """A table as a compressed Arrow IPC stream; nothing for an empty one."""
    if table.is_empty():
        return b""
    buffer = io.BytesIO()
    table.write_ipc_stream(buffer, compression=compression)
    return buffer.getvalue()


def unpack_table(value: bytes, schema: Any) -> pl.DataFrame:
    """A table back from its binary value; `schema` is that of an empty one."""
    return pl.read_ipc_stream(io.BytesIO(value)) if value else pl.DataFrame(schema=schema)


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
