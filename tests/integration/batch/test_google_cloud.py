"""Cloud Storage and BigQuery by the clients and properties that every step uses, against the embedded emulators."""

import subprocess
from pathlib import Path

import pytest
from google.api_core.exceptions import PreconditionFailed
from google.cloud import bigquery

from batch.google_cloud import bigquery_client, open_bucket, open_dataset
from conf.errors import GoogleCloudError
from conf.settings import Settings
from jobs.local.ports import LOOPBACK, claim_ports
from jobs.spark.submit import environment, spark_submit

ROUND_TRIP = """
import sys
from pyspark.sql import SparkSession, functions as F

spark = SparkSession.builder.getOrCreate()
rows = spark.range(1, 1001, numPartitions=2).select(
    F.col("id").alias("order_id"),
    (F.col("id") * 4_000_000_000_000).alias("amount_numeric"),
    F.timestamp_micros(F.lit(1_700_000_000_000_001) + F.col("id")).alias("event_ts"),
    F.expr("if(id % 2 = 0, array('night_amount', 'foreign_country'), array())").alias("reasons"),
)
for _ in range(2):  # the second time replaces the first: renames and deletes work as well
    rows.write.mode("overwrite").parquet(sys.argv[1])
again = spark.read.parquet(sys.argv[1])
assert again.exceptAll(rows).isEmpty() and again.count() == 1000, again.count()
spark.stop()
"""
SCHEMA = [
    bigquery.SchemaField("order_id", "INT64"),
    bigquery.SchemaField("amount_numeric", "INT64"),
    bigquery.SchemaField("event_ts", "TIMESTAMP"),
    bigquery.SchemaField("reasons", "STRING", mode="REPEATED"),
]


def test_what_spark_writes_to_gs_comes_back_to_spark_and_arrives_in_bigquery(settings: Settings, tmp_path: Path) -> None:
    script = tmp_path / "round_trip.py"
    script.write_text(ROUND_TRIP, encoding="utf-8")
    folder = f"gs://{settings.gcs_bucket}/round trip"
    command = spark_submit("round_trip", [], master="local[2]", memory="1g", conf=[])

    subprocess.run([*command[:-1], str(script), folder], env=environment("round_trip", master="local[2]"), check=True)

    table = f"{settings.bigquery_dataset}.round_trip"
    client = bigquery_client(settings)
    files = [f"gs://{settings.gcs_bucket}/{blob.name}" for blob in open_bucket(settings).list_blobs() if "part-" in blob.name]
    config = bigquery.LoadJobConfig(schema=SCHEMA, source_format=bigquery.SourceFormat.PARQUET)
    client.load_table_from_uri(files, table, job_config=config).result()
    found = client.query(
        "select count(*), sum(amount_numeric), sum(unix_micros(event_ts)), sum(array_length(reasons)),"
        f" max(array_to_string(reasons, ',')) from {table}"
    ).result()
    sum_of_ids = 1000 * 1001 // 2
    assert len(files) == 2
    assert [tuple(row) for row in found] == [
        (
            1000,
            4_000_000_000_000 * sum_of_ids,
            1_700_000_000_000_001 * 1000 + sum_of_ids,
            1000,
            "night_amount,foreign_country",
        )
    ]


def test_an_object_is_created_once_when_it_must_not_be_there_yet(settings: Settings) -> None:
    manifest = open_bucket(settings).blob("raw/manifests/one.json")
    manifest.upload_from_string("{}", if_generation_match=0)

    with pytest.raises(PreconditionFailed):
        manifest.upload_from_string("[]", if_generation_match=0)

    assert manifest.download_as_text() == "{}"


def test_a_missing_bucket_or_dataset_is_named_with_the_setting_to_correct(settings: Settings) -> None:
    elsewhere = settings.model_copy(update={"gcs_bucket": "no-such-bucket", "bigquery_dataset": "no_such_dataset"})

    with pytest.raises(GoogleCloudError, match=r"no-such-bucket.*FINPRO_GCS_BUCKET"):
        open_bucket(elsewhere)
    with pytest.raises(GoogleCloudError, match=r"no_such_dataset.*FINPRO_BIGQUERY_DATASET"):
        open_dataset(elsewhere, bigquery_client(elsewhere))


def test_an_emulator_that_has_died_is_reported_with_what_to_do(settings: Settings, tmp_path: Path) -> None:
    nobody = f"http://{LOOPBACK}:{claim_ports(tmp_path, ('nobody',))['nobody']}"
    gone = settings.model_copy(update={"storage_emulator_host": nobody, "bigquery_emulator_host": nobody})

    with pytest.raises(GoogleCloudError, match="finpro up"):
        open_bucket(gone)
    with pytest.raises(GoogleCloudError, match="finpro up"):
        open_dataset(gone, bigquery_client(gone))
