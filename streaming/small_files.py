"""Small text files beside the tables and in checkpoints: on any file system that Spark reaches."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from py4j.protocol import Py4JError
from pyspark.sql import SparkSession

from conf.errors import FileDamaged, FileMissing, LakehouseError


class Folder:
    """A folder of such files. `setting` is what to look at when it cannot be read or written.

    Every method raises LakehouseError then, FileDamaged where a file is not as it was written.
    """

    def __init__(self, spark: SparkSession, path: str, setting: str) -> None:
        self.path = path.rstrip("/")
        self._setting = setting
        self._is_local = self.path.startswith("/")
        self._jvm: Any = spark._jvm
        self._hadoop: Any = spark._jsc.hadoopConfiguration()

    def names(self, within: str = "") -> list[str]:
        """The names of what lies in it, or in a folder `within` it; none where there is no such folder."""
        path = self._path(within)
        with self._explained(path, "read"):
            files = path.getFileSystem(self._hadoop)
            return [status.getPath().getName() for status in files.listStatus(path)] if files.exists(path) else []

    def exists(self, name: str) -> bool:
        """Whether it has this file."""
        path = self._path(name)
        with self._explained(path, "read"):
            return bool(path.getFileSystem(self._hadoop).exists(path))

    def read(self, name: str) -> str:
        """The text of a file."""
        if self._is_local:  # no need to ask the JVM, which takes a hundred times as long
            with suppress(OSError):
                return Path(self.path, name).read_text(encoding="utf-8")
        path = self._path(name)
        with self._explained(path, "read"):
            stream = path.getFileSystem(self._hadoop).open(path)
            try:
                return str(self._jvm.org.apache.commons.io.IOUtils.toString(stream, "UTF-8"))
            finally:
                stream.close()

    def write(self, name: str, text: str) -> None:
        """Write a file anew: under another name, then renamed, so that it is there whole or not at all."""
        path, unfinished = self._path(name), self._path(f"{name}.unfinished")
        with self._explained(path, "written"):
            files = path.getFileSystem(self._hadoop)
            stream = files.create(unfinished, True)
            try:
                stream.write(bytearray(text.encode()))
            finally:
                stream.close()
            files.delete(path, False)  # a rename replaces nothing on HDFS
            renamed = files.rename(unfinished, path)
        if not renamed:
            raise LakehouseError(f"{path.toString()} cannot be written: {self._advice}")

    def _path(self, name: str) -> Any:
        return self._jvm.org.apache.hadoop.fs.Path(f"{self.path}/{name}".rstrip("/"))

    @property
    def _advice(self) -> str:
        return f"is {self._setting} right, and is this user allowed there?"

    @contextmanager
    def _explained(self, path: Any, verb: str) -> Iterator[None]:
        try:
            yield
        except Py4JError as error:
            java = getattr(error, "java_exception", None)
            why = java.toString() if java else error
            if "FileNotFoundException" in str(why):
                raise FileMissing(f"{path.toString()} is not there: {self._advice}") from error
            if "ChecksumException" in str(why):
                raise FileDamaged(f"{path.toString()} is damaged") from error
            raise LakehouseError(f"{path.toString()} cannot be {verb}: {self._advice}\n({why})") from error
