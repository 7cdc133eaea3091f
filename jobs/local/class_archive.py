"""Spark's classes as an archive that every driver on this machine maps into memory, instead of loading them one by one.

A driver loads some 18,000 classes before its first micro-batch: a third of its start. Java's class data sharing keeps them
read, verified and linked in a file (https://docs.oracle.com/en/java/javase/17/vm/class-data-sharing.html).

The file holds for one Java, one PySpark and the jars beside it: so it lies with their Python environment, as compiled modules
do, and serves all homes. Java itself refuses one whose jars have changed since, and loads the classes as ever: a driver
without a fitting archive only starts later.

`python -m jobs.local.class_archive LIST...` makes conf/spark_classes.txt anew of what drivers have loaded: for a new PySpark,
run the jobs with JDK_JAVA_OPTIONS=-XX:DumpLoadedClassList=/somewhere/%p.lst, and name those files.
"""

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from zipfile import ZipFile

import typer

from conf.settings import CONF_DIR, finpro_home
from jobs.local.jars import lock_of, spark_home, spark_jars
from jobs.local.java import java_home, quoted, spark_java_home
from jobs.local.private_files import exclusive_lock, private_directory
from jobs.local.processes import child_environment

CLASSES = CONF_DIR / "spark_classes.txt"
_LOCK = "lock"
_JAVA = re.compile(r"(com/sun|java|javax|jdk|sun)/")
# Made while a JVM runs; or of janino, whose jars are signed and so never archived.
_NOT_ARCHIVED = re.compile(r"\$Proxy\d|Handler\d|/Generated|\$\$Lambda|LambdaForm\$|janino|codehaus/commons/compiler")


def class_archive() -> Path:
    """Where the archive for this PySpark and this machine's Java lies, or would.

    Raises:
        PlatformError: there is no Java.
    """
    java = java_home()
    release = java / "release"
    versions = release.read_bytes() if release.exists() else b""
    return Path(sys.prefix) / "spark-classes" / f"{_prefix()}-{_digest(str(java).encode(), versions)}.jsa"


def from_archive() -> list[str]:
    """What tells a driver's Java to start from the archive; nothing when there is none.

    Raises:
        PlatformError: there is no Java.
    """
    archive = class_archive()
    # An archive that does not fit is not worth a word to whoever waits for orders.
    return [f"-XX:SharedArchiveFile={quoted(archive)}", "-Xlog:cds*=error"] if archive.exists() else []


@contextmanager
def archiving() -> Iterator[None]:
    """Make the archive beside this block, when there is none yet, and wait for it at the block's end: half a minute, once.

    What cannot be made is said, and is no error.

    Raises:
        PlatformError: there is no Java.
    """
    archive = class_archive()
    if archive.exists() or not _can_be_written(archive.parent):
        yield
        return
    waiting = partial(typer.echo, "Another finpro is archiving Spark's classes: waiting for it …", err=True)
    with exclusive_lock(archive.parent / _LOCK, on_wait=waiting):
        if archive.exists():
            yield
            return
        typer.echo("Archiving Spark's classes, for faster starts (once, half a minute) …", err=True)
        draft = archive.with_suffix(".draft")  # what was killed has left one: Java replaces it
        log = private_directory(finpro_home() / "logs") / "class_archive.log"
        with log.open("wb") as said:
            command, environment = _dump(draft)
            process = subprocess.Popen(command, stdout=said, stderr=said, stdin=subprocess.DEVNULL, env=environment)
        try:
            yield
            if process.wait() == 0:
                draft.replace(archive)
                _delete_those_of_another_spark(archive.parent)
            else:
                typer.echo(f"Spark's classes could not be archived, Spark starts slower: {log}", err=True)
        finally:
            process.kill()
            process.wait()
            draft.unlink(missing_ok=True)
            draft.with_suffix(".classes").unlink(missing_ok=True)


def _can_be_written(folder: Path) -> bool:
    try:
        folder.mkdir(exist_ok=True)
        (folder / _LOCK).touch()
    except OSError as error:
        typer.echo(f"Spark's classes cannot be archived in {folder} ({error.strerror}): Spark starts slower.", err=True)
        return False
    return True


def _delete_those_of_another_spark(folder: Path) -> None:
    for file in folder.glob("*-*"):
        if not file.name.startswith(_prefix()):
            file.unlink(missing_ok=True)


def _dump(target: Path) -> tuple[list[str], dict[str, str]]:
    """The command that makes the archive, and its environment: spark-submit's own, so that the class path is a driver's."""
    options = "-Xshare:dump -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -Xlog:cds*=error"
    classes = target.with_suffix(".classes")
    if CLASSES.exists():  # what is missing, Java says
        classes.write_text("\n".join(listed_classes()) + "\n", encoding="utf-8")
    files = f"-XX:SharedClassListFile={quoted(classes)} -XX:SharedArchiveFile={quoted(target)}"
    command = [str(spark_home() / "bin" / "spark-submit"), "--version"]
    jars = os.pathsep.join(map(str, spark_jars()))
    java = {"JAVA_HOME": str(spark_java_home()), "SPARK_SUBMIT_OPTS": f"{options} {files}", "SPARK_DIST_CLASSPATH": jars}
    return command, child_environment() | java


@cache
def _prefix() -> str:
    """How the names of all archives for this PySpark and this list of classes begin."""
    return f"{version('pyspark')}-{_digest(CLASSES.read_bytes(), repr(lock_of('spark')).encode())}"


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


def listed_classes() -> list[str]:
    """The classes of conf/spark_classes.txt, which has a package a line and the names of its classes behind it."""
    lines = map(str.split, CLASSES.read_text(encoding="utf-8").splitlines())
    return sorted(f"{package}/{name}" for package, *names in lines for name in names)


def write_classes(classes: Iterable[str]) -> None:
    """Write conf/spark_classes.txt."""
    packages: dict[str, list[str]] = {}
    for name in sorted(classes):
        package, _, own = name.rpartition("/")
        packages.setdefault(package, []).append(own)
    lines = (" ".join([package, *names]) for package, names in sorted(packages.items()))
    CLASSES.write_text("\n".join(lines) + "\n", encoding="utf-8")


def class_list(loaded: list[Path]) -> list[str]:
    """The classes of Java and of Spark's jars among those that drivers have loaded, as far as an archive can hold them.

    Args:
        loaded: files as `-XX:DumpLoadedClassList` writes them: a class a line, and lines with # or @ about something else.
    """
    lines = {line for path in loaded for line in path.read_text(encoding="utf-8").splitlines()}
    names = {line.split()[0] for line in lines if line[:1].isalpha()}
    jars = [*(spark_home() / "jars").glob("*.jar"), *spark_jars()]
    spark = {name.removesuffix(".class") for jar in jars for name in ZipFile(jar).namelist()}
    return sorted(name for name in names if (name in spark or _JAVA.match(name)) and not _NOT_ARCHIVED.search(name))


if __name__ == "__main__":
    write_classes(class_list([Path(name) for name in sys.argv[1:]]))
