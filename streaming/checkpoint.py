"""What Spark writes into the checkpoint of a query: the one place that knows how it is laid out.

Spark has no public way to ask which offsets a micro-batch will read, before it reads them, or how far a checkpoint has come.
The files are the same since Spark 2.1: `metadata` names the query, `sources/0/0` the first offsets, `offsets/N` what
micro-batch N goes up to, `commits/N` that it is complete. tests/integration/streaming/screening/test_ledger.py fails when that
changes.
"""

import json
from typing import Any, NamedTuple

from pyspark.sql import SparkSession

from conf.errors import FileDamaged, FileMissing, StreamingError
from streaming.small_files import Folder

Ends = dict[int, int]  # partition → offset


class Planned(NamedTuple):
    """The newest micro-batch in a checkpoint: its number, and partition → the offset after its last message."""

    batch: int
    ends: Ends


class Checkpoint:
    """A folder where Spark keeps how far a query has come. Its query reads one topic.

    Attributes:
        lost: what to do where it cannot be used any more.
    """

    lost = "move the checkpoint away and start anew, as docs/runbook.md says (the checkpoint of screening is lost)."

    def __init__(self, spark: SparkSession, folder: str) -> None:
        self.folder = folder
        self.files = Folder(spark, folder, "FINPRO_CHECKPOINTS")
        self._query_id: str | None = None

    def planned(self) -> Planned | None:
        """The newest micro-batch, which may not have been written yet; None in a new checkpoint.

        Raises:
            StreamingError: its file is damaged.
        """
        newest = self._newest("offsets")
        return None if newest is None else Planned(newest, self.ends(newest))

    def committed(self) -> int | None:
        """The newest micro-batch that is complete; None before the first.

        Raises:
            StreamingError: its file is damaged.
        """
        newest = self._newest("commits")
        if newest is not None:
            self._json(
                f"commits/{newest}", line=1, instead="remove it. Its micro-batch is done again then, which changes nothing."
            )
        return newest

    def ends(self, batch: int) -> Ends:
        """Up to which offsets a micro-batch reads.

        Raises:
            StreamingError: its file is missing or damaged.
        """
        return _partitions(self._json(f"offsets/{batch}", line=-1))

    def planned_at_ms(self, batch: int) -> int:
        """When Spark planned a micro-batch, epoch milliseconds.

        Raises:
            StreamingError: its file is missing or damaged.
        """
        return int(self._json(f"offsets/{batch}", line=1)["batchTimestampMs"])

    def begins(self) -> Ends:
        """From which offsets its first micro-batch reads.

        Raises:
            StreamingError: the file is missing or damaged.
        """
        return _partitions({"": self._json("sources/0/0", line=-1).popitem()[1]})

    def query_id(self) -> str | None:
        """The id of the query that it was made by; None in a new checkpoint.

        Raises:
            StreamingError: the file is damaged.
        """
        if self._query_id is None and "metadata" in self.files.names():
            self._query_id = str(self._json("metadata", line=0)["id"])
        return self._query_id

    def has_state_of_sparks(self) -> bool:
        """Whether Spark kept the state of an operator in it."""
        return bool(self.files.names("state"))

    def _newest(self, log: str) -> int | None:
        return max((int(name) for name in self.files.names(log) if name.isdigit()), default=None)

    def _json(self, name: str, *, line: int, instead: str | None = None) -> dict[str, Any]:
        """An object in a line of a file, as it was written; `instead` is what to do where it is damaged."""
        damaged = f"The file {self.files.path}/{name} is damaged: {instead or f'put it back from a copy, or {self.lost}'}"
        try:
            found = json.loads(self.files.read(name).splitlines()[line])
        except FileMissing as error:
            raise StreamingError(f"The checkpoint lacks the file {self.files.path}/{name}: {self.lost}") from error
        except (FileDamaged, IndexError, ValueError) as error:
            raise StreamingError(damaged) from error
        if not isinstance(found, dict) or not found:
            raise StreamingError(damaged)
        return found


def _partitions(topics: dict[str, Any]) -> Ends:
    (partitions,) = topics.values()
    return {int(partition): int(end) for partition, end in partitions.items()}
