"""The rules while a query runs: their file is watched, and each micro-batch is screened by those in force at its own time.

A micro-batch that is done again after a crash has the time and the rules it had before, whatever the file says by then: the
ledger says which (see `streaming.screening.ledger`).
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from conf.errors import FinproError, RulesError
from conf.rules import FraudRules, files_of, load_rules
from streaming.rules.recorded import RulesInForce

Record = Callable[[FraudRules, datetime], list[RulesInForce]]
_Signature = tuple[tuple[int, int, int] | None, ...]


class RulesReport(Protocol):
    """Is told what becomes of a changed rules file."""

    def rules_taken_up(self, version: str) -> None:
        """This version is in force, from the next micro-batch on."""

    def rules_refused(self, version: str, why: str) -> None:
        """The file cannot be used; `version` stays in force."""


class LiveRules:
    """The rules in force, and the file they come from, with those of its lists.

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
        self._changing = threading.Lock()
        self._files = files_of(path)
        self._seen = self._tried = _signature(self._files)
        self._is_refused = False

    def look(self) -> None:
        """Take up a changed file, or say why not, once. To be called every now and then, by one thread."""
        before, self._seen = self._seen, _signature(self._files)
        is_being_written = self._seen != before
        if is_being_written or self._seen == self._tried:
            return
        if (files := files_of(self._path)) != self._files:  # whether a further one is being written, the next look tells
            self._files, self._seen = files, _signature(files)
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

    @contextmanager
    def fixed(self) -> Iterator[str]:
        """The version in force, which stays so in the block: a micro-batch that gets its moment there goes by these rules."""
        with self._changing:
            yield self._history[-1].rules.version

    def of_version(self, version: str) -> FraudRules:
        """The rules of this version, ready for workers: those that a micro-batch had keep their meaning when it is done again.

        Raises:
            RulesError: it was never recorded in this lakehouse.
        """
        known = next((entry for entry in reversed(self._history) if entry.rules.version == version), None)
        if known is None:
            raise RulesError(
                f"A micro-batch was begun by version {version} of the rules, which this lakehouse does not know: is"
                " FINPRO_LAKEHOUSE right?"
            )
        return known.rules


def _signature(paths: Sequence[Path]) -> _Signature:
    """Differs when one of the files does; None stands for one that is not there."""
    return tuple(map(_signature_of, paths))


def _signature_of(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
