"""The rules while a query runs: their file is watched, and each micro-batch is screened by those in force at its own time.

The plan of a streaming query is fixed when it starts, so rules travel beside it: as a local property of the thread that
runs a micro-batch, which Spark hands to every task. A micro-batch that is replayed after a crash has the time it had
before, and so the same rules, whatever the file says by then.
"""

import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from pyspark import TaskContext

from conf.errors import FinproError
from conf.rules import FraudRules, load_rules
from streaming.rules.recorded import RulesInForce, decode_rules, encode_rules, rules_at

RULES_PROPERTY = "finpro.rules"

Record = Callable[[FraudRules, datetime], list[RulesInForce]]
_Signature = tuple[int, int, int] | None


class RulesReport(Protocol):
    """Is told what becomes of a changed rules file."""

    def rules_taken_up(self, version: str) -> None:
        """This version is in force, from the next micro-batch on."""

    def rules_refused(self, version: str, why: str) -> None:
        """The file cannot be used; `version` stays in force."""


class LiveRules:
    """The rules in force, and the file they come from.

    Attributes:
        start: what was in force when the query started.
    """

    def __init__(self, path: Path, record: Record, reports: Sequence[RulesReport] = ()) -> None:
        """Take up the rules in the file.

        Args:
            path: of the rules file.
            record: notes since when rules are in force, and returns the whole history.
            reports: who is told of a change.

        Raises:
            RulesError: the file cannot be used, or its version was used before for other rules.
            LakehouseError: the history cannot be read or written.
        """
        self._path, self._record, self._reports = path, record, reports
        self.start = load_rules(path)
        self._history = record(self.start, datetime.now(UTC))
        self._settled_at: datetime | None = None
        self._changing = threading.Lock()
        self._seen = self._tried = _signature(path)
        self._is_refused = False

    def look(self) -> None:
        """Take up a changed file, or say why not, once. To be called every now and then, by one thread."""
        before, self._seen = self._seen, _signature(self._path)
        is_being_written = self._seen != before
        if is_being_written or self._seen == self._tried:
            return
        self._tried = self._seen
        in_force = self._history[-1].rules
        try:
            rules = load_rules(self._path)
            if rules != in_force:
                with self._changing:
                    self._history = self._record(rules, datetime.now(UTC))
        except FinproError as error:
            self._is_refused = True
            for report in self._reports:
                report.rules_refused(in_force.version, str(error))
            return
        if rules != in_force or self._is_refused:
            self._is_refused = False
            for report in self._reports:
                report.rules_taken_up(rules.version)

    def for_micro_batch(self) -> str:
        """The value of RULES_PROPERTY for the micro-batch that is about to run: all rules that can be its own.

        Waits while rules are being taken up: a micro-batch after `since` must not run without them.
        """
        with self._changing:
            history = self._history
        older = [entry for entry in history if self._settled_at is not None and entry.since <= self._settled_at]
        return encode_rules(history[max(len(older) - 1, 0) :])

    def settled(self) -> None:
        """A micro-batch was settled: the time of the next one is later than now."""
        self._settled_at = datetime.now(UTC)


def rules_of_micro_batch(time: datetime) -> FraudRules:
    """The rules for the micro-batch of this time. Runs in its tasks."""
    history = TaskContext.get().getLocalProperty(RULES_PROPERTY)  # type: ignore[union-attr]
    return rules_at(_decoded(history), time)


@lru_cache(maxsize=1)
def _decoded(history: str) -> list[RulesInForce]:
    return decode_rules(history)


def _signature(path: Path) -> _Signature:
    """Differs when the file does; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
