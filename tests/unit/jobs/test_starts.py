"""A command starts at once: it imports what it needs, and nothing that only other commands need."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

# Says on its last line of stderr which modules are there when a command has ended.
RUN = """
import json, sys
from jobs.cli import run
run(sys.argv[1:])
print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""
SPARK = {"pyspark", "py4j", "delta"}
WAREHOUSE = {"google.cloud.storage", "google.cloud.bigquery", "grpc", "great_expectations", "sqlalchemy", "dbt"}
TABLES = {"pandas", "polars", "adbc_driver_manager"}
OTHERS = {"faker", "babel", "jinja2", "kafka", "prometheus_client", "airflow", "discord_webhook"}
CLIENTS = {"confluent_kafka", "psycopg2", "numpy", "pyarrow", "requests", "psutil", "pydantic_settings", "rich"}
SLOW = SPARK | WAREHOUSE | TABLES | OTHERS

HELP = (["--help"], ["screen", "--help"], ["export", "--help"], ["status", "--help"], ["notify", "--help"])


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """An environment in which nothing of finpro's is configured."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FINPRO_", "STORAGE_", "BIGQUERY_"))}
    return kept | {"FINPRO_HOME": str(tmp_path), "PYTHONPATH": str(Path.cwd())}


def run(arguments: list[str], environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN, *arguments]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=True)


def imported(done: subprocess.CompletedProcess[str]) -> set[str]:
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize("arguments", HELP, ids=" ".join)
def test_help_needs_none_of_the_libraries_that_do_the_work(arguments: list[str], bare: dict[str, str], tmp_path: Path) -> None:
    done = run(arguments, bare, tmp_path)

    assert "Usage: finpro" in done.stdout
    assert imported(done) & (SLOW | CLIENTS) == set()


def test_env_needs_nothing_that_is_slow(bare: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "env").write_text("FINPRO_KAFKA_BOOTSTRAP_SERVERS=127.0.0.1:9\n")

    done = run(["env"], bare, tmp_path)

    assert done.stdout == "export FINPRO_KAFKA_BOOTSTRAP_SERVERS=127.0.0.1:9\n"
    assert imported(done) & SLOW == set()


def test_status_needs_nothing_of_what_is_not_configured(bare: dict[str, str], tmp_path: Path) -> None:
    done = run(["status", "--json"], bare, tmp_path)

    assert len(json.loads(done.stdout)["parts"]) == 13
    assert imported(done) & (SLOW | {"requests", "rich"}) == set()


def test_status_of_a_warehouse_goes_without_pandas_and_leaves_it_usable(bare: dict[str, str], tmp_path: Path) -> None:
    program = """
import sys
from conf.settings import Settings
from jobs.health.checks import import_what_checks_need
import_what_checks_need(Settings(gcp_project="p"))
assert "google.cloud.bigquery" in sys.modules
assert "pandas" not in sys.modules
import pyarrow
assert pyarrow.array([1, 2]).to_pandas().sum() == 3
"""
    subprocess.run([sys.executable, "-c", program], env=bare, cwd=tmp_path, check=True)


@pytest.mark.parametrize(
    ("arguments", "seconds"),
    [(["--help"], 0.3), (["screen", "--help"], 0.5), (["env"], 1.0), (["status", "--json"], 1.0)],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_start_costs_little(arguments: list[str], seconds: float, bare: dict[str, str], tmp_path: Path) -> None:
    """Processor time, which others on the machine change little: twice what was measured on a slow and busy one."""
    (tmp_path / "env").write_text("")

    def costs() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run(arguments, bare, tmp_path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(costs() for _ in range(3)) < seconds
