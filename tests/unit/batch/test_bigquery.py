"""The client against a BigQuery that refuses: what is tried again, what a person is told, and what each job carries."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import requests
from google.api_core.exceptions import BadRequest, RetryError
from google.cloud.bigquery import LoadJobConfig, QueryJobConfig, Table
from google.cloud.bigquery._http import Connection
from zetasql.core.local_service import ZetaSqlLocalService

from batch.bigquery import job_labels
from batch.google_cloud import bigquery_client, explained, open_dataset, require_lasting
from batch.warehouse import bigquery_jobs
from conf.errors import GoogleCloudError, GoogleCloudRefused, LoadError
from conf.settings import Settings
from tests.gcp.test_real_project import REFUSED, TOO_MANY_DAYS
from tests.oracle import bigquery_refusals as real
from tests.oracle.bigquery_refusals import Refusal, answered
from tests.oracle.googlesql import Parameters, Refused
from tests.oracle.strict_bigquery import Declared, analyze

Json = dict[str, Any]
SETTINGS = Settings(gcp_project="p", bigquery_dataset="d", bigquery_emulator_host="http://127.0.0.1:1")


@dataclass
class FakeBigQuery:
    """Takes each job and ends it well, once it has refused the first ones; remembers what it was asked."""

    refusals: list[Refusal] = field(default_factory=list)
    jobs: dict[str, Json] = field(default_factory=dict)
    asked: list[Json] = field(default_factory=list)
    dataset: Json = field(default_factory=dict)

    def answer(self, _: Connection, method: str, url: str, headers: Any, data: Any, *__: Any, **___: Any) -> requests.Response:
        if "/datasets/" in url:
            reference = {"projectId": "p", "datasetId": "d"}
            return answered(method, url, 200, {"datasetReference": reference, **self.dataset})
        if method == "POST":
            return self._take(method, url, json.loads(data))
        job_id = re.split(r"[/?]", url.partition("/projects/p/")[2])[1]
        if job_id not in self.jobs:
            return Refusal(404, "notFound", f"Not found: Job p:{job_id}").answer(method, url, {})
        if "/queries/" in url:
            return self._rows(method, url, self.jobs[job_id])
        return answered(method, url, 200, self.jobs[job_id])

    def _take(self, method: str, url: str, job: Json) -> requests.Response:
        self.asked.append(job)
        job_id = job["jobReference"]["jobId"]
        if job_id in self.jobs:
            return real.DUPLICATE.answer(method, url, job)
        if self.refusals:
            refusal = self.refusals.pop(0)
            answer = refusal.answer(method, url, job)
            if refusal.of_the_job:
                self.jobs[job_id] = answer.json()
            return answer
        statistics = {"query": {"totalBytesProcessed": "700", "totalBytesBilled": "10485760"}}
        self.jobs[job_id] = {**job, "status": {"state": "DONE"}, "statistics": statistics}
        return answered(method, url, 200, self.jobs[job_id])

    def _rows(self, method: str, url: str, job: Json) -> requests.Response:
        if error := job["status"].get("errorResult"):
            return Refusal(400, error["reason"], error["message"]).answer(method, url, job)
        rows = {"schema": {"fields": [{"name": "one", "type": "INTEGER"}]}, "rows": [{"f": [{"v": "1"}]}], "totalRows": "1"}
        return answered(method, url, 200, {"jobReference": job["jobReference"], "jobComplete": True, **rows})


@pytest.fixture
def bigquery(monkeypatch: pytest.MonkeyPatch) -> FakeBigQuery:
    """A fake instead of every BigQuery of this process, in which no time passes between two tries."""
    fake = FakeBigQuery()
    monkeypatch.setattr(Connection, "_do_request", lambda *arguments, **named: fake.answer(*arguments, **named))
    monkeypatch.setattr("time.sleep", lambda _: None)
    return fake


def ask(fake: FakeBigQuery, *refusals: Refusal) -> list[tuple[Any, ...]]:
    """The rows of a query that is refused so many times."""
    fake.refusals = list(refusals)
    with explained(SETTINGS):
        return [row.values() for row in bigquery_client(SETTINGS).query("select 1 as one").result()]


def load(fake: FakeBigQuery, *refusals: Refusal) -> str:
    """The id of the load job that went well, of a load that is refused so many times."""
    fake.refusals = list(refusals)
    client = bigquery_client(SETTINGS)

    def submit(job_id: str) -> bigquery_jobs.Job:
        return client.load_table_from_uri(["gs://b/o"], "p.d.t", job_id=job_id, location="EU", job_config=LoadJobConfig())

    with explained(SETTINGS):
        return str(bigquery_jobs.run_once(client, "EU", "load", submit, counts=lambda: True).job_id)


PASSING = [
    real.BACKEND_ERROR,
    real.RATE_LIMIT,
    real.JOB_RATE_LIMIT,
    real.JOB_INTERNAL_ERROR,
    real.CONCURRENT_UPDATE,
    real.OUTSTANDING_DML,
]


@pytest.mark.parametrize("refusal", PASSING, ids=lambda refusal: refusal.reason)
def test_what_passes_by_itself_is_tried_again(bigquery: FakeBigQuery, refusal: Refusal) -> None:
    assert ask(bigquery, refusal, refusal) == [(1,)]
    assert len(bigquery.asked) == 3


@pytest.mark.parametrize("refusal", PASSING, ids=lambda refusal: refusal.reason)
def test_a_job_with_a_name_is_tried_again_under_the_next_name(bigquery: FakeBigQuery, refusal: Refusal) -> None:
    assert load(bigquery, refusal, refusal) == ("load_3" if refusal.of_the_job else "load_1")
    assert len(bigquery.asked) == 3


def test_tries_have_an_end_and_then_somebody_may_start_the_same_again(bigquery: FakeBigQuery) -> None:
    with pytest.raises(GoogleCloudError, match="Something else changes the same table") as ended:
        load(bigquery, *[real.CONCURRENT_UPDATE] * 100)
    assert not isinstance(ended.value, GoogleCloudRefused)
    assert len(bigquery.asked) == 6


QUOTAS = {
    "bytes": real.QUOTA_EXCEEDED,
    "changes of a table": real.PARTITION_CHANGES,
    "queries": Refusal(403, "quotaExceeded", "Your project exceeded quota for concurrent queries."),
}


@pytest.mark.parametrize("refusal", QUOTAS.values(), ids=QUOTAS)
@pytest.mark.parametrize("way", [ask, load])
def test_a_quota_is_no_missing_right_and_is_not_asked_for_at_once_again(
    bigquery: FakeBigQuery, refusal: Refusal, way: Callable[..., object]
) -> None:
    with pytest.raises(GoogleCloudError, match=r"uota.*no right is missing.*iam-admin/quotas") as ended:
        way(bigquery, refusal)
    assert not isinstance(ended.value, GoogleCloudRefused)
    assert len(bigquery.asked) == 1


@pytest.mark.parametrize(
    ("refusal", "advice"),
    [
        (real.ACCESS_DENIED, r"bigquery\.tables\.create denied.*bigquery\.dataEditor"),
        (real.BILLING_NOT_ENABLED, r"sandbox changes no rows.*gcloud billing projects link p"),
        (real.BYTES_BILLED, r"164626432 or higher.*FINPRO_BIGQUERY_MAX_BYTES_BILLED"),
        (real.OVERFLOW, "impossible amount or quantity"),
        (real.PARTITIONS_OF_A_JOB, "fewer days at once"),
        (real.PARTITIONS_OF_A_TABLE, "holds 10,000 days at most"),
        (real.too_many_sources(10_001), "takes 10,000 files at most"),
    ],
    ids=lambda one: one.reason if isinstance(one, Refusal) else "",
)
@pytest.mark.parametrize("way", [ask, load])
def test_what_a_person_has_to_change_is_said_at_once(
    bigquery: FakeBigQuery, refusal: Refusal, advice: str, way: Callable[..., object]
) -> None:
    with pytest.raises(GoogleCloudRefused, match=advice):
        way(bigquery, refusal)
    assert len(bigquery.asked) == 1


def test_a_job_that_fails_for_a_reason_of_its_own_says_what_bigquery_said(bigquery: FakeBigQuery) -> None:
    broken = Refusal(400, "invalid", "Input file is not in Parquet format.", of_the_job=True)
    with pytest.raises(LoadError, match=r"BigQuery job load_1 failed: Input file is not in Parquet format"):
        load(bigquery, broken)


def test_a_job_id_that_is_taken_is_the_same_job(bigquery: FakeBigQuery) -> None:
    assert load(bigquery) == "load_1"
    hidden = bigquery.jobs.pop("load_1")

    looks = 0

    def found_late(_: Connection, method: str, url: str, *others: Any, **named: Any) -> requests.Response:
        nonlocal looks
        if method == "POST":
            return real.DUPLICATE.answer(method, url, {})
        looks += 1
        bigquery.jobs = {"load_1": hidden} if looks > 2 else {}  # it is taken before it can be found
        return bigquery.answer(_, method, url, *others, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Connection, "_do_request", lambda *arguments, **named: found_late(*arguments, **named))
        assert load(bigquery) == "load_1"
    assert looks == 3
    assert len(bigquery.asked) == 1


def test_what_a_library_has_tried_for_long_is_known_by_its_last_try() -> None:
    last = BadRequest(real.JOB_RATE_LIMIT.message, errors=[real.JOB_RATE_LIMIT.error])  # type: ignore[no-untyped-call]
    with pytest.raises(GoogleCloudError, match=r"too many table update.*start the same again"), explained(SETTINGS):
        raise RetryError("Timeout of 600.0s exceeded", cause=last)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("expiration", "said"),
    [
        ({"defaultTableExpirationMs": "5184000000"}, r"deletes tables after 60 days.*--default_table_expiration=0 p:d"),
        (
            {"defaultPartitionExpirationMs": "86400000"},
            r"deletes partitions after 1 days.*--default_partition_expiration=0 p:d",
        ),
    ],
)
def test_a_dataset_that_deletes_by_itself_is_refused(bigquery: FakeBigQuery, expiration: Json, said: str) -> None:
    bigquery.dataset = expiration
    with pytest.raises(GoogleCloudRefused, match=said):
        open_dataset(SETTINGS, bigquery_client(SETTINGS))
    bigquery.dataset = {}
    assert open_dataset(SETTINGS, bigquery_client(SETTINGS)).dataset_id == "d"


@pytest.mark.parametrize(
    ("properties", "said"),
    [
        ({"expirationTime": "1795900000000"}, r"p:d\.t vanishes at 2026-.*--expiration=0 p:d\.t"),
        (
            {"timePartitioning": {"type": "DAY", "field": "created_date", "expirationMs": "1000"}},
            r"p:d\.t deletes days.*--time_partitioning_expiration=0 p:d\.t.*--full",
        ),
    ],
)
def test_a_table_that_ends_by_itself_is_refused(properties: Json, said: str) -> None:
    reference = {"tableReference": {"projectId": "p", "datasetId": "d", "tableId": "t"}}
    require_lasting(Table.from_api_repr(reference))
    with pytest.raises(GoogleCloudRefused, match=said):
        require_lasting(Table.from_api_repr(reference | properties))


def test_every_job_has_labels_and_every_query_a_limit_of_bytes(bigquery: FakeBigQuery, monkeypatch: pytest.MonkeyPatch) -> None:
    limited = SETTINGS.model_copy(update={"bigquery_max_bytes_billed": 5_000_000})
    client = bigquery_client(limited, "Load", "20261122T170000Z-1f3a")
    client.query("select 1", job_config=QueryJobConfig(use_query_cache=False)).result()
    client.query_and_wait("select 1", job_config=QueryJobConfig(), page_size=5)
    client.load_table_from_uri("gs://b/o", "p.d.t", location="EU", job_config=LoadJobConfig())
    monkeypatch.setenv("AIRFLOW_CTX_DAG_ID", "Bigquery ingest")
    bigquery_client(SETTINGS).query("select 1")

    labels = [job["configuration"]["labels"] for job in bigquery.asked]
    assert labels[:3] == [{"dag": "manual", "run": "20261122t170000z-1f3a", "step": "load"}] * 3
    assert labels[3] == {"dag": "bigquery_ingest", "run": "", "step": "other"}
    limits = [job["configuration"].get("query", {}).get("maximumBytesBilled") for job in bigquery.asked]
    assert limits == ["5000000", "5000000", None, None]
    assert bigquery.asked[0]["configuration"]["query"]["useQueryCache"] is False


def test_labels_are_what_bigquery_takes() -> None:
    labels = job_labels("Über.DAG", "x" * 100, "a:b/c")
    assert labels == {"dag": "_ber_dag", "run": "a_b_c", "step": "x" * 63}


def test_a_client_adds_up_what_its_queries_have_read(bigquery: FakeBigQuery) -> None:
    client = bigquery_client(SETTINGS)
    assert client.usage().jobs == 0
    client.query("select 1").result()
    client.query_and_wait("select 1")
    assert client.usage().__dict__ == {"jobs": 2, "processed": 1400, "billed": 20971520}


COLUMNS = [{"name": "order_id", "type": "STRING"}, {"name": "event_ts", "type": "TIMESTAMP"}]


@pytest.mark.parametrize("table", ["`p-q.d.raw_orders`", "`p-q`.`d`.`raw_orders`", "`p-q`.d.raw_orders", "d.raw_orders"])
@pytest.mark.parametrize(
    ("statement", "parameters"),
    [
        ("select count(*) from {} where event_ts > @now", {"now": "timestamp"}),
        ("select count(*) from {} where event_ts > ?", ["timestamp"]),
        ("delete from {} as stored where order_id in unnest(@ids)", {"ids": "array<string>"}),
        ("merge {0} as stored using {0} as staged on stored.order_id = staged.order_id when not matched then insert row", {}),
    ],
)
def test_a_statement_is_analyzed_with_its_tables_and_the_types_of_its_parameters(
    table: str, statement: str, parameters: Parameters
) -> None:
    asked: list[str] = []

    def columns(name: str) -> list[Json]:
        asked.append(name)
        return COLUMNS

    analyze(statement.format(table), parameters, "p-q", columns, Declared())
    assert asked == ["p-q.d.raw_orders"]
    wrong = dict.fromkeys(parameters, "datetime") if isinstance(parameters, Mapping) else ["datetime"]
    if parameters:
        with pytest.raises(Refused, match=r"No matching signature|must be an array|must be arrays"):
            analyze(statement.format(table), wrong, "p-q", columns, Declared())
    with pytest.raises(Refused, match=r"order_id|event_ts"):
        analyze(statement.format(table), parameters, "p-q", lambda _: [{"name": "other", "type": "INTEGER"}], Declared())


def test_the_analyzer_is_told_of_a_table_once_and_again_when_it_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    register: Callable[..., Any] = ZetaSqlLocalService.register_catalog

    def telling(*args: Any, **named: Any) -> Any:
        told.append(named)
        return register(*args, **named)

    monkeypatch.setattr(ZetaSqlLocalService, "register_catalog", telling)
    declared, statement = Declared(), "select {} from d.raw_orders"
    for column in ("order_id", "event_ts", "order_id"):
        analyze(statement.format(column), {}, "p-q", lambda _: COLUMNS, declared)
    assert len(told) == 1
    analyze(statement.format("added"), {}, "p-q", lambda _: [*COLUMNS, {"name": "added", "type": "INTEGER"}], declared)
    with pytest.raises(Refused, match="added"):
        analyze(statement.format("added"), {}, "p-q", lambda _: COLUMNS, declared)
    assert len(told) == 3


def test_what_has_a_table_that_is_not_there_is_left_to_the_server() -> None:
    analyze("select x from d.nothing", {}, "p", lambda _: None, Declared())


@pytest.mark.parametrize("statement", [*REFUSED.values(), *TOO_MANY_DAYS])
def test_what_the_real_bigquery_is_asked_to_refuse_is_googlesql(statement: str) -> None:
    columns: Callable[[str], list[Json]] = lambda _: [{"name": "moment", "type": "TIMESTAMP"}]  # noqa: E731
    analyze(statement.format(dataset="d"), {}, "p", columns, Declared())
