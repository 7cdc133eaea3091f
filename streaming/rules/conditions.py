"""Which orders a condition selects: what `conf.conditions` has parsed, as expressions of polars.

SQL's own rules hold for null. Beyond what polars does by itself: `mod` has the sign of its first value, as in GoogleSQL;
integers that can grow beyond 64 bits are worked out in 128; what is divided by zero is null, where GoogleSQL would give up.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, reduce
from operator import and_, or_

import polars as pl

from conf.conditions import LOCAL_FIELDS, Declared, DeclaredKind, Kind, Term
from streaming.rules.lists import listed

_DTYPES: dict[Kind, pl.DataType] = {
    "string": pl.String(),
    "int": pl.Int64(),
    "number": pl.Float64(),
    "bool": pl.Boolean(),
    "timestamp": pl.Datetime("us", "UTC"),
    "date": pl.Date(),
}
_WIDE_BITS = 63  # an integer that can be larger needs 128 bits
_MANY = 8  # values of `in` that are worth a set

_COMPARISONS: dict[str, Callable[[pl.Expr, pl.Expr], pl.Expr]] = {
    "=": pl.Expr.eq,
    "<>": pl.Expr.ne,
    "<": pl.Expr.lt,
    "<=": pl.Expr.le,
    ">": pl.Expr.gt,
    ">=": pl.Expr.ge,
}
_ARITHMETIC: dict[str, Callable[[pl.Expr, pl.Expr], pl.Expr]] = {
    "+": pl.Expr.add,
    "-": pl.Expr.sub,
    "*": pl.Expr.mul,
}


def with_local_fields(orders: pl.DataFrame, time_zone: str, wanted: Sequence[str] = tuple(LOCAL_FIELDS)) -> pl.DataFrame:
    """Orders and, of `local_hour` (0 to 23), `local_weekday` (Monday is 1) and `local_date`, those that are wanted."""
    local = pl.col("event_ts").dt.convert_time_zone(time_zone).dt
    fields = {
        "local_hour": local.hour().cast(pl.Int64),
        "local_weekday": local.weekday().cast(pl.Int64),
        "local_date": local.date(),
    }
    return orders.with_columns(**{name: expression for name, expression in fields.items() if name in wanted})


def with_declared_fields(orders: pl.DataFrame, declared: Declared) -> pl.DataFrame:
    """Orders and, out of their `attributes`, these declared fields: null where an order has none, or one of another kind."""
    return orders.with_columns(**{name: _declared(name, kind) for name, kind in declared.items()})


def _declared(name: str, kind: DeclaredKind) -> pl.Expr:
    text = pl.col("attributes").str.json_path_match(f"$.{name}")
    if kind == "bool":
        return text.replace_strict({"true": True, "false": False}, default=None, return_dtype=pl.Boolean)
    return text.cast(_DTYPES[kind], strict=False)


@lru_cache(maxsize=1_024)
def holds(term: Term) -> pl.Expr:
    """Whether a condition holds for an order: not where it is null."""
    return expression(term).fill_null(value=False)


def expression(term: Term) -> pl.Expr:
    """The value of a part of a condition."""
    if term.op == "field":
        return pl.col(str(term.value))
    if term.op == "constant":
        return pl.lit(term.value, dtype=_DTYPES[term.kind])
    if term.op in _COMPARISONS:
        return _compared(term.op, *term.parts)
    if term.op in _ARITHMETIC:
        return _ARITHMETIC[term.op](*(_as_wide(part, term) for part in term.parts))
    return _FUNCTIONS[term.op](term)


def _compared(operator: str, left: Term, right: Term) -> pl.Expr:
    wide = {part.kind for part in (left, right)} == {"int"} and max(left.bits, right.bits) > _WIDE_BITS
    one, other = (expression(part).cast(pl.Int128) if wide else _as_number(part, left, right) for part in (left, right))
    return _COMPARISONS[operator](one, other)


def _as_number(part: Term, *beside: Term) -> pl.Expr:
    """A part; an integer as a number where it stands beside one."""
    if part.kind == "int" and any(other.kind == "number" for other in beside):
        return expression(part).cast(pl.Float64)
    return expression(part)


def _as_wide(part: Term, whole: Term) -> pl.Expr:
    if whole.kind == "number":
        return expression(part).cast(pl.Float64)
    return expression(part).cast(pl.Int128) if whole.bits > _WIDE_BITS else expression(part)


def _between(term: Term) -> pl.Expr:
    value, low, high = term.parts
    return _compared(">=", value, low) & _compared("<=", value, high)


def _in(term: Term) -> pl.Expr:
    value, *values = term.parts
    if len(values) > _MANY and all(one.is_constant and one.kind == value.kind for one in values) and value.bits <= _WIDE_BITS:
        return expression(value).is_in(pl.Series([one.value for one in values], dtype=_DTYPES[value.kind]).implode())
    return reduce(or_, (_compared("=", value, one) for one in values))


def _divided(term: Term) -> pl.Expr:
    left, right = (expression(part).cast(pl.Float64) for part in term.parts)
    return pl.when(right != 0).then(left / right)


def _remainder(term: Term) -> pl.Expr:
    left, right = (expression(part).cast(pl.Int128) for part in term.parts)
    remainder = left.abs() % pl.when(right != 0).then(right.abs())
    return pl.when(left < 0).then(0 - remainder).otherwise(remainder)


def _first(term: Term) -> pl.Expr:
    wide = term.kind == "int" and term.bits > _WIDE_BITS
    parts = [expression(part).cast(pl.Int128) if wide else _as_number(part, term) for part in term.parts]
    # Polars' own coalesce makes one value, and no column, of a constant and a column that is all null.
    return reduce(lambda first, second: pl.when(first.is_not_null()).then(first).otherwise(second), parts)


_FUNCTIONS: dict[str, Callable[[Term], pl.Expr]] = {
    "/": _divided,
    "and": lambda term: reduce(and_, map(expression, term.parts)),
    "between": _between,
    "coalesce": _first,
    "in": _in,
    "is false": lambda term: (~expression(term.parts[0])).fill_null(value=False),
    "is null": lambda term: expression(term.parts[0]).is_null(),
    "is true": lambda term: expression(term.parts[0]).fill_null(value=False),
    "listed": lambda term: pl.col(listed(str(term.parts[0].value), str(term.value))),
    "length": lambda term: expression(term.parts[0]).str.len_chars().cast(pl.Int64),
    "lower": lambda term: expression(term.parts[0]).str.to_lowercase(),
    "mod": _remainder,
    "negative": lambda term: 0 - expression(term.parts[0]).cast(pl.Int128 if term.kind == "int" else pl.Float64),
    "not": lambda term: ~expression(term.parts[0]),
    "or": lambda term: reduce(or_, map(expression, term.parts)),
    "starts_with": lambda term: expression(term.parts[0]).str.starts_with(expression(term.parts[1])),
    "upper": lambda term: expression(term.parts[0]).str.to_uppercase(),
}
