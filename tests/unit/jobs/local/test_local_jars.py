"""Jars are fetched once, verified, and kept: tried with a Maven repository on loopback that serves small files."""

import hashlib
import json
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from jgo.maven import MavenContext

from conf.errors import PlatformError
from jobs.local import jars

CONTENT = b"the right jar"
PLACE = Path("org", "example", "thing", "1.0", "thing-1.0.jar")


class Quiet(SimpleHTTPRequestHandler):
    """A file server that does not log."""

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What the remote repository holds; the lock names `CONTENT`."""
    lock = tmp_path / "lock.json"
    lock.write_text(json.dumps({"spark": {"org.example:thing:1.0": hashlib.sha256(CONTENT).hexdigest()}}))
    served = tmp_path / "served" / PLACE
    served.parent.mkdir(parents=True)
    served.write_bytes(CONTENT)
    monkeypatch.setattr(jars, "LOCK", lock)
    monkeypatch.setenv("FINPRO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with serving(tmp_path / "served") as url:
        context = MavenContext(repo_cache=tmp_path / "m2", remote_repos={"here": url})
        monkeypatch.setattr(jars, "_maven", lambda: context)
        yield served


def test_a_jar_is_fetched_once_and_then_kept(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = jars.spark_jars()
    repository.unlink()

    assert jars.spark_jars() == first
    assert [(jar.name, jar.read_bytes()) for jar in first] == [("thing-1.0.jar", CONTENT)]
    assert capsys.readouterr().err.count("Fetching") == 1


def test_jars_lie_in_the_home_where_the_python_environment_cannot_be_written(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "finpro-jars").write_text("a file where the folder would be: no user can write there")

    assert [jar.parent for jar in jars.spark_jars()] == [tmp_path / "home" / "jars"]


def test_a_download_that_was_cut_off_is_fetched_again(repository: Path, tmp_path: Path) -> None:
    half = tmp_path / "m2" / PLACE
    half.parent.mkdir(parents=True)
    half.write_bytes(CONTENT[:5])

    assert [jar.read_bytes() for jar in jars.spark_jars()] == [CONTENT]


def test_a_jar_that_is_not_the_locked_one_is_refused(repository: Path, tmp_path: Path) -> None:
    repository.write_bytes(b"another jar")

    with pytest.raises(PlatformError, match=r"org\.example:thing:1\.0 .* SHA-256"):
        jars.spark_jars()
    assert list((tmp_path / "finpro-jars").iterdir()) == []


def test_a_jar_that_cannot_be_had_is_an_error_with_advice(repository: Path) -> None:
    repository.unlink()

    with pytest.raises(PlatformError, match="check the network or the proxy"):
        jars.spark_jars()


def test_the_lock_holds_every_coordinate_of_the_data_file() -> None:
    wanted = tomllib.loads(jars.COORDINATES.read_text())
    locked = json.loads(jars.LOCK.read_text())

    assert locked.keys() == wanted.keys()
    for group, coordinates in wanted.items():
        assert {coordinate.rstrip("!") for coordinate in coordinates} <= locked[group].keys()
