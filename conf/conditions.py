"""Conditions of rules: SQL that sqlglot parses, limited to what is allowed here, with the kind of every part known.

What a condition may say is GoogleSQL, so that it can be run as it stands in BigQuery on `stg_orders`. Only the form is known
here; `streaming.rules.conditions` says which orders it selects. sqlglot is imported when a text is parsed, which costs 0.4 s of
processor time: workers are given what was parsed.
"""

import difflib
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any, ClassVar, Literal, cast

Kind = Literal["string", "int", "number", "bool", "timestamp", "date"]
Constant = str | int | float | bool | datetime | date

# What every order has. `local_…` are of the event time, in the time zone of the rules; Monday is 1.
ORDER_FIELDS: dict[str, Kind] = {
    "order_id": "string",
    "user_id": "int",
    "product_id": "int",
    "quantity": "int",
    "amount": "string",
    "amount_numeric": "int",
    "country": "string",
    "created_date": "timestamp",
    "event_ts": "timestamp",
    "source": "string",
}
LOCAL_FIELDS: dict[str, Kind] = {"local_hour": "int", "local_weekday": "int", "local_date": "date"}
# What a rules file may declare beside them, in `[fields]`: a field of the message that an order may have.
DeclaredKind = Literal["string", "int", "number", "bool"]
Declared = Mapping[str, DeclaredKind]
FUNCTIONS = ("coalesce", "length", "listed", "lower", "mod", "starts_with", "upper")

_LONGEST = 4_000  # characters
_INT_BITS, _MOST_BITS = 63, 126  # of a field, and of what is worked out from fields: exact in 128 bits with a sign
_OPERATORS = {"EQ": "=", "NEQ": "<>", "LT": "<", "LTE": "<=", "GT": ">", "GTE": ">="}
_ARITHMETIC = {"Add": "+", "Sub": "-", "Mul": "*", "Div": "/"}
_CALLS = {
    "Coalesce": "coalesce",
    "Length": "length",
    "Lower": "lower",
    "Mod": "mod",
    "StartsWith": "starts_with",
    "Upper": "upper",
}
_MIRRORED = {"=": "=", "<>": "<>", "<": ">", "<=": ">=", ">": "<", ">=": "<="}


class ConditionError(ValueError):
    """A condition says what it may not; the text says where, and what was expected."""


@dataclass(frozen=True)
class Term:
    """A part of a condition, of which the kind is known.

    Attributes:
        op: `field`, `constant`, or what is done with `parts`: an operator of SQL or a function. Of `listed` it is a field.
        kind: of its value.
        parts: its own parts.
        value: of a constant; the name of a field, or of the list that `listed` looks in.
        bits: how large an integer can be, without its sign.
    """

    op: str
    kind: Kind
    parts: tuple["Term", ...] = ()
    value: Constant | None = None
    bits: int = _INT_BITS

    @property
    def is_constant(self) -> bool:
        """Whether it is the same for all orders."""
        return self.op == "constant"

    def walk(self) -> Iterator["Term"]:
        """Itself and all its parts."""
        waiting = [self]
        while waiting:
            term = waiting.pop()
            yield term
            waiting += term.parts


@dataclass(frozen=True)
class Condition:
    """A condition on one order.

    Attributes:
        text: as it is written.
        term: what it says, of kind bool.
    """

    text: str
    term: Term

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that it looks at, sorted."""
        return tuple(sorted({str(term.value) for term in self.term.walk() if term.op == "field"}))

    @property
    def lookups(self) -> tuple[tuple[str, str], ...]:
        """The fields that it looks up in lists, each with the list's name, sorted."""
        found = {(str(term.parts[0].value), str(term.value)) for term in self.term.walk() if term.op == "listed"}
        return tuple(sorted(found))

    @property
    def measured(self) -> tuple[Term, Constant] | None:
        """The value that an alert shows against its limit: of the last comparison with a constant that has to hold.

        One with the local time is taken only where there is no other: what is dear at night is shown by its amount. Where
        something is looked up in a list there is none: what is shown is why it is there.
        """
        if self.lookups:
            return None
        found = [pair for term in _conjuncts(self.term) if (pair := _compared(term))]
        others = [pair for pair in found if not any(part.value in LOCAL_FIELDS for part in pair[0].walk())]
        return next(iter([*reversed(others), *reversed(found)]), None)


def _conjuncts(term: Term) -> Iterator[Term]:
    if term.op == "and":
        for part in term.parts:
            yield from _conjuncts(part)
    else:
        yield term


def _compared(term: Term) -> tuple[Term, Constant] | None:
    if term.op not in _MIRRORED:
        return None
    left, right = term.parts
    if left.is_constant == right.is_constant:
        return None
    value, limit = (right, left) if left.is_constant else (left, right)
    return value, cast(Constant, limit.value)


def parse_condition(text: str, declared: Mapping[str, Kind], lists: Collection[str] = ()) -> Condition:
    """The condition in a text.

    Args:
        text: GoogleSQL.
        declared: kinds of the fields that it may use beside those of every order.
        lists: the names of the lists that it may look in.

    Raises:
        ConditionError: it is no SQL, or says what it may not: with line, column and what was expected.
    """
    if len(text) > _LONGEST:
        raise ConditionError(f"is longer than {_LONGEST:,} characters: split it into several rules")
    try:
        node = _parsed(text)
        term = _Typing(text, {**ORDER_FIELDS, **LOCAL_FIELDS, **declared}, lists).term(node)
    except RecursionError:
        raise ConditionError("is nested too deeply: split it into several rules") from None
    if term.kind != "bool":
        raise ConditionError(f"line 1, column 1: expected a condition, which is true or false, found {_a(term.kind)}")
    return Condition(text, term)


def _parsed(text: str) -> Any:
    import sqlglot

    logging.getLogger("sqlglot").setLevel(logging.CRITICAL)  # what it warns of is refused below
    try:
        return sqlglot.parse_one(text, read="bigquery")
    except sqlglot.errors.ParseError as error:
        first = next(iter(error.errors), {})
        if first.get("line") is None:
            raise ConditionError("expected a condition in SQL, such as quantity > 100, found nothing") from None
        found = f", found {first['highlight']}" if first.get("highlight") else ""
        at = f"line {first['line']}, column {max(1, first['col'] - len(first.get('highlight') or ' ') + 1)}"
        raise ConditionError(f"{at}: expected a condition in SQL{found}") from None
    except sqlglot.errors.SqlglotError:  # a text or a quoted name without an end
        raise ConditionError("expected a condition in SQL: is every quote closed?") from None


class _Typing:
    """Goes through the tree that sqlglot made of a text: nothing passes that is not named here."""

    def __init__(self, text: str, fields: Mapping[str, Kind], lists: Collection[str]) -> None:
        self._text, self._fields, self._lists = text, fields, lists

    def term(self, node: Any) -> Term:
        """What a node says."""
        name = type(node).__name__
        if name == "Paren":
            return self.term(node.this)
        if name in _OPERATORS:
            return self._comparison(node, _OPERATORS[name], [node.this, node.expression])
        if name in _ARITHMETIC:
            return self._arithmetic(node, _ARITHMETIC[name])
        if name in _CALLS:
            return self._call(node, _CALLS[name])
        reader = self._readers.get(name)
        if reader is None:
            raise self._error(node, f"expected a part of a condition, found {self._shown(node)}. {_ALLOWED}")
        return reader(self, node)

    def _connective(self, node: Any) -> Term:
        parts = [self._of(part, "bool", "on both sides of and, or") for part in (node.this, node.expression)]
        return Term(type(node).__name__.lower(), "bool", tuple(parts))

    def _not(self, node: Any) -> Term:
        return Term("not", "bool", (self._of(node.this, "bool", "after not"),))

    def _comparison(self, node: Any, operator: str, nodes: list[Any]) -> Term:
        terms = [self.term(one) for one in nodes]
        first = terms[0]
        for other, its_node in zip(terms[1:], nodes[1:], strict=True):
            if not _alike(first.kind, other.kind):
                hint = _as_literal(first.kind)
                raise self._error(its_node, f"expected {_a(first.kind)} beside {operator}, found {_a(other.kind)}{hint}")
        if first.kind == "bool" and operator not in ("=", "<>"):
            raise self._error(node, f"true and false are not in an order: expected = or <>, found {operator}")
        return Term(operator, "bool", tuple(terms))

    def _between(self, node: Any) -> Term:
        if node.args.get("symmetric"):
            raise self._error(node, f"expected between … and …, found symmetric. {_ALLOWED}")
        return self._comparison(node, "between", [node.this, node.args["low"], node.args["high"]])

    def _in(self, node: Any) -> Term:
        values = node.args.get("expressions")
        if not values or any(node.args.get(other) for other in ("query", "unnest", "field")):
            raise self._error(node, "expected values in brackets after in, such as country in ('ID', 'SG')")
        return self._comparison(node, "in", [node.this, *values])

    def _is(self, node: Any) -> Term:
        right = type(node.expression).__name__
        if right == "Null":
            return Term("is null", "bool", (self.term(node.this),))
        if right == "Boolean":
            operator = "is true" if node.expression.this else "is false"
            return Term(operator, "bool", (self._of(node.this, "bool", f"before {operator}"),))
        raise self._error(node.expression, "expected null, true or false after is")

    def _arithmetic(self, node: Any, operator: str) -> Term:
        left, right = (self._number(part, f"beside {operator}") for part in (node.this, node.expression))
        if operator == "/" or "number" in (left.kind, right.kind):
            return Term(operator, "number", (left, right))
        bits = left.bits + right.bits if operator == "*" else max(left.bits, right.bits) + 1
        return self._bounded(node, Term(operator, "int", (left, right), bits=bits))

    def _negative(self, node: Any) -> Term:
        if type(node.this).__name__ == "Literal" and not node.this.is_string:
            return self._numeral(node.this, "-")
        part = self._number(node.this, "after -")
        return Term("negative", part.kind, (part,), bits=part.bits)

    def _bounded(self, node: Any, term: Term) -> Term:
        if term.bits > _MOST_BITS:
            raise self._error(node, "this can grow beyond 128 bits, where no integer is exact: multiply fewer fields")
        return term

    def _call(self, node: Any, function: str) -> Term:
        written = self._text[node.meta["start"] : node.meta["end"] + 1].lower() if "start" in node.meta else "%"
        if written != function:
            raise self._error(node, f"expected one of the functions {', '.join(FUNCTIONS)}, found {written}")
        given = [node.this, node.args.get("expression"), *node.args.get("expressions", [])]
        return getattr(self, f"_{function}")(node, [one for one in given if one is not None])  # type: ignore[no-any-return]

    def _coalesce(self, node: Any, given: list[Any]) -> Term:
        terms = [self.term(one) for one in given]
        for other, its_node in zip(terms[1:], given[1:], strict=True):
            if not _alike(terms[0].kind, other.kind):
                raise self._error(its_node, f"expected {_a(terms[0].kind)} in coalesce, found {_a(other.kind)}")
        is_number = terms[0].kind == "int" and any(term.kind == "number" for term in terms)
        return Term("coalesce", "number" if is_number else terms[0].kind, tuple(terms), bits=max(term.bits for term in terms))

    def _mod(self, node: Any, given: list[Any]) -> Term:
        self._require_count(node, "mod", given, 2)
        left, right = (self._of(part, "int", "in mod") for part in given)
        return Term("mod", "int", (left, right), bits=left.bits)

    def _lower(self, node: Any, given: list[Any]) -> Term:
        self._require_count(node, "lower", given, 1)
        return Term("lower", "string", (self._of(given[0], "string", "in lower"),))

    def _upper(self, node: Any, given: list[Any]) -> Term:
        self._require_count(node, "upper", given, 1)
        return Term("upper", "string", (self._of(given[0], "string", "in upper"),))

    def _length(self, node: Any, given: list[Any]) -> Term:
        self._require_count(node, "length", given, 1)
        return Term("length", "int", (self._of(given[0], "string", "in length"),), bits=32)

    def _starts_with(self, node: Any, given: list[Any]) -> Term:
        self._require_count(node, "starts_with", given, 2)
        return Term("starts_with", "bool", tuple(self._of(one, "string", "in starts_with") for one in given))

    def _require_count(self, node: Any, function: str, given: list[Any], count: int) -> None:
        if len(given) != count:
            raise self._error(node, f"expected {count} value{'s' * (count > 1)} in {function}(…), found {len(given)}")

    def _named(self, node: Any) -> Term:
        """A function that sqlglot does not know: `listed(field, 'list')` is one."""
        if str(node.this) == "listed":
            return self._listed(node)
        raise self._error(node, f"expected one of the functions {', '.join(FUNCTIONS)}, found {node.this}")

    def _listed(self, node: Any) -> Term:
        given = node.args.get("expressions", [])
        self._require_count(node, "listed", given, 2)
        field, name = self.term(given[0]), self.term(given[1])
        if field.op != "field" or field.kind not in ("string", "int"):
            raise self._error(given[0], "expected a field of strings or integers first in listed(…)")
        if name.op != "constant" or name.kind != "string":
            raise self._error(given[1], "expected the name of a list in quotes, such as listed(device_id, 'blocked_devices')")
        if name.value not in self._lists:
            known = f"the lists are {', '.join(self._lists)}" if self._lists else "no list is declared in [lists]"
            raise self._error(given[1], f"expected a list, found {name.value!r}; {known}")
        return Term("listed", "bool", (field,), value=name.value)

    def _field(self, node: Any) -> Term:
        if node.args.get("table") or type(node.this).__name__ != "Identifier":
            raise self._error(node, f"expected the name of a field, found {self._shown(node)}")
        name = node.name.lower()
        if name not in self._fields:
            near = difflib.get_close_matches(name, self._fields, n=1)
            meant = f", did you mean {near[0]}?" if near else f"; the fields are {', '.join(self._fields)}"
            raise self._error(node, f"expected a field, found {name}{meant}")
        return Term("field", self._fields[name], value=name)

    def _literal(self, node: Any) -> Term:
        return Term("constant", "string", value=str(node.this)) if node.is_string else self._numeral(node, "")

    def _numeral(self, node: Any, sign: str) -> Term:
        if re.fullmatch(r"[0-9]+", node.this):
            number = int(sign + node.this) if len(node.this) < 30 else 2**64
            if not -(2**63) <= number < 2**63:
                raise self._error(node, "expected an integer of at most 64 bits")
            return Term("constant", "int", value=number, bits=abs(number).bit_length())
        try:
            value = float(sign + node.this)
        except ValueError:
            value = float("inf")
        if value in (float("inf"), float("-inf")):
            raise self._error(node, f"expected a number, found {node.this}")
        return Term("constant", "number", value=value)

    def _boolean(self, node: Any) -> Term:
        return Term("constant", "bool", value=bool(node.this))

    def _null(self, node: Any) -> Term:
        raise self._error(node, "nothing equals null: expected is null or is not null")

    def _moment(self, node: Any) -> Term:
        """`date '2026-11-01'` or `timestamp '2026-11-01 00:00:00+07'`, which sqlglot reads as casts of texts."""
        start = node.this.meta.get("start", 0)
        word = re.search(r"\b(date|timestamp)\s*$", self._text[:start], re.IGNORECASE)
        is_text = type(node.this).__name__ == "Literal" and node.this.is_string
        if not word or not is_text:
            raise self._error(node, f"expected a part of a condition, found a cast. {_ALLOWED}")
        text, kind = str(node.this.this), cast(Kind, word[1].lower())
        try:
            if kind == "date":
                return Term("constant", kind, value=date.fromisoformat(text))
            moment = datetime.fromisoformat(text)
            if moment.tzinfo is None:
                raise self._error(node, f"expected a timestamp with an offset, such as {text}+07:00")
            moment = moment.astimezone(UTC)
        except ConditionError:
            raise
        except (ValueError, OverflowError):
            raise self._error(node, f"expected {_a(kind)}{_as_literal(kind)}, found {text}") from None
        return Term("constant", kind, value=moment)

    def _number(self, node: Any, where: str) -> Term:
        term = self.term(node)
        if term.kind not in ("int", "number"):
            raise self._error(node, f"expected a number {where}, found {_a(term.kind)}")
        return term

    def _of(self, node: Any, kind: Kind, where: str) -> Term:
        term = self.term(node)
        if term.kind != kind:
            raise self._error(node, f"expected {_a(kind)} {where}, found {_a(term.kind)}")
        return term

    def _error(self, node: Any, message: str) -> ConditionError:
        starts = [one.meta["start"] for one in node.walk() if "start" in one.meta] if hasattr(node, "walk") else []
        start = min(starts, default=0)
        line, column = self._text.count("\n", 0, start) + 1, start - (self._text.rfind("\n", 0, start) + 1) + 1
        return ConditionError(f"line {line}, column {column}: {message}")

    def _shown(self, node: Any) -> str:
        text = node.sql("bigquery") if hasattr(node, "sql") else str(node)
        return text if len(text) <= 60 else f"{text[:60]}…"

    _readers: ClassVar[dict[str, Callable[["_Typing", Any], Term]]] = {
        "And": _connective,
        "Anonymous": _named,
        "Between": _between,
        "Boolean": _boolean,
        "Cast": _moment,
        "Column": _field,
        "In": _in,
        "Is": _is,
        "Literal": _literal,
        "Neg": _negative,
        "Not": _not,
        "Null": _null,
        "Or": _connective,
    }


_ALLOWED = (
    "Allowed are fields, constants, and or not, comparisons, in, between, is null, + - * / and the functions"
    f" {', '.join(FUNCTIONS)}"
)


def _alike(one: Kind, other: Kind) -> bool:
    return one == other or {one, other} == {"int", "number"}


def _a(kind: Kind) -> str:
    names = {"int": "an integer", "bool": "a condition", "string": "a string"}
    return names.get(kind, f"a {kind}")


def _as_literal(kind: Kind) -> str:
    literals = {"date": "date '2026-11-01'", "timestamp": "timestamp '2026-11-01 00:00:00+07:00'"}
    return f", such as {literals[kind]}" if kind in literals else ""
