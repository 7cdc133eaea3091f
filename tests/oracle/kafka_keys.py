"""Where Kafka's clients put a key: kafka-python's own word for it."""

from kafka.partitioner.default import murmur2


def keyed_partition(product_id: int, partitions: int) -> int:
    """The partition for the key `product_id`."""
    return int((murmur2(str(product_id).encode()) & 0x7FFFFFFF) % partitions)
