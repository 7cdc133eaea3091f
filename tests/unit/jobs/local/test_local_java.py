"""Which Java is taken: tried with programs that answer as a Java would."""

import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conf.errors import PlatformError
from jobs.local import java

FakeJava = Callable[[str, str], Path]


@pytest.fixture(autouse=True)
def _no_java_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("FINPRO_HOME", str(tmp_path / "home"))
    java.java_home.cache_clear()
    yield
    java.java_home.cache_clear()


@pytest.fixture
def fake_java(tmp_path: Path) -> FakeJava:
    """Makes a Java home whose `java` says that it is of a version."""

    def make(name: str, version: str) -> Path:
        home = tmp_path / name
        (home / "bin").mkdir(parents=True)
        launcher = home / "bin" / "java"
        launcher.write_text(f'#!/bin/sh\necho "    java.home = {home}\n    java.specification.version = {version}" >&2\n')
        launcher.chmod(0o755)
        return home

    return make


def test_java_home_is_taken_before_the_one_on_the_path(fake_java: FakeJava, monkeypatch: pytest.MonkeyPatch) -> None:
    named = fake_java("named", "21")
    monkeypatch.setenv("JAVA_HOME", str(named))
    monkeypatch.setenv("PATH", str(fake_java("on-path", "17") / "bin"))

    assert java.java_home() == named


def test_a_java_too_old_or_too_new_for_spark_is_passed_over(fake_java: FakeJava, monkeypatch: pytest.MonkeyPatch) -> None:
    on_path = fake_java("on-path", "17")
    monkeypatch.setenv("JAVA_HOME", str(fake_java("named", "25")))
    monkeypatch.setenv("PATH", str(on_path / "bin"))

    assert java.java_home() == on_path


def test_without_a_usable_java_the_one_from_pypi_runs(fake_java: FakeJava, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{fake_java('on-path', '1.8') / 'bin'}:/usr/bin:/bin")
    launcher = java.spark_java_home() / "bin" / "java"
    done = subprocess.run(
        [str(launcher), "--add-modules=jdk.incubator.vector", "-Dsaid=two words", "-XshowSettings:properties", "-version"],
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    assert "java.specification.version = 21" in done.stderr
    assert "said = two words" in done.stderr


@pytest.mark.parametrize("installed", [True, False])
def test_only_sparks_launcher_knows_its_home_where_python_is_to_import_the_installed_pyspark(
    fake_java: FakeJava, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    monkeypatch.setenv("JAVA_HOME", str(fake_java("named", "21")))
    (java.java_home() / "bin" / "java").write_text('#!/bin/sh\necho "$SPARK_HOME"\n')
    launcher = java.spark_java_home(installed_pyspark=installed) / "bin" / "java"

    def home_seen_by(main: str) -> str:
        run = [str(launcher), "-cp", "/jars/*", main, "--master", "local[2]"]
        return subprocess.run(run, capture_output=True, text=True, check=True, env={"SPARK_HOME": "/spark"}).stdout.strip()

    assert home_seen_by("org.apache.spark.launcher.Main") == "/spark"
    assert home_seen_by("org.apache.spark.deploy.SparkSubmit") == ("" if installed else "/spark")


def test_another_job_can_run_the_launcher_at_any_time(fake_java: FakeJava, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", str(fake_java("named", "21")))
    launcher = java.spark_java_home() / "bin" / "java"
    with ThreadPoolExecutor(1) as other:
        starts = other.submit(lambda: [java.spark_java_home() for _ in range(200)])
        while not starts.done():
            assert os.access(launcher, os.X_OK)


def test_without_any_java_the_error_says_what_was_found(fake_java: FakeJava, monkeypatch: pytest.MonkeyPatch) -> None:
    old = fake_java("on-path", "11")
    monkeypatch.setenv("PATH", str(old / "bin"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(PlatformError, match=rf"17 or 21 is needed \({old}/bin/java is 11\)"):
        java.java_home()
