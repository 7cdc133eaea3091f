"""On a Spark standalone cluster of two workers, which know nothing of finpro, its jobs run unchanged."""

import io
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zipfile import ZipFile

import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from batch.google_cloud import open_bucket
from batch.warehouse.manifest import Manifest, find_manifest
from conf.rules import load_rules
from conf.settings import CONF_DIR, Settings, project_root
from jobs.local.jars import spark_jars
from jobs.spark.submit import cloud_storage_properties, environment, package
from tests.runs import screening as runs
from tests.runs.archive import assert_lakehouse_agrees
from tests.runs.commands import finpro_process
from tests.runs.exports import export_run, fill, make_room_for_spark
from tests.runs.spark_cluster import SparkCluster, python_without_finpro
from tests.runs.spark_events import event_log, tasks_by_executor

SMALL = ("--max-offsets-per-trigger", "400")
ON_WORKERS_OF_TWO = {"0", "1"}  # the executors' ids: one a worker, which has no more than one core


@pytest.fixture(scope="module")
def workers_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return python_without_finpro(tmp_path_factory.mktemp("python") / "venv")


@pytest.fixture(scope="module")
def started(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkCluster]:
    cluster = SparkCluster(tmp_path_factory.mktemp("cluster"))
    try:
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def cluster(started: SparkCluster) -> SparkCluster:
    """The cluster, whole, whatever the test before has done to it."""
    started.start()
    return started


@pytest.fixture
def on_cluster(cluster: SparkCluster, workers_python: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options that take a command of finpro's to the cluster."""
    monkeypatch.setenv("PYSPARK_PYTHON", str(workers_python))
    return ["--master", cluster.url, "--memory", "512m"]


@pytest.fixture(scope="module")
def wheel(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, under the name that `make wheel` gives it for --py-files."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=project_root(), check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built.rename(folder / "finpro.zip")


def backlog(settings: Settings, count: int) -> None:
    start = datetime.now(UTC) - timedelta(hours=2)
    orders = runs.dense_orders(count, load_rules(settings.rules), seed=21, start=start, step=timedelta(milliseconds=400))
    runs.send(settings, runs.repeated(orders, seed=21))


def test_the_wheel_holds_what_the_finpro_command_sends_to_workers(wheel: Path) -> None:
    sent = {name for name in ZipFile(package()).namelist() if name.endswith((".py", ".toml", ".sql"))}
    project = tomllib.loads(Path(project_root(), "pyproject.toml").read_text(encoding="utf-8"))

    assert "streaming/rules/rules.py" in sent
    assert sent <= set(ZipFile(wheel).namelist())
    assert {Path(name).parts[0] for name in sent} == set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])


@pytest.mark.timeout(300)
def test_both_workers_screen_and_archive_and_the_verdicts_are_those_of_the_brute_force(
    settings: Settings, on_cluster: list[str], spark_session: SparkSession, tmp_path: Path
) -> None:
    """More than a minute: six JVMs start, and those of a cluster without an archive of classes."""
    backlog(settings, 800)
    screening, archiving = tmp_path / "screening", tmp_path / "archiving"

    screened = finpro_process("screen", "--available-now", *SMALL, *on_cluster, *event_log(screening))
    archived = finpro_process("archive", "--available-now", *on_cluster, *event_log(archiving))

    assert screened.returncode == 0, screened.stderr
    assert archived.returncode == 0, archived.stderr
    runs.assert_agrees(runs.outcome(settings), runs.judged(settings, load_rules(settings.rules)))
    assert_lakehouse_agrees(spark_session, settings)
    assert set(tasks_by_executor(screening)) == set(tasks_by_executor(archiving)) == ON_WORKERS_OF_TWO


@pytest.mark.timeout(300)
def test_a_worker_killed_in_the_middle_loses_nothing(settings: Settings, on_cluster: list[str], cluster: SparkCluster) -> None:
    backlog(settings, 3_000)
    commits = Path(settings.checkpoints, "screen_orders", "commits")
    process = runs.start_screen("--available-now", *on_cluster)
    try:
        deadline = time.monotonic() + 120
        while len(list(commits.glob("[0-9]*"))) < 2:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "the query does not get on"
            time.sleep(0.05)
        cluster.kill_worker()
        assert len(list(commits.glob("[0-9]*"))) < 6, "it was nearly over"
        said, _ = process.communicate(timeout=200)
    finally:
        if process.poll() is None:
            runs.kill_group(process)

    assert process.returncode == 0, said
    runs.assert_agrees(runs.outcome(settings), runs.judged(settings, load_rules(settings.rules)))


def rows(settings: Settings, run: Manifest) -> dict[str, list[str]]:
    """What a run exported: table → its rows, sorted, as text."""
    bucket = open_bucket(settings)
    return {
        table.table: sorted(
            str(row)
            for file in table.files
            for row in pq.read_table(io.BytesIO(bucket.blob(file.name).download_as_bytes())).to_pylist()
        )
        for table in run.tables
    }


@pytest.mark.timeout(240)
def test_an_export_by_plain_spark_submit_with_the_wheel_exports_what_one_process_does(
    settings: Settings, cluster: SparkCluster, workers_python: Path, wheel: Path, tmp_path: Path
) -> None:
    fill(settings, orders=500)
    make_room_for_spark(settings)
    python = {"PYSPARK_PYTHON": str(workers_python), "PYSPARK_DRIVER_PYTHON": str(workers_python), "PYTHONPATH": ""}
    variables = environment("export_raw", master=cluster.url) | python
    command = [str(Path(variables["SPARK_HOME"], "bin", "spark-submit")), "--master", cluster.url]
    command += ["--properties-file", str(CONF_DIR / "spark-defaults.conf"), "--executor-memory", "512m"]
    command += ["--py-files", str(wheel), "--jars", ",".join(map(str, spark_jars()))]
    command += [part for entry in cloud_storage_properties(settings) for part in ("--conf", entry)]
    command += [*event_log(tmp_path / "events"), str(project_root() / "jobs" / "export_raw.py"), "--run-id", "on-a-cluster"]

    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path, env=variables)

    assert done.returncode == 0, done.stderr
    exported = find_manifest(open_bucket(settings), "on-a-cluster")
    assert exported is not None
    assert rows(settings, exported) == rows(settings, export_run(settings, "in-one-process", full=True))
    assert tasks_by_executor(tmp_path / "events")
