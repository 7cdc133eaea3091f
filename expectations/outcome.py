"""What the gate found: one record an expectation, without a trace of the library that checked it."""

import json
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from conf.settings import finpro_home

_FILE = "gate.json"


def data_docs() -> Path:
    """Where the pages of the last gate lie; `index.html` is the first of them."""
    return finpro_home() / "data_docs"


class Severity(Enum):
    """What becomes of a run when an expectation does not hold."""

    FAIL = "fail"  # nothing may be built on this table
    WARN = "warn"  # it is counted and shown


class Outcome(NamedTuple):
    """One expectation and what became of it.

    `expected` is the expectation in words. `unexpected` counts the rows that break it (None where rows do not break it one by
    one), and `examples` shows some of them. `error` says why it could not be checked, which stops a run whatever the severity.
    """

    table: str
    expected: str
    severity: Severity
    holds: bool
    unexpected: int | None = None
    examples: tuple[Mapping[str, object], ...] = ()
    error: str | None = None

    @property
    def stops(self) -> bool:
        """Whether nothing may follow."""
        return not self.holds and (self.severity is Severity.FAIL or self.error is not None)

    def __str__(self) -> str:
        """`raw_orders: every order has an order_id of its own (3 rows: order_id o1; order_id o2; …)`."""
        return f"{self.table}: {self.expected} ({self.finding()})"

    def finding(self) -> str:
        """What breaks it: how many rows, and some of them; or why it could not be checked."""
        if self.error:
            return f"could not be checked: {self.error}"
        shown = [", ".join(f"{name} {value}" for name, value in example.items()) for example in self.examples]
        if self.unexpected is None:
            return "; ".join(shown)
        rows = f"{self.unexpected:,} row{'' if self.unexpected == 1 else 's'}"
        more = ["…"] if self.unexpected > len(shown) else []
        return f"{rows}: {'; '.join(shown + more)}" if shown else rows


class GateRun(NamedTuple):
    """What the gate found about one export run."""

    run_id: str
    outcomes: list[Outcome]


def write_gate_run(folder: Path, run: GateRun) -> None:
    """Keep what the gate found beside the pages that show it."""
    outcomes = [outcome._asdict() | {"severity": outcome.severity.value} for outcome in run.outcomes]
    record = {"run_id": run.run_id, "outcomes": outcomes}
    (folder / _FILE).write_text(json.dumps(record, default=str, indent=1), encoding="utf-8")


def read_gate_run(folder: Path) -> GateRun | None:
    """What was kept in a folder; None when there is no such folder."""
    path = folder / _FILE
    if not path.exists():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    return GateRun(record["run_id"], [_outcome(fields) for fields in record["outcomes"]])


def _outcome(fields: dict[str, Any]) -> Outcome:
    return Outcome(**fields | {"severity": Severity(fields["severity"]), "examples": tuple(fields["examples"])})
