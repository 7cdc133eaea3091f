"""Examples beside a rule: orders that it must hit, and orders that it must not, in `[[rules.NAME.examples]]` of the rules file.

They say nothing of what a rule does, and so are no part of what is recorded with a version.
"""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Annotated, Any
from zoneinfo import ZoneInfo

import numpy as np
import polars as pl
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from conf.conditions import ORDER_FIELDS, Declared
from conf.errors import RulesError
from conf.rules import FraudRules, load_rules
from streaming.contract import DECLARED_DTYPES, ORDER_SCHEMA, attributes_of
from streaming.rules.lists import allowed
from streaming.rules.rules import findings

_DAY = date(2026, 11, 2)  # a Monday: of an example that gives a time of day only
# An order that says nothing else is this one, at noon.
_ORDINARY: dict[str, Any] = {
    "user_id": 1,
    "product_id": 1,
    "quantity": 1,
    "amount_numeric": 100_000,
    "country": "ID",
    "source": "web",
}


class _Example(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    hit: bool
    orders: Annotated[list[dict[str, Any]], Field(min_length=1)]
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of an example.

    Attributes:
        rule: whose it is.
        number: its place among the rule's examples, from 1.
        wrong: which of its orders, from 1, got what they must not; none where all is well.
        hit: whether the orders must be hit.
        note: what the example says of itself.
    """

    rule: str
    number: int
    wrong: tuple[int, ...]
    hit: bool
    note: str


def try_examples(path: Path) -> list[Outcome]:
    """Screen the examples of a rules file, each by its rule alone.

    Raises:
        RulesError: the file cannot be used, or an example is none; says which.
    """
    rules = load_rules(path)
    entries = tomllib.loads(path.read_text(encoding="utf-8")).get("rules", {})
    return [
        _tried(rules, name, number, _read(path, name, number, example))
        for name, entry in entries.items()
        for number, example in enumerate(entry.get("examples", []), 1)
    ]


def _read(path: Path, rule: str, number: int, example: Any) -> _Example:
    try:
        return _Example.model_validate(example)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise RulesError(f"The fraud rules {path}: rules.{rule}.examples, number {number}: {problems}.") from error


def _tried(rules: FraudRules, name: str, number: int, example: _Example) -> Outcome:
    rule = rules.rules[name].model_copy(update={"mode": "enforce"})
    lists = {of: entry.model_dump() | {"allows": None} for of, entry in rules.lists.items()}
    alone = FraudRules.model_validate(rules.model_dump() | {"rules": {name: rule}, "lists": lists})
    try:
        orders = _table(example.orders, ZoneInfo(rules.time_zone), rules.fields)
    except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError) as error:
        raise RulesError(f"rules.{name}.examples, number {number}: {error}.") from error
    is_suppressed = allowed(orders, rules).get(name, np.zeros(len(orders), np.bool_))
    hit = {row for row in findings(orders, alone)[name].rows.tolist() if not is_suppressed[row]}
    wrong = tuple(place + 1 for place in range(len(orders)) if (place in hit) != example.hit)
    return Outcome(name, number, wrong, example.hit, example.note)


def _table(said: Sequence[dict[str, Any]], zone: ZoneInfo, declared: Declared) -> pl.DataFrame:
    """The orders of an example (columns of ORDER_SCHEMA that rules look at)."""
    fields = [*ORDER_FIELDS, *sorted(declared)]
    unknown = {name for order in said for name in order}.difference(fields)
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: no field of an order; the fields are {', '.join(fields)}")
    whole = []
    for number, order in enumerate(said, 1):
        full = _ORDINARY | {"order_id": f"o{number}"} | order
        full["event_ts"] = _moment(order.get("event_ts", time(12)), zone)
        full["created_date"] = _moment(order["created_date"], zone) if "created_date" in order else full["event_ts"]
        full.setdefault("amount", str(full["amount_numeric"]))
        whole.append(full)
    schema = {name: ORDER_SCHEMA[name] for name in ORDER_FIELDS} | {name: DECLARED_DTYPES[declared[name]] for name in declared}
    orders = pl.DataFrame(whole, schema=schema, strict=True)
    return orders.select(*ORDER_FIELDS, attributes_of([orders[name] for name in sorted(declared)], len(orders)))


def _moment(said: Any, zone: ZoneInfo) -> datetime:
    """A moment of TOML: a time of day and a time without an offset are local ones."""
    if isinstance(said, time):
        said = datetime.combine(_DAY, said)
    if not isinstance(said, datetime):
        raise TypeError(f"{said!r} is no time, such as 01:30:00 or 2026-11-02T01:30:00+07:00")
    return (said if said.tzinfo else said.replace(tzinfo=zone)).astimezone(UTC)


def tried(path: Path) -> str:
    """Try the examples of a rules file; returns what there is to say.

    Raises:
        RulesError: the file cannot be used, or an example got what it must not; names each.
    """
    outcomes = try_examples(path)
    failed = [outcome for outcome in outcomes if outcome.wrong]
    if failed:
        lines = "\n".join(f"  {_line(outcome)}" for outcome in failed)
        raise RulesError(f"{len(failed)} of {len(outcomes)} examples of {path} fail:\n{lines}")
    rules = len({outcome.rule for outcome in outcomes})
    return f"{len(outcomes)} examples of {rules} rules hold."


def _line(outcome: Outcome) -> str:
    orders = ", ".join(map(str, outcome.wrong))
    must = "must be hit and is not" if outcome.hit else "is hit and must not be"
    note = f" ({outcome.note})" if outcome.note else ""
    return f"{outcome.rule}, example {outcome.number}{note}: order {orders} {must}"
