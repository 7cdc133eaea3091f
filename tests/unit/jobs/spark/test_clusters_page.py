"""Each line of docs/clusters.md that starts a job parses, and names only what there is."""

import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from zipfile import ZipFile

import pyspark
import pytest
import typer

from conf.settings import CONF_DIR, Settings, project_root, variable
from jobs.cli import app
from jobs.spark import submit as spark_submit

ROOT = project_root()
SPARK_JARS = Path(pyspark.__file__).parent / "jars"
MADE_BY_THE_READER = {"dist/finpro.zip", "finpro-env.tar.gz", ".env", "/etc/ssl/kafka-ca.pem", "/etc/ssl/postgres-ca.pem"}
COORDINATES = tomllib.loads((CONF_DIR / "jars.toml").read_text(encoding="utf-8"))["spark"]
# What follows these is the user's, the name of a variable or of a secret, or put together by Spark as it runs.
FAMILIES = (
    "spark.executorEnv.",
    "spark.yarn.appMasterEnv.",
    "spark.kubernetes.driverEnv.",
    "spark.kubernetes.driver.secretKeyRef.",
    "spark.kubernetes.driver.secrets.",
    "spark.kubernetes.executor.secrets.",
    "spark.kubernetes.authenticate.driver",
)
# Options of `gcloud dataproc jobs submit pyspark`, from its reference.
GCLOUD = {"--cluster", "--region", "--py-files", "--files", "--properties-file", "--properties", "--max-failures-per-hour"}


def commands() -> list[list[str]]:
    page = Path(ROOT, "docs", "clusters.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line) for line in lines]


def of_program(name: str) -> list[list[str]]:
    found = [words[1:] for words in commands() if words[0] == name]
    assert found
    return found


@cache
def text_of_classes(jar: str, part: str) -> bytes:
    """The classes of a Spark jar whose names hold `part`: constants are plain text in them."""
    with ZipFile(next(SPARK_JARS.glob(f"{jar}_2.13-*.jar"))) as classes:
        return b"".join(classes.read(name) for name in classes.namelist() if part in name)


def options_and_job(words: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """The options of a spark-submit line with their values, and the job's file with its arguments."""
    options = []
    while words[0].startswith("--"):
        options.append((words[0], words[1]))
        words = words[2:]
    return options, words


def spark_submits() -> Iterator[tuple[list[tuple[str, str]], list[str]]]:
    yield from (options_and_job(words) for words in of_program("spark-submit"))


def properties() -> set[str]:
    """The names of all properties that a line sets."""
    named = {value for options, _ in spark_submits() for option, value in options if option == "--conf"}
    for words in of_program("gcloud"):
        (several,) = (word.removeprefix("--properties=^#^") for word in words if word.startswith("--properties="))
        named |= set(several.split("#"))
    return {entry.split("=", 1)[0] for entry in named}


def assert_job_takes(job: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The job's file is there, and its own parser takes the arguments."""
    path = job[0].removeprefix("local:///opt/finpro/")
    assert Path(ROOT, path).is_file()
    monkeypatch.setattr(sys, "argv", job)
    import_module(path.removesuffix(".py").replace("/", ".")).arguments()


def test_every_spark_submit_line_has_options_that_spark_knows_and_starts_a_job_that_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = text_of_classes("spark-launcher", "SparkSubmitOptionParser")

    for options, job in spark_submits():
        assert [option for option, _ in options if option.encode() not in known] == []
        assert {"--master", "--properties-file", "--name"} <= dict(options).keys()
        assert_job_takes(job, monkeypatch)


def test_every_dataproc_line_has_options_of_gcloud_and_starts_a_job_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for words in of_program("gcloud"):
        ours = words.index("--")
        assert words[:4] == ["dataproc", "jobs", "submit", "pyspark"]
        assert {word.split("=", 1)[0] for word in words[5:ours]} <= GCLOUD
        assert_job_takes([words[4], *words[ours + 1 :]], monkeypatch)


def test_every_finpro_line_is_taken_by_the_command() -> None:
    for name, *arguments in of_program("finpro"):
        command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
        command.make_context(name, arguments)


def test_every_property_is_one_of_sparks() -> None:
    classes = {"spark-core": "onf", "spark-kubernetes": "onf", "spark-yarn": "yarn"}  # of configuration, all of YARN's
    known = b"".join(text_of_classes(jar, part) for jar, part in classes.items())
    of_delta = {entry.split("=")[0] for entry in spark_submit.DELTA}
    families = "|".join(re.escape(family) for family in FAMILIES if family.encode() in known)
    named = {re.sub(f"^({families}).*", r"\1", name) for name in properties()} - of_delta

    assert [name for name in sorted(named) if not re.search(re.escape(name.encode()) + rb"(?![\w.])", known)] == []


def test_every_file_is_there_or_made_as_the_page_says() -> None:
    of_files = {"--properties-file", "--py-files", "--files", "--archives", "--from-file"}
    named = {value for options, _ in spark_submits() for option, value in options if option in of_files}
    pairs = [
        word.split("=", 1) for name in ("gcloud", "kubectl") for words in of_program(name) for word in words if "=" in word
    ]
    named |= {value for option, value in pairs if option in of_files}

    files = {file.split("#")[0] for value in named for file in value.split(",")}

    assert [file for file in files - MADE_BY_THE_READER if not Path(ROOT, file).is_file()] == []


def test_every_package_is_locked_for_spark() -> None:
    named = {value for options, _ in spark_submits() for option, value in options if option == "--packages"}
    text = Path(ROOT, "docs", "clusters.md").read_text(encoding="utf-8")
    named |= set(re.findall(r"spark\.jars\.packages=([^\s#]+)", text)) | set(re.findall(r"`([\w.]+:[\w.-]+:[\w.:]+)`", text))

    assert {package for value in named for package in value.split(",")} <= set(COORDINATES)


def test_every_setting_is_one_of_finpros() -> None:
    text = Path(ROOT, "docs", "clusters.md").read_text(encoding="utf-8")

    assert set(re.findall(r"FINPRO_[A-Z_]+", text)) <= {variable(name) for name in Settings.model_fields}


def test_the_archives_line_gives_spark_what_the_finpro_command_gives_it() -> None:
    (options,) = (options for options, job in spark_submits() if "archive_orders" in job[0])

    assert set(spark_submit.DELTA) <= {value for option, value in options if option == "--conf"}


def test_make_wheel_makes_what_the_lines_send() -> None:
    (rule,) = re.findall(r"^wheel:.*\n((?:\t.*\n)+)", Path(ROOT, "Makefile").read_text(encoding="utf-8"), re.MULTILINE)

    assert "dist/finpro.zip" in rule
