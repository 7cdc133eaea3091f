"""The floor: a Spark query that only passes the bytes on to Kafka and copies the orders to Postgres.

What finpro adds to it is screening: contract, neighbours, rules, state, revisions, one merge a batch. The floor takes the
fastest way known here: bytes stay bytes in the JVM, each Arrow batch goes to a Python worker once, which sends it to Kafka
while it copies it into `raw_orders`, with the table's own constraints. A killed floor sends and copies twice. Spark
compiles its expressions in each micro-batch, as it does by default: decision 38 has the floor without that.
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cache
from typing import Annotated, Any

import polars as pl
import pyarrow as pa
import typer
from adbc_driver_postgresql import dbapi
from confluent_kafka import Producer
from pyspark.sql import SparkSession

from conf.settings import Settings, load_settings
from conf.workers import freeze_imports
from streaming.kafka import ORDERS, PROCESSED_ORDERS, SOURCE_TUNING, librdkafka_config, spark_config

ORDER = pl.Struct(
    {
        "order_id": pl.String,
        "user_id": pl.Int64,
        "product_id": pl.Int64,
        "quantity": pl.Int64,
        "amount": pl.String,
        "country": pl.String,
        "created_date": pl.String,
        "event_ts": pl.String,
        "source": pl.String,
    }
)
TASKS = 2  # as many as finpro has buckets: each pays for a Postgres transaction
PRODUCER = {"enable.idempotence": True, "compression.type": "lz4", "linger.ms": 5, "queue.buffering.max.messages": 0}


@cache
def settings() -> Settings:
    """Read once in each worker process, which Spark keeps from one micro-batch to the next; so are the two below."""
    return load_settings()


@cache
def producer() -> Producer:
    """The worker's way to Kafka."""
    return Producer(librdkafka_config(settings()) | PRODUCER)


@cache
def postgres() -> dbapi.Connection:
    """The worker's way to Postgres."""
    return dbapi.connect(settings().require("postgres_dsn"))


def raw_orders(values: pa.Array) -> pa.Table:
    """The JSON of orders as rows of `raw_orders`, none of them screened."""
    orders = pl.DataFrame(pl.from_arrow(values)).to_series().cast(pl.String).str.json_decode(ORDER).struct.unnest()
    return orders.with_columns(
        pl.col("created_date", "event_ts").str.to_datetime("%Y-%m-%dT%H:%M:%S%.f%z", time_unit="us"),
        amount_numeric=pl.col("amount").str.replace_all(r"\D", "").cast(pl.Int64),
        status=pl.lit("Genuine"),
        reasons=pl.lit([], dtype=pl.List(pl.String)),
        rules_version=pl.lit("none"),
        screened_at=pl.lit(datetime.now(UTC)),
    ).to_arrow(compat_level=pl.CompatLevel.oldest())


def pass_on(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Send each message as it is, and copy its order while Kafka's threads are at work. Yields nothing."""
    freeze_imports()
    topic = settings().topic(PROCESSED_ORDERS)
    for batch in batches:
        keys, values = (batch.column(name).to_numpy(zero_copy_only=False) for name in ("key", "value"))
        producer().produce_batch(topic, [{"key": key, "value": value} for key, value in zip(keys, values, strict=True)])
        with postgres().cursor() as cursor:
            cursor.adbc_ingest("raw_orders", raw_orders(batch.column("value")), mode="append")
        postgres().commit()
        if producer().flush(60):
            raise RuntimeError("Kafka did not acknowledge the orders within a minute")
        yield batch.slice(0, 0).select(["value"])


def main(
    available_now: Annotated[bool, typer.Option("--available-now")] = False,
    max_offsets_per_trigger: Annotated[int, typer.Option()] = 150_000,
) -> None:
    """Pass on what the orders topic holds, then end; or without --available-now go on until stopped."""
    spark = SparkSession.builder.getOrCreate()
    source = {"subscribe": settings().topic(ORDERS), "startingOffsets": "earliest"}
    messages = (
        spark.readStream.format("kafka")
        .options(**spark_config(settings()), **SOURCE_TUNING, **source, maxOffsetsPerTrigger=max_offsets_per_trigger)
        .load()
    )
    trigger: dict[str, Any] = {"availableNow": True} if available_now else {"processingTime": "0 seconds"}
    query = (
        messages.select("key", "value")
        .coalesce(TASKS)
        .mapInArrow(pass_on, "value binary")
        .writeStream.queryName("floor")
        .format("noop")
        .option("checkpointLocation", f"{settings().checkpoints}/floor")
        .trigger(**trigger)
        .start()
    )
    query.awaitTermination()


if __name__ == "__main__":
    # Functions of __main__ travel to the workers by value, and with them their caches, empty each time: so by name.
    from tests.benchmarks.rivals import floor

    typer.run(floor.main)
