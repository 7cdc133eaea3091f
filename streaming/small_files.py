"""Small text files beside the tables and in checkpoints: on any file system that Spark reaches."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from py4j.protocol import Py4JError
from pyspark.sql import SparkSession

from conf.errors import FileDamaged, FileMissing, LakehouseError
from streaming.jvm import Located, located, text_of, why


class Folder:
    """A folder of such files. `setting` is what to look at when it cannot be read or written.

    Every method raises LakehouseError then, FileDamaged where a file is not as it was written.
    """

    def __init__(self, spark: SparkSession, path: str, setting: str) -> None:
        self.path = path.rstrip("/")
        self._setting = setting
        self._is_local = self.path.startswith("/")
        self._spark = spark

    def names(self, within: str = "") -> list[str]:
        """The names of what lies in it, or in a folder `within` it, in order; none where there is no such folder."""
        with self._explained(within, "read") as (path, files):
            return sorted(status.getPath().getName() for status in files.listStatus(path)) if files.exists(path) else []

    def exists(self, name: str) -> bool:
        """Whether it has this file."""
        with self._explained(name, "read") as (path, files):
            return bool(files.exists(path))

    def read(self, name: str) -> str:
        """The text of a file."""
        if self._is_local:  # no need to ask the JVM, which takes a hundred times as long
            with suppress(OSError):
                return Path(self.path, name).read_text(encoding="utf-8")
        with self._explained(name, "read") as place:
            return text_of(self._spark, place)

    def write(self, name: str, text: str) -> None:
        """Write a file anew: under another name, then renamed, so that it is there whole or not at all."""
        with self._explained(name, "written") as (path, files):
            unfinished = located(self._spark, f"{self.path}/{name}.unfinished").path
            stream = files.create(unfinished, True)
            try:
                stream.write(bytearray(text.encode()))
            finally:
                stream.close()
            files.delete(path, False)  # a rename replaces nothing on HDFS
            renamed = files.rename(unfinished, path)
        if not renamed:
            raise LakehouseError(f"{self._full(name)} cannot be written: {self._advice}")

    def remove(self, within: str = "") -> None:
        """Remove it, or a folder `within` it, with all that is in it; nothing where there is no such folder."""
        with self._explained(within, "removed") as (path, files):
            files.delete(path, True)

    def _full(self, name: str) -> str:
        return f"{self.path}/{name}".rstrip("/")

    @property
    def _advice(self) -> str:
        return f"is {self._setting} right, and is this user allowed there?"

    @contextmanager
    def _explained(self, name: str, verb: str) -> Iterator[Located]:
        path = self._full(name)
        try:
            yield located(self._spark, path)
        except Py4JError as error:
            if "FileNotFoundException" in why(error):
                raise FileMissing(f"{path} is not there: {self._advice}") from error
            if "ChecksumException" in why(error):
                raise FileDamaged(f"{path} is damaged") from error
            raise LakehouseError(f"{path} cannot be {verb}: {self._advice}\n({why(error)})") from error
