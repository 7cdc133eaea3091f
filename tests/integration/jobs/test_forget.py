"""`finpro forget`: a person is put into every place there is, forgotten, and looked for in all of them."""

import io
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from batch.forgotten import PERSONAL
from batch.google_cloud import bigquery_client, storage_client
from batch.reference_data import generate
from batch.warehouse.bigquery import load
from batch.warehouse.reconcile import reconcile
from conf.errors import ExportError
from conf.rules import load_rules
from conf.settings import CONF_DIR, Settings
from streaming.kafka import ORDERS
from tests.oracle.kafka_keys import keyed_partition
from tests.oracle.order_sets import spelled
from tests.runs import archive, screening
from tests.runs.commands import finpro
from tests.runs.exports import build_alone, execute, export_run, tamper

WHO, OTHER = 7, 8
SECRET = "xanthippe"  # in whatever is only theirs, and nowhere else
DECLARED = (
    (CONF_DIR / "fraud_rules.toml").read_text()
    + """
[fields]
email = "string"
device_id = "string"
[rules.bad_device]
when = "device_id = 'd666'"
[rules.one_device]
by = ["product_id", "device_id"]
distinct = { of = "user_id", at_least = 2, within = "10 s" }
"""
)
NAMED = f"set name = '{SECRET} a', email = '{SECRET}@example.com', phone_number = '{SECRET} 1' where user_id = {WHO}"


def messages(settings: Settings) -> list[dict[str, Any]]:
    """Orders of many, and of the person in every form that a message can have; each with a secret, but for a plain one."""
    rules = load_rules(settings.rules)
    start = datetime.now(UTC) - timedelta(hours=1)
    orders = screening.dense_orders(300, rules, seed=2, start=start, step=timedelta(milliseconds=400))
    orders = [replace(order, user_id=WHO) if number % 5 == 0 else order for number, order in enumerate(orders)]
    theirs = [order for order in orders if order.user_id == WHO]
    sent = [{"value": spelled(order), "partition": keyed_partition(order.product_id, 4)} for order in orders]
    for place, order in enumerate(orders):
        fields = msgspec.json.decode(spelled(order))
        if order is theirs[0]:
            sent[place]["value"] = msgspec.json.encode(fields | {"gift_for": {"name": SECRET}, "user_id": f"U{WHO}"})
        elif order is theirs[1]:
            sent[place] |= {"headers": [("label", b"night_amount"), ("trace", SECRET.encode())], "key": SECRET}
        elif order is theirs[2]:
            sent[place]["value"] = b'{"source": "%s", ' % SECRET.encode() + spelled(order)[1:]  # the last source counts
        elif order is theirs[4]:
            sent[place]["value"] = msgspec.json.encode(fields | {"email": f"{SECRET}@example.com", "device_id": "d666"})
        elif order.user_id == OTHER:
            sent[place]["value"] = msgspec.json.encode(fields | {"email": "of somebody else", "device_id": "d1"})
    fields = msgspec.json.decode(spelled(theirs[3]))
    broken = [
        msgspec.json.encode(fields | {"order_id": "broken", "quantity": 0, "note": SECRET}),
        msgspec.json.encode(fields | {"order_id": "odd", "country": SECRET}),
        msgspec.json.encode(fields | {"order_id": "cut", "note": SECRET})[:-5],
        msgspec.json.encode(fields | {"amount": "77", "note": SECRET}),  # their own order_id, for another order
        msgspec.json.encode(fields | {"order_id": "ahead", "event_ts": "2099-01-01T00:00:00Z", "note": SECRET}),
        msgspec.json.encode([fields | {"note": SECRET}]),
        msgspec.json.encode(fields | {"order_id": "typed", "email": [SECRET]}),
        b'{"user_id": 77, "note": "of somebody else"}',
    ]
    partition = keyed_partition(theirs[3].product_id, 4)
    return sent + [{"value": value, "partition": partition} for value in broken]


def load_users(settings: Settings) -> None:
    """As a schedule does, with the same seed each time."""
    generate(settings.require("postgres_dsn"), user_count=30, product_count=12, seed=3)


def fill(settings: Settings) -> None:
    """Everything that finpro makes of a person: with two states in the history, and a run that is not loaded."""
    load_users(settings)
    execute(settings, f"update raw_users {NAMED}")
    archive.send_messages(settings, ORDERS, messages(settings))
    for command in (("screen", "--available-now"), ("archive", "--available-now")):
        ended = finpro(*command)
        assert ended.returncode == 0, ended.stderr
    execute(
        settings,
        f"""
        insert into order_outcomes (order_id, outcome, reviewed_by, reason, decided_at, source)
        select order_id, 'genuine', 'desk', case user_id when {WHO} then '{SECRET}' else 'of somebody else' end,
          now(), 'file'
        from raw_orders where user_id in ({WHO}, {OTHER})""",
    )
    export_run(settings, "first")
    load(settings, "first")
    reconcile(settings, "first")
    build_alone(settings)
    core = settings.bigquery_core_dataset
    before = "'before' as dbt_scd_id, timestamp '2020-01-01' as dbt_valid_from, dbt_valid_from as dbt_valid_to"
    history = f"{core}.users_history"
    tamper(settings, f"insert into {history} select * replace ({before}) from {history} where user_id = {WHO}")
    tamper(settings, f"create table {core}.failed_something as select * from {core}.dim_users")
    execute(settings, f"update raw_users set phone_number = '{SECRET} 2' where user_id = {WHO}")
    export_run(settings, "second")


# --- where it is looked for --------------------------------------------------------------------------------------------


def everything(settings: Settings) -> Iterator[tuple[str, str]]:
    """Each row of each place: where, and its text."""
    for (table,) in execute(settings, "select table_name from information_schema.tables where table_schema = 'public'"):
        yield from ((table, row) for (row,) in execute(settings, f"select t::text from {table} as t"))
    for blob in storage_client(settings).bucket(settings.require("gcs_bucket")).list_blobs():
        yield from contents(blob.name.split("/")[-2], blob.name, blob.download_as_bytes())
    for path in Path(settings.lakehouse).rglob("*"):
        if path.is_file():
            yield from contents(path.relative_to(settings.lakehouse).parts[0], path.name, path.read_bytes())
    client = bigquery_client(settings)
    for dataset in settings.bigquery_datasets:
        for table in client.list_tables(dataset):
            rows = client.query(f"select * from {dataset}.{table.table_id}").result()
            yield from ((f"{dataset}.{table.table_id}", str(dict(row.items()))) for row in rows)


def contents(place: str, name: str, content: bytes) -> Iterator[tuple[str, str]]:
    """A file as it is, and the rows of one that is compressed."""
    yield place, content.decode("latin-1")
    if name.endswith(".parquet"):
        yield from ((place, str(row)) for row in pq.read_table(io.BytesIO(content)).to_pylist())


def places_of(settings: Settings, text: str) -> set[str]:
    return {place for place, row in everything(settings) if text in row}


@pytest.mark.timeout(600)
def test_who_is_forgotten_is_nowhere_and_every_verdict_is_still_explained(
    settings: Settings, spark_session: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than a minute: one person goes through every step of the platform, once, for all that is claimed here."""
    (tmp_path / "rules.toml").write_text(DECLARED)
    monkeypatch.setenv("FINPRO_RULES", str(tmp_path / "rules.toml"))
    settings = Settings()
    fill(settings)
    core, marts = settings.bigquery_core_dataset, settings.bigquery_marts_dataset
    before, orders = places_of(settings, SECRET), archive.raw_orders(settings)
    assert before >= {
        "raw_users",
        "order_outcomes",
        "first",
        "second",
        "bronze",
        "quarantine",
        f"{settings.bigquery_dataset}.raw_users",
    }
    assert before >= {f"{core}.dim_users", f"{core}.users_history", f"{core}.failed_something"}
    assert before >= {"raw_orders", "silver", f"{settings.bigquery_dataset}.raw_orders"}
    assert before >= {f"{marts}.mart_top10_active_users", f"{marts}.mart_top10_users_fraud"}

    would = finpro("forget", "--user", str(WHO), "--dry-run")
    assert would.returncode == 0, would.stderr
    assert places_of(settings, SECRET) == before

    half = finpro("forget", "--user", str(WHO), "--request", "ticket 4711", BIGQUERY_EMULATOR_HOST="http://127.0.0.1:1")
    assert half.returncode == 17, half.stderr
    assert "  BigQuery: " in half.stderr
    assert {place.partition(".")[0] for place in places_of(settings, SECRET)} == set(settings.bigquery_datasets)
    assert counted(half.stdout) == counted(would.stdout) - {"BigQuery"}
    assert execute(settings, "select request, completed_at from forgotten_users") == [("ticket 4711", None)]

    done = finpro("forget", "--user", str(WHO))
    assert done.returncode == 0, done.stderr
    assert places_of(settings, SECRET) == set()
    assert "Consistent" in done.stdout
    assert "users_history 2" in done.stdout
    assert execute(settings, "select user_id from forgotten_users where completed_at is not null") == [(WHO,)]

    audited = finpro("audit")
    assert audited.returncode == 0, audited.stdout
    assert re.search(r"^ +1  .*surplus.*: forgotten$", audited.stdout, re.MULTILINE), audited.stdout
    assert archive.raw_orders(settings) == [row | ({"attributes": None} if row["user_id"] == WHO else {}) for row in orders]
    others = places_of(settings, "of somebody else")
    assert others >= {"bronze", "quarantine", "silver", "raw_orders", "order_outcomes"}

    load_users(settings)
    assert execute(settings, f"select name from raw_users where user_id = {WHO}") == [(PERSONAL["name"].of(WHO),)]
    build_alone(settings, "+users_history")
    again = finpro("forget")
    assert again.returncode == 0, again.stderr
    assert counted(again.stdout) == set()

    restored_from_before(settings)
    with pytest.raises(ExportError, match="1 who were forgotten are not in forgotten_users"):
        export_run(settings, "after-the-copy")
    assert finpro("forget").returncode == 0
    assert places_of(settings, SECRET) == set()
    assert finpro("forget", "--user", "4242").returncode == 17


def counted(report: str) -> set[str]:
    """The places in which something was found."""
    places = ("Postgres", "BigQuery", "exported files", "lakehouse")
    erased = {line[:15].strip(): line[15:] for line in report.splitlines()}
    return {place for place in places if not erased[place].startswith(("nothing left", "not reached"))}


def restored_from_before(settings: Settings) -> None:
    """Let Postgres be as a copy of before the person was forgotten."""
    execute(settings, "alter table raw_users disable trigger user")
    execute(settings, "delete from forgotten_users")
    execute(settings, f"update raw_users {NAMED}")
    execute(settings, "alter table raw_users enable trigger user")
