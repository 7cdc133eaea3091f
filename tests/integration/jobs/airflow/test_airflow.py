"""Airflow for real: `finpro airflow` as a person starts it, the chain of DAGs, the gate that stops dbt, and a killed run.

The tests share one Airflow and one warehouse, and build on each other in this order.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from batch.google_cloud import open_bucket
from batch.warehouse.manifest import finished_runs
from conf.settings import Settings, finpro_home, variable
from jobs.airflow.server import airflow_environment, prepare
from jobs.airflow.spark import FinproSparkOperator
from jobs.local.java import java_home
from jobs.local.platform import Platform
from jobs.local.ports import LOOPBACK, remembered_ports
from jobs.local.private_files import private_directory
from jobs.local.processes import Daemon
from jobs.spark.submit import spark_submit
from tests.conftest import own_warehouse
from tests.oracle.marts import MARTS, fill
from tests.runs.exports import bigquery_rows, execute, insert_orders, postgres_rows, table_names

FINPRO = str(Path(sys.executable).parent / "finpro")
CHAIN = ("batch_raw_loads", "bigquery_ingest", "transformation_dbt")
RAW = ("raw_users", "raw_products", "raw_orders", "order_outcomes")
FEW = {"users": 60, "products": 25, "seed": 3}
# What is killed is missed sooner than on a machine that has more to do.
IMPATIENT = {
    "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": "10",
    "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "5",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "30",
}
RUN_EACH_DAG = f"""
import importlib
for name in {CHAIN}:
    run = importlib.import_module("jobs.dags." + name).dag.test(run_conf={FEW} if name == "batch_raw_loads" else None)
    print("ended", name, run.state)
"""

pytestmark = pytest.mark.timeout(600)


class Airflow:
    """`finpro airflow`, and its API."""

    def __init__(self) -> None:
        self.log = finpro_home() / "logs" / "finpro-airflow.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("wb") as log:
            self._process = subprocess.Popen([FINPRO, "airflow"], stdout=log, stderr=subprocess.STDOUT)
        wait(lambda: "Airflow is at" in self.said or self._process_ended(), "Airflow is up")
        assert not self._process_ended(), self.said
        password = json.loads(self.password_file.read_text(encoding="utf-8"))["admin"]
        answer = requests.post(f"{self.url}/auth/token", json={"username": "admin", "password": password}, timeout=60)
        self._token = {"Authorization": f"Bearer {answer.json()['access_token']}"}

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{remembered_ports(finpro_home())['airflow']}"

    @property
    def password_file(self) -> Path:
        return finpro_home() / "airflow" / "secrets" / "users.json"

    def scheduler(self) -> psutil.Process | None:
        return Daemon("airflow-scheduler", finpro_home()).process()

    def ended(self, *, seconds: float = 90) -> int:
        assert self._process
        return self._process.wait(timeout=seconds)

    def stop(self) -> int:
        assert self._process
        self._process.send_signal(signal.SIGTERM)
        return self.ended()

    def trigger(self, dag_id: str, **conf: Any) -> str:
        answer = requests.post(
            f"{self.url}/api/v2/dags/{dag_id}/dagRuns",
            json={"logical_date": None, "conf": conf},
            headers=self._token,
            timeout=60,
        )
        return str(answer.json()["dag_run_id"])

    def runs(self, dag_id: str) -> dict[str, str]:
        """The runs of a DAG and their states, the oldest first."""
        found = self._get(f"dags/{dag_id}/dagRuns", order_by="run_after")["dag_runs"]
        return {run["dag_run_id"]: run["state"] for run in found}

    def tasks(self, dag_id: str, run_id: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._get(f"dags/{dag_id}/dagRuns/{run_id}/taskInstances")["task_instances"]
        return found

    def state(self, dag_id: str, run_id: str, task_id: str) -> str | None:
        state: str | None
        (state,) = {each["state"] for each in self.tasks(dag_id, run_id) if each["task_id"] == task_id}
        return state

    def end_of(self, dag_id: str, run_id: str) -> str:
        wait(lambda: self.runs(dag_id)[run_id] in ("success", "failed"), f"the end of {dag_id} {run_id}")
        return self.runs(dag_id)[run_id]

    def run_after(self, dag_id: str, earlier: dict[str, str]) -> str:
        """The run of a DAG that an asset has started since."""

        def started() -> list[str]:
            return [run for run in self.runs(dag_id) if run not in earlier and run.startswith("asset_triggered")]

        wait(lambda: bool(started()), f"a run of {dag_id}")
        return started()[0]

    def _get(self, path: str, **parameters: str) -> Any:
        return requests.get(f"{self.url}/api/v2/{path}", params=parameters, headers=self._token, timeout=60).json()

    def _process_ended(self) -> bool:
        return self._process is None or self._process.poll() is not None


def wait(condition: Callable[[], bool], for_what: str, *, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {for_what}"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def settings(platform: Platform) -> Iterator[Settings]:
    """A warehouse of this module's own, which every command finds; Postgres is filled."""
    with own_warehouse(platform) as settings, pytest.MonkeyPatch.context() as patch:
        own = {variable(name): settings.require(name) for name in ("postgres_dsn", "gcs_bucket", "bigquery_dataset")}
        for name, value in (platform.environment() | own | IMPATIENT).items():
            patch.setenv(name, value)
        patch.delenv("AIRFLOW_HOME")
        fill(settings)
        yield settings


@pytest.fixture(scope="module")
def airflow(settings: Settings) -> Iterator[Airflow]:
    airflow = Airflow()
    airflow.start()
    yield airflow
    airflow.stop()


def test_the_export_task_submits_what_the_command_does_and_no_secret(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_a_command = spark_submit("export_raw", ["--run-id=r"], master="local[2]", memory="512m", conf=[])
    submitted: list[list[str]] = []
    monkeypatch.setenv("AIRFLOW_CONN_SPARK_DEFAULT", json.dumps({"conn_type": "spark", "host": "local[2]"}))
    java_home()  # remembered, so that only spark-submit is left to start

    def submit(command: list[str], **_: object) -> _Done:
        submitted.append(command)
        return _Done()

    monkeypatch.setattr(subprocess, "Popen", submit)
    FinproSparkOperator(task_id="export", job="export_raw", arguments=["--run-id=r", ""], memory="512m").execute({})
    assert submitted == [as_a_command]
    assert settings.require("postgres_dsn") not in " ".join(submitted[0])


@pytest.mark.parametrize(("code", "raised"), [(2, AirflowFailException), (4, AirflowException)])
def test_an_export_that_cannot_use_its_settings_is_not_tried_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, code: int, raised: type[Exception]
) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_SPARK_DEFAULT", json.dumps({"conn_type": "spark", "host": "local[2]"}))
    java_home()
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: _Done(code))
    with pytest.raises(AirflowException) as failed:
        FinproSparkOperator(task_id="export", job="export_raw", memory="512m").execute({})
    assert type(failed.value) is raised


class _Done:
    """A spark-submit that has ended and said nothing."""

    stdout: tuple[str, ...] = ()

    def __init__(self, returncode: int = 0) -> None:
        self.returncode = returncode

    def wait(self) -> int:
        return self.returncode


def test_raw_loads_lead_to_a_validated_load_and_that_to_the_marts(airflow: Airflow, settings: Settings) -> None:
    earlier = {dag_id: airflow.runs(dag_id) for dag_id in CHAIN}
    assert airflow.end_of("batch_raw_loads", airflow.trigger("batch_raw_loads", **FEW | {"users": 70})) == "success"

    ingest = airflow.run_after("bigquery_ingest", earlier["bigquery_ingest"])
    assert airflow.end_of("bigquery_ingest", ingest) == "success"
    marts = airflow.run_after("transformation_dbt", earlier["transformation_dbt"])
    assert airflow.end_of("transformation_dbt", marts) == "success"
    assert airflow.state("transformation_dbt", marts, "build") == "success"

    assert_the_warehouse_is_as_postgres(settings)
    assert len(bigquery_rows(settings, "raw_users")) == 70
    assert table_names(settings, settings.bigquery_marts_dataset) == set(MARTS)
    assert "fct_orders" in table_names(settings, settings.bigquery_core_dataset)
    newest = finished_runs(open_bucket(settings))[-1]
    recorded = execute(settings, "select table_name, dag_id, status from ingestion_monitoring where run_id = %s", newest)
    assert sorted(recorded) == [(table, "bigquery_ingest", "Consistent") for table in sorted(RAW)]


def seen_from_outside(process: psutil.Process) -> tuple[set[str], str]:
    """The addresses that a process listens on and its command line: neither when it, a task perhaps, has just ended."""
    try:
        sockets = process.net_connections("inet")
        return {one.laddr.ip for one in sockets if one.status == psutil.CONN_LISTEN}, " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return set(), ""


def test_airflow_listens_on_loopback_only_and_its_password_is_in_no_log_and_only_its_owners(airflow: Airflow) -> None:
    processes = [Daemon(f"airflow-{part}", finpro_home()).process() for part in ("api-server", "scheduler", "dag-processor")]
    family = [each for process in processes if process for each in (process, *process.children(recursive=True))]
    addresses, command_lines = zip(*map(seen_from_outside, family), strict=True)
    assert set().union(*addresses) == {LOOPBACK}

    password = json.loads(airflow.password_file.read_text(encoding="utf-8"))["admin"]
    logs = [*(finpro_home() / "logs").glob("*airflow*"), *(finpro_home() / "airflow" / "logs").rglob("*.log")]
    assert not [log for log in logs if password in log.read_text(encoding="utf-8", errors="replace")]
    assert airflow.password_file.stat().st_mode & 0o077 == 0
    assert password not in " ".join(command_lines)


def test_a_failing_expectation_is_not_tried_again_and_dbt_does_not_run(airflow: Airflow, settings: Settings) -> None:
    earlier = airflow.runs("transformation_dbt")
    execute(settings, "update raw_orders set country = 'Id' where order_id = 'last of a day'")
    ingest = airflow.trigger("bigquery_ingest")
    assert airflow.end_of("bigquery_ingest", ingest) == "failed"
    (gate,) = [each for each in airflow.tasks("bigquery_ingest", ingest) if each["task_id"] == "validate"]
    assert (gate["state"], gate["try_number"]) == ("failed", 1)
    assert airflow.state("bigquery_ingest", ingest, "reconcile") == "success"
    execute(settings, "update raw_orders set country = 'ID' where order_id = 'last of a day'")
    assert airflow.runs("transformation_dbt").keys() == earlier.keys()  # one of them may have run still


def test_a_run_whose_scheduler_and_task_are_killed_goes_on_when_airflow_is_back_and_no_row_is_doubled(
    airflow: Airflow, settings: Settings
) -> None:
    insert_valid_orders(settings)
    ingest = airflow.trigger("bigquery_ingest")
    wait(lambda: spark_submits(airflow.scheduler()), "spark-submit")
    scheduler = airflow.scheduler()
    assert scheduler
    for process in (scheduler, *scheduler.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # a task's helper may have just ended by itself
            process.kill()
    assert airflow.ended() == 5
    assert "airflow-scheduler has ended" in airflow.said

    airflow.start()
    assert airflow.end_of("bigquery_ingest", ingest) == "success"
    assert_the_warehouse_is_as_postgres(settings)


def spark_submits(scheduler: psutil.Process | None) -> bool:
    """Whether a task of this scheduler's has started Spark."""
    try:
        family = scheduler.children(recursive=True) if scheduler else []
        return any("export_raw.py" in " ".join(process.cmdline()) for process in family)
    except psutil.NoSuchProcess:
        return False


def insert_valid_orders(settings: Settings) -> None:
    """More orders than the warehouse holds, such as the gate lets pass."""
    insert_orders(settings, 1, 30)
    execute(settings, "update raw_orders set amount_numeric = 10, amount = 'Rp.10' where order_id ~ '^O[0-9]+$'")


def assert_the_warehouse_is_as_postgres(settings: Settings) -> None:
    for table in RAW:
        assert bigquery_rows(settings, table) == postgres_rows(settings, table)


def test_a_stopped_airflow_leaves_no_process(airflow: Airflow) -> None:
    scheduler = airflow.scheduler()
    family = [scheduler, *scheduler.children(recursive=True)] if scheduler else []
    assert family
    assert airflow.stop() == 0
    assert not [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def test_each_dag_runs_in_one_process_without_a_scheduler(platform: Platform, settings: Settings, tmp_path: Path) -> None:
    home = private_directory(finpro_home() / "airflow")
    platform.postgres.create_database("airflow")
    environment = airflow_environment(platform, home, port=1)
    prepare(environment, home)
    script = tmp_path / "run_each_dag.py"  # a file: under `python -c`, PySpark takes itself to be in a doctest, and exits
    script.write_text(RUN_EACH_DAG, encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    ended = [line for line in done.stdout.splitlines() if line.startswith("ended")]
    assert ended == [f"ended {name} success" for name in CHAIN], done.stdout[-3000:] + done.stderr[-3000:]
    assert_the_warehouse_is_as_postgres(settings)
