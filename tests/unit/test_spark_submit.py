"""How jobs are submitted: what a local driver gets, and what one of a cluster."""

from pathlib import Path

import pytest

import jobs.spark_submit
from jobs.spark_submit import environment, spark_submit


@pytest.fixture(autouse=True)
def _one_jar(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FINPRO_HOME", str(tmp_path))
    monkeypatch.setenv("SPARK_DIST_CLASSPATH", "/mine/*")
    monkeypatch.setattr(jobs.spark_submit, "spark_jars", lambda: [Path("/jars/one.jar")])


def test_a_local_driver_has_the_jars_on_its_class_path() -> None:
    assert environment("screen_orders", master="local[2]")["SPARK_DIST_CLASSPATH"] == "/jars/one.jar:/mine/*"
    assert "--jars" not in spark_submit("screen_orders", [], master="local[2]", memory="1g", conf=[])


def test_a_cluster_gets_the_jars_sent_and_no_path_of_this_machine() -> None:
    command = spark_submit("screen_orders", [], master="yarn", memory="1g", conf=[])

    assert command[command.index("--jars") + 1] == "/jars/one.jar"
    assert environment("screen_orders", master="yarn")["SPARK_DIST_CLASSPATH"] == "/mine/*"
