"""How jobs are submitted: what a local driver gets, and what one of a cluster."""

import os
import shlex
from pathlib import Path

import pytest

from jobs.local.java import spark_java_home
from jobs.spark import submit
from jobs.spark.driver import become_driver, tell_while_waiting
from jobs.spark.submit import environment, spark_submit


@pytest.fixture(autouse=True)
def _one_jar(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FINPRO_HOME", str(tmp_path))
    monkeypatch.setenv("SPARK_DIST_CLASSPATH", "/mine/*")
    monkeypatch.setattr(submit, "spark_jars", lambda: [Path("/jars/one.jar")])


def test_a_local_driver_has_the_jars_on_its_class_path() -> None:
    assert environment("screen_orders", master="local[2]")["SPARK_DIST_CLASSPATH"] == "/jars/one.jar:/mine/*"
    assert "--jars" not in spark_submit("screen_orders", [], master="local[2]", memory="1g", conf=[])


def test_a_cluster_gets_the_jars_sent_and_no_path_of_this_machine() -> None:
    command = spark_submit("screen_orders", [], master="yarn", memory="1g", conf=[])

    assert command[command.index("--jars") + 1] == "/jars/one.jar"
    assert environment("screen_orders", master="yarn")["SPARK_DIST_CLASSPATH"] == "/mine/*"


def test_python_imports_the_installed_pyspark_where_it_is_surely_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYSPARK_PYTHON", raising=False)
    installed = str(spark_java_home(installed_pyspark=True))
    assert environment("screen_orders", master="local[2]")["JAVA_HOME"] == installed
    for cluster in ("yarn", "local-cluster[2,1,1024]"):
        assert environment("screen_orders", master=cluster)["JAVA_HOME"] != installed

    monkeypatch.setenv("PYSPARK_PYTHON", "/usr/bin/another-python")
    assert environment("screen_orders", master="local[2]")["JAVA_HOME"] != installed


def test_a_local_driver_has_its_whole_heap_from_the_start() -> None:
    command = spark_submit("screen_orders", [], master="local[2]", memory="700m", conf=[])

    assert command[command.index("--driver-memory") + 1] == "700m"
    (options,) = (part for part in command if part.startswith("spark.driver.defaultJavaOptions="))
    assert options.split()[-1].endswith("-Xms700m")


def test_a_home_with_a_blank_a_quote_or_a_backslash_in_its_name_is_one_word_of_javas_options(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = tmp_path / 'my "home" \\ x'
    monkeypatch.setenv("FINPRO_HOME", str(home))
    *_, log = shlex.split(environment("screen_orders", master="local[2]")["SPARK_SUBMIT_OPTS"])
    assert log == f"-Dfinpro.log.file={home}/logs/screen_orders.log"


def test_a_process_that_becomes_a_driver_starts_spark_as_spark_submit_would(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in environment("export_raw", master="local[2]"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # so that all of it ends with the test
    monkeypatch.setenv("PYSPARK_SUBMIT_ARGS", "")
    submitted = spark_submit("export_raw", [], master="local[2]", memory="1g", conf=["spark.app.id=a b"])
    prepared = environment("export_raw", master="local[2]")

    become_driver("export_raw", master="local[2]", memory="1g", conf=["spark.app.id=a b"])

    assert shlex.split(os.environ["PYSPARK_SUBMIT_ARGS"]) == [*submitted[1:-1], "pyspark-shell"]
    assert {name: os.environ[name] for name in prepared if name != "PYSPARK_SUBMIT_ARGS"} == {
        name: value for name, value in prepared.items() if name != "PYSPARK_SUBMIT_ARGS"
    }


def test_a_job_that_waits_for_cores_says_so_until_it_has_some(capsys: pytest.CaptureFixture[str]) -> None:
    answers = iter([False, False, True])
    tell_while_waiting("spark://master:7077", lambda: next(answers), every_seconds=0.01)
    said = capsys.readouterr().err.splitlines()

    assert len(said) == 2
    assert all("waiting for spark://master:7077" in line and "--master 'local[2,4]'" in line for line in said)
