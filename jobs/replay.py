"""The replay job: `spark-submit jobs/replay.py`, or `finpro screen --from-bronze`."""

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime

from pyspark.sql import SparkSession
from rich.console import Console

from conf.settings import Settings, load_settings
from jobs.spark.session import history_session, run_as_program
from streaming.history.differences import snapshot
from streaming.history.replay import Draft
from streaming.history.republish import Sinks
from streaming.history.unarchived import offsets_json
from streaming.kafka import ORDERS, TopicReader, librdkafka_config, require_topics
from streaming.screening.sinks import kafka_sink, require_tables


def check(settings: Settings) -> None:
    """Check what can be checked without Spark: topics and tables.

    Raises:
        FinproError: something is missing or does not answer; says what to do.
    """
    require_topics(settings)
    require_tables(settings.require("postgres_dsn"))


def sinks_of(settings: Settings) -> Sinks:
    """Where verdicts go; they carry the present time."""
    return Sinks(settings.require("postgres_dsn"), kafka_sink(settings), datetime.now(UTC))


def draft_of(spark: SparkSession, settings: Settings, console: Console) -> Draft:
    """The draft of an earlier replay that was interrupted, or a new one."""
    folder = f"{settings.lakehouse.rstrip('/')}/replay"
    unfinished = Draft.unfinished(spark, folder)
    if unfinished:
        console.print(f"going on with the replay of {unfinished.made_at:%Y-%m-%d %H:%M:%S} UTC")
        return unfinished
    draft = Draft(spark, folder, datetime.now(UTC))
    console.print("screening what bronze holds …")
    draft.write(snapshot(spark, settings.lakehouse, settings.topic(ORDERS)))
    return draft


def how_to_go_on(settings: Settings, begins: dict[int, int]) -> str:
    """What to start next, so that no message is left out."""
    topic = settings.topic(ORDERS)
    with TopicReader(librdkafka_config(settings), topic) as reader:
        kept = reader.kept()
    if any(begins.get(partition, 0) > end for partition, (_, end) in kept.items()):
        offsets, note = "earliest", f"{topic} was created anew since it was archived: the stream begins with its first message."
    else:
        offsets = offsets_json(
            topic, {partition: max(begins.get(partition, 0), first) for partition, (first, _) in kept.items()}
        )
        note = "Kafka has all that a stream needs to go on."
        if any(begins.get(partition, 0) < first for partition, (first, _) in kept.items()):
            note = "Kafka has forgotten some of what came next: `finpro audit` tells whether an order was lost with it."
    return (
        f"{note} With a new checkpoint (remove {settings.checkpoints}/screen_orders) it goes on with\n"
        f"    finpro screen --starting-offsets '{offsets}'"
    )


def main(given: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__).parse_args(given)
    settings, console = load_settings(), Console(highlight=False, soft_wrap=True)
    check(settings)
    with history_session() as spark:
        draft = draft_of(spark, settings, console)
        orders = dead_letters = clashes = 0
        for done in draft.publish(sinks_of(settings)):
            orders, dead_letters = orders + done.orders.announced, dead_letters + done.dead_letters.announced
            clashes += done.orders.clashes
            console.print(
                f"{done.day}: {done.orders.announced:,} orders, {done.dead_letters.announced:,} dead letters,"
                f" {done.days_left:,} days left"
            )
        begins = draft.begins()
        draft.remove()
    console.print(f"replayed {orders:,} orders and {dead_letters:,} dead letters")
    if clashes:
        console.print(f"{clashes:,} orders were left out: Postgres holds other orders under their ids")
    console.print(how_to_go_on(settings, begins))


if __name__ == "__main__":
    run_as_program(main)
