"""A driver starts from the archive of Spark's classes that the platform has made: this machine's Java says so."""

import subprocess
from pathlib import Path

import pytest

from jobs.spark.submit import environment, spark_submit

pytestmark = pytest.mark.usefixtures("platform")


def loaded_by_a_driver(log: Path, *options: str) -> list[str]:
    """What Java says of each class that a driver has loaded, and from where."""
    java = " ".join([f"-Xlog:class+load:file={log}", *options])
    *command, _job = spark_submit("any", [], master="local[2]", memory="512m", conf=[f"spark.driver.extraJavaOptions={java}"])
    subprocess.run([*command, "--version"], env=environment("any", master="local[2]"), check=True)
    return [line for line in log.read_text().splitlines() if " org.apache.spark." in line and "$$Lambda" not in line]


def test_a_driver_maps_sparks_classes_from_the_archive(tmp_path: Path) -> None:
    loaded = loaded_by_a_driver(tmp_path / "log", "-Xshare:on")  # without a fitting archive this ends at once

    assert len(loaded) > 20
    assert [line for line in loaded if "shared objects file" not in line] == []


def test_an_archive_of_another_class_path_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HADOOP_CONF_DIR", str(tmp_path))
    monkeypatch.setenv("SPARK_CONF_DIR", str(tmp_path))

    loaded = loaded_by_a_driver(tmp_path / "log")

    assert len(loaded) > 20
    assert not any("shared objects file" in line for line in loaded)


def test_a_clusters_driver_is_told_of_none() -> None:
    command = spark_submit("any", [], master="spark://somewhere:7077", memory="512m", conf=[])

    assert not any("SharedArchiveFile" in word for word in command)
