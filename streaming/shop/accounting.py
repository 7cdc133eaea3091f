"""Accounting for every message: what became of each, from the `orders` topic to `raw_orders` and the dead letters.

The proof that nothing is lost and nothing is counted twice: it reads the topics and the table themselves, and believes
no counter of the query's.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec
import polars as pl
import pyarrow as pa

from batch.frames import read_frame
from batch.postgres import connect, explained
from conf.rules import load_rules
from conf.settings import Settings
from streaming.contract import CONTENT, LABEL_HEADER, UTC_MICROSECONDS, read_messages
from streaming.kafka import ORDERS, ORDERS_DEAD_LETTER, PROCESSED_ORDERS, TopicReader, as_messages, librdkafka_config

Offsets = dict[int, int]


@dataclass(frozen=True)
class Account:
    """What became of a range of the `orders` topic. Everything named `missing…`, `wrong…` or `surplus…` must be 0.

    Attributes:
        messages: in the range.
        orders: different orders among them.
        duplicates: messages that say an order again.
        dead_letters: messages whose dead letter is there; `dead_letter_reasons` says why, how often.
        genuine, frauds: verdicts in `raw_orders` on these orders.
        found: reason → orders that have it.
        planted: reason → orders that were labelled with it.
        missing_orders: readable, and not in `raw_orders`.
        missing_dead_letters: unreadable (or the id of another order), and without a dead letter.
        surplus_dead_letters: dead letters of messages that are stored orders, or more than one of the same.
        missing_labels: planted reasons that the verdict does not have.
        wrong_verdicts: orders whose last record on `processed_orders` is not what `raw_orders` says.
    """

    messages: int
    orders: int
    duplicates: int
    dead_letters: int
    dead_letter_reasons: dict[str, int]
    genuine: int
    frauds: int
    found: dict[str, int]
    planted: dict[str, int]
    missing_orders: int
    missing_dead_letters: int
    surplus_dead_letters: int
    missing_labels: int
    wrong_verdicts: int

    @property
    def disagreements(self) -> dict[str, int]:
        """The checks that failed, and by how many."""
        checks = ("missing_orders", "missing_dead_letters", "surplus_dead_letters", "missing_labels", "wrong_verdicts")
        return {name: getattr(self, name) for name in checks if getattr(self, name)}


def end_offsets(settings: Settings, topic: str) -> Offsets:
    """Partition → the offset that its next message will get.

    Raises:
        KafkaError: Kafka does not answer.
    """
    with _reader(settings, topic) as reader:
        return reader.ends()


def account(settings: Settings, since: dict[str, Offsets]) -> Account:
    """Account for every message that came on `orders`; `since` says from where on to read each topic concerned.

    Raises:
        KafkaError: Kafka does not answer.
        PostgresError: Postgres does not answer.
    """
    sent, labels = _sent(settings, since[ORDERS])
    rules, now = load_rules(settings.rules), datetime.now(UTC)
    contents = [read_messages(part, rules.max_future_skew, now, rules.fields) for part in sent]
    orders = pl.concat([part.orders for part in contents])
    unreadable = pl.concat([part.dead_letters for part in contents]).select("partition", "offset")
    stored = _stored(settings)
    dead_letters = _dead_letters(settings, since[ORDERS_DEAD_LETTER])

    known = orders.join(stored, on="order_id", how="left", suffix="_stored")
    same = pl.all_horizontal(pl.col(name) == pl.col(f"{name}_stored") for name in CONTENT)
    known = known.with_columns(is_stored=same.fill_null(value=False))
    kept = known.filter("is_stored")
    first = kept.unique("order_id", keep="any")
    used_ids = known.filter(~pl.col("is_stored") & pl.col("status").is_not_null()).select("partition", "offset")
    owed = pl.concat([unreadable, used_ids])
    given = dead_letters.select("partition", "offset")
    planted = kept.join(labels, on=["partition", "offset"]).unique("order_id").explode("label")
    verdicts = _last_verdicts(settings, since[PROCESSED_ORDERS])
    last = first.join(verdicts, on="order_id", how="left", suffix="_sent")
    return Account(
        messages=sum(part.num_rows for part in sent),
        orders=len(first),
        duplicates=len(kept) - len(first),
        dead_letters=len(owed.join(given.unique(), on=["partition", "offset"])),
        dead_letter_reasons=dict(Counter(dead_letters["reason"]).most_common()),
        genuine=len(first.filter(pl.col("status") == "Genuine")),
        frauds=len(first.filter(pl.col("status") == "Fraud")),
        found=_by_reason(first.explode("reasons")["reasons"], rules.names),
        planted=_by_reason(planted["label"], rules.names),
        missing_orders=len(known.filter(pl.col("status").is_null())),
        missing_dead_letters=len(owed.join(given, on=["partition", "offset"], how="anti")),
        surplus_dead_letters=len(given) - len(given.unique().join(owed, on=["partition", "offset"])),
        missing_labels=len(planted.filter(~pl.col("reasons").list.contains(pl.col("label")))),
        wrong_verdicts=len(last.filter(pl.col("verdict").is_null() | (pl.col("verdict") != pl.col("reasons")))),
    )


def _by_reason(reasons: pl.Series, names: Iterable[str]) -> dict[str, int]:
    """How often each reason is there: those of the rules of these names, and what earlier rules gave."""
    counts = Counter(reasons.drop_nulls())
    return {reason: counts[reason] for reason in sorted({*names, *counts})}


def _sent(settings: Settings, since: Offsets) -> tuple[list[pa.RecordBatch], pl.DataFrame]:
    """The messages, a batch a partition as `read_messages` takes them, and their labels by position."""
    batches, labelled = [], []
    with _reader(settings, ORDERS) as reader:
        for partition, first in sorted(since.items()):
            records = reader.read(partition, first)
            batches.append(as_messages(records))
            for record in records:
                label = dict(record.headers() or []).get(LABEL_HEADER)
                if label:
                    labelled.append((partition, record.offset(), label.decode().split(",")))
    schema = pl.Schema({"partition": pl.Int32(), "offset": pl.Int64(), "label": pl.List(pl.String())})
    return batches, pl.DataFrame(labelled, schema=schema, orient="row")


def _stored(settings: Settings) -> pl.DataFrame:
    """`raw_orders`: what makes an order, and the verdict on it."""
    dsn = settings.require("postgres_dsn")
    query = f"select order_id, {', '.join(CONTENT)}, status, array_to_string(reasons, ',') from raw_orders"
    schema = {name: pl.String() for name in ("order_id", *CONTENT, "status", "reasons")}
    with explained(dsn), connect(dsn, application_name="finpro demo") as connection, connection.cursor() as cursor:
        cursor.execute("set local timezone to 'UTC'")
        rows = read_frame(cursor, query, schema)
    return rows.with_columns(
        pl.col("user_id", "product_id", "quantity", "amount_numeric").cast(pl.Int64),
        pl.col("created_date", "event_ts").str.to_datetime("%Y-%m-%d %H:%M:%S%.f%#z", time_unit="us").cast(UTC_MICROSECONDS),
        reasons=_listed("reasons"),
    )


def _listed(column: str) -> pl.Expr:
    return pl.col(column).fill_null("").str.split(",").list.filter(pl.element() != "")


def _dead_letters(settings: Settings, since: Offsets) -> pl.DataFrame:
    with _reader(settings, ORDERS_DEAD_LETTER) as reader:
        headers = [dict(record.headers()) for partition in since for record in reader.read(partition, since[partition])]
    rows = [(int(header["partition"]), int(header["offset"]), header["reason"].decode()) for header in headers]
    return pl.DataFrame(rows, schema={"partition": pl.Int32, "offset": pl.Int64, "reason": pl.String}, orient="row")


def _last_verdicts(settings: Settings, since: Offsets) -> pl.DataFrame:
    """The last record of each order on `processed_orders`."""
    last: dict[str, list[str]] = {}
    with _reader(settings, PROCESSED_ORDERS) as reader:
        for partition, first in since.items():
            for record in reader.read(partition, first):
                last[record.key().decode()] = msgspec.json.decode(record.value())["reasons"]
    schema = pl.Schema({"order_id": pl.String(), "verdict": pl.List(pl.String())})
    return pl.DataFrame({"order_id": list(last), "verdict": list(last.values())}, schema=schema)


def _reader(settings: Settings, topic: str) -> TopicReader:
    return TopicReader(librdkafka_config(settings), settings.topic(topic))
