"""The archive of Spark's classes: what goes into its list, and what happens where none can be made."""

import sys
from pathlib import Path

import pytest

from conf.settings import finpro_home
from jobs.local import class_archive
from jobs.local.class_archive import CLASSES, archiving, class_list, from_archive, listed_classes, write_classes
from jobs.local.jars import spark_jars
from jobs.local.platform import down


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A Python environment and a home that no archive has been made for, with the jars of this one."""
    jars = spark_jars()
    monkeypatch.setattr(class_archive, "spark_jars", lambda: jars)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("FINPRO_HOME", str(tmp_path / "home"))


def test_a_list_holds_classes_of_java_and_of_sparks_jars_and_nothing_made_while_a_driver_ran(tmp_path: Path) -> None:
    loaded = tmp_path / "driver.lst"
    loaded.write_text(
        "# NOTE: Do not modify this file.\n"
        "java/lang/Object id: 0\n"
        "org/apache/spark/SparkContext id: 2\n"
        "org/apache/spark/SparkContext$$Lambda$12\n"
        "jdk/proxy1/$Proxy7\n"
        "io/delta/sql/DeltaSparkSessionExtension\n"
        "com/example/Thing\n"
        "org/codehaus/janino/Parser\n"
        "@lambda-proxy java/util/stream/Collectors apply\n"
    )

    assert class_list([loaded]) == [
        "io/delta/sql/DeltaSparkSessionExtension",
        "java/lang/Object",
        "org/apache/spark/SparkContext",
    ]


def test_the_list_is_of_what_this_pyspark_has(tmp_path: Path) -> None:
    listed = listed_classes()
    (tmp_path / "listed").write_text("\n".join(listed))

    assert listed
    assert class_list([tmp_path / "listed"]) == listed, "PySpark has changed: make conf/spark_classes.txt anew"


def test_the_list_is_written_as_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed, text = listed_classes(), CLASSES.read_bytes()
    monkeypatch.setattr(class_archive, "CLASSES", tmp_path / "written")
    write_classes(reversed(listed))

    assert (tmp_path / "written").read_bytes() == text
    assert listed_classes() == listed


def test_without_an_archive_a_driver_is_told_nothing() -> None:
    assert from_archive() == []


@pytest.mark.parametrize("reason", ["not writable", "no list"])
def test_where_none_can_be_made_the_block_runs_and_it_is_said(
    reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if reason == "not writable":
        (tmp_path / "spark-classes").write_text("a file where the folder would be")
    else:
        monkeypatch.setattr(class_archive, "CLASSES", tmp_path / "missing.txt")

    with archiving():
        ran = True

    assert ran
    assert "Spark starts slower" in capsys.readouterr().err
    assert from_archive() == []
    assert reason == "not writable" or (finpro_home() / "logs" / "class_archive.log").stat().st_size


def test_a_block_that_fails_ends_the_making(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="the port"), archiving():
        raise OSError("the port is in use")

    assert list((tmp_path / "spark-classes").glob("*.draft")) == []


def test_archives_of_another_spark_go_when_one_is_made_and_those_of_another_java_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = class_archive.class_archive()
    archive.parent.mkdir()
    of_another_java = archive.with_name(archive.name.replace(archive.stem[-12:], "another-java"))
    of_another_spark = archive.with_name("4.0.0-" + archive.name)
    of_another_java.touch()
    of_another_spark.touch()
    monkeypatch.setattr(class_archive, "_dump", lambda draft: (["touch", str(draft)], {}))

    with archiving():
        pass

    assert {path.name for path in archive.parent.iterdir()} == {archive.name, of_another_java.name, "lock"}
    assert from_archive()


def test_stopping_the_platform_makes_no_archive(tmp_path: Path) -> None:
    assert down() == []

    assert not (tmp_path / "spark-classes").exists()
