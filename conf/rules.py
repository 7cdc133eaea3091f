"""`fraud_rules.toml`, typed: the rules as its entries, validated when they are read.

A rule is a condition on one order, or a pattern of several; what they mean is in `streaming.rules`.
"""

import re
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from conf.conditions import LOCAL_FIELDS, ORDER_FIELDS, Condition, ConditionError, DeclaredKind, Kind, parse_condition
from conf.durations import Duration
from conf.errors import RulesError
from conf.former_rules import SIX, Members, Thresholds, is_former, thresholds_of, translated
from conf.lists import ListError, packed, read_list, require_ids

MOST_RULES = 64
MOST_FIELDS = 32
MOST_LISTS = 16
# Of a rule: a reason is one for ever, so a reason of which no rule is left is none that could not have been given.
NAME = "[a-z][a-z0-9_]{0,62}"
_A_NAME = "a name has small letters, digits and _, a letter first, and at most 63 characters"
PATTERNS = ("count", "distinct", "consecutive", "sum")
# What a message has beside the fields of an order, or a verdict: no declared field can be called so.
_TAKEN = frozenset(
    {"status", "attributes", "reasons", "shadow_reasons", "suppressed_reasons", "rules_version", "screened_at", "evidence"}
)


def _zone(value: str) -> str:
    try:
        ZoneInfo(value)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ValueError(f'is not a time zone: "{value}". Use an IANA name such as "Asia/Jakarta"') from error
    return value


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Count(_Table):
    """At least so many orders within an interval, both its ends included."""

    at_least: Members
    within: Duration


class Distinct(Count):
    """Orders with at least so many different values of a field."""

    of: str


class Consecutive(Count):
    """Orders whose values of a field make a run of at least so many consecutive integers."""

    of: str


class Sum(_Table):
    """Orders whose values of a field add up to so much; one whose value is negative takes no part."""

    of: str
    at_least: Annotated[int, Field(ge=1, le=2**63 - 1)]
    within: Duration


Pattern = Count | Distinct | Consecutive | Sum


class Rule(_Table):
    """A condition on one order (`when`), or a pattern of orders that are equal in the fields `by` (and for which `when` holds).

    In shadow it is evaluated and counted, and changes no verdict's reasons or status. Off it is read, and that is all.
    """

    when: Annotated[str, Field(min_length=1)] | None = None
    by: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = None
    count: Count | None = None
    distinct: Distinct | None = None
    consecutive: Consecutive | None = None
    sum: Sum | None = None
    mode: Literal["enforce", "shadow", "off"] = "enforce"
    description: str = ""
    owner: str = ""

    @property
    def pattern(self) -> Pattern | None:
        """The one of the four forms that it has; None for a condition on one order."""
        return next((form for name in PATTERNS if (form := getattr(self, name)) is not None), None)

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that its pattern looks at."""
        of = getattr(self.pattern, "of", None)
        return (*(self.by or ()), *([of] if of else []))

    @property
    def within(self) -> timedelta:
        """The longest that its orders can be apart."""
        return self.pattern.within if self.pattern else timedelta(0)


class Allows(_Table):
    """What a list suppresses: the reasons of these rules, on an order whose user or product is in it at its event time."""

    by: Literal["user_id", "product_id"]
    reasons: Annotated[tuple[str, ...], Field(strict=False, min_length=1)]


class ListFile(_Table):
    """A list that conditions can look things up in; with `allows`, one that suppresses reasons too.

    `file` is the CSV's name, seen from the rules file. `content` are its entries as one text (`conf.lists`), which `load_rules`
    reads: a list is a part of the rules that are recorded.
    """

    file: Annotated[str, Field(min_length=1)]
    allows: Allows | None = None
    description: str = ""
    content: str = ""

    def suppressing(self, rules: Collection[str]) -> Self:
        """As it is for these rules alone."""
        if self.allows is None:
            return self
        reasons = tuple(reason for reason in self.allows.reasons if reason in rules)
        return self.model_copy(update={"allows": self.allows.model_copy(update={"reasons": reasons}) if reasons else None})


class FraudRules(_Table):
    """The rules in force. `version` goes into every verdict given with them.

    `fields` are those that an order may have beside those of every order, and their kinds; `lists` are looked up in by
    conditions.
    """

    version: Annotated[str, Field(min_length=1, max_length=64)]
    time_zone: Annotated[str, AfterValidator(_zone)] = "Asia/Jakarta"
    lateness: Duration = timedelta(seconds=30)
    max_future_skew: Duration = timedelta(seconds=60)
    fields: dict[str, DeclaredKind] = {}
    lists: dict[str, ListFile] = {}
    rules: dict[str, Rule] = {}

    @model_validator(mode="before")
    @classmethod
    def _of_any_form(cls, table: Any) -> Any:
        if not isinstance(table, dict):
            return table
        return translated(table) if is_former(table) else _without_examples(table)

    @model_validator(mode="after")
    def _says_what_it_may(self) -> "FraudRules":
        problems = list(self._problems())
        if problems:
            # A text of a person's may hold braces, which would be taken for places to fill in.
            raise PydanticCustomError("rules", "{problems}", {"problems": "\n  ".join(problems)})
        _ = self.conditions  # parsed here, they travel with the rules: no worker has to parse them
        return self

    def _problems(self) -> Iterator[str]:
        """What is wrong with the rules as a whole, each with its place."""
        if len(self.rules) > MOST_RULES:
            yield f"rules: there are {len(self.rules)}, at most {MOST_RULES} can be in force"
        if len(self.fields) > MOST_FIELDS:
            yield f"fields: there are {len(self.fields)}, at most {MOST_FIELDS} can be declared"
        if len(self.lists) > MOST_LISTS:
            yield f"lists: there are {len(self.lists)}, at most {MOST_LISTS} can be declared"
        for name, entry in self.lists.items():
            if not re.fullmatch(NAME, name):
                yield f"lists.{name}: {_A_NAME}"
            if entry.allows:
                yield from (f"lists.{name}.allows.reasons{place}" for place in self._problems_of_reasons(entry.allows.reasons))
        for name in self.fields:
            if not re.fullmatch(NAME, name):
                yield f"fields.{name}: {_A_NAME}"
            elif name in ORDER_FIELDS or name in LOCAL_FIELDS or name in _TAKEN:
                yield f"fields.{name}: every order or verdict has this field: expected one of another name"
        for name, rule in self.rules.items():
            if not re.fullmatch(NAME, name):
                yield f"rules.{name}: {_A_NAME}"
            yield from (f"rules.{name}{place}" for place in self._problems_of(rule))
            if isinstance(error := self._parsed.get(name), ConditionError):
                yield f"rules.{name}.when: {error} (in {_short(rule.when or '')})"

    def _problems_of_reasons(self, reasons: Sequence[str]) -> Iterator[str]:
        for reason in reasons:
            if reason not in self.rules:
                yield f": expected names of rules, found {_short(repr(reason))}; the rules are {', '.join(self.names)}"
        if len(set(reasons)) < len(reasons):
            yield ": names a rule twice"

    def _problems_of(self, rule: Rule) -> Iterator[str]:
        forms = [name for name in PATTERNS if getattr(rule, name) is not None]
        if len(forms) > 1:
            yield f": expected one pattern, found {' and '.join(forms)}"
        if not forms and rule.by:
            yield f".by: expected a pattern beside it, one of {', '.join(PATTERNS)}"
        if not forms and not rule.by and rule.when is None:
            yield f": expected when, or by with one of {', '.join(PATTERNS)}"
        if forms and not rule.by:
            yield '.by: missing: the fields in which the orders of a pattern are equal, such as ["user_id", "product_id"]'
        for field in rule.by or ():
            if field not in self.kinds:
                yield f".by: expected fields, found {field!r}; the fields are {', '.join(self.kinds)}"
        if rule.by and len(set(rule.by)) < len(rule.by):
            yield ".by: names a field twice"
        for form in forms[:1]:
            of = getattr(getattr(rule, form), "of", None)
            if of is None:
                continue
            if of not in self.kinds:
                yield f".{form}.of: expected a field, found {of!r}; the fields are {', '.join(self.kinds)}"
            elif form != "distinct" and self.kinds[of] != "int":
                yield f".{form}.of: expected a field of integers, {of} is one of {self.kinds[of]}"

    @property
    def kinds(self) -> Mapping[str, Kind]:
        """All fields that a rule can look at, and their kinds."""
        return {**ORDER_FIELDS, **LOCAL_FIELDS, **self.fields}

    @cached_property
    def conditions(self) -> dict[str, Condition]:
        """The conditions of the rules that have one and are not off, parsed."""
        parsed = {name: self._parsed.get(name) for name in self.evaluated}
        return {name: condition for name, condition in parsed.items() if isinstance(condition, Condition)}

    @cached_property
    def _parsed(self) -> dict[str, Condition | ConditionError]:
        """What each `when` says, or why it says nothing."""

        def parse(text: str) -> Condition | ConditionError:
            try:
                return parse_condition(text, self.fields, sorted(self.lists))
            except ConditionError as error:
                return error

        return {name: parse(rule.when) for name, rule in self.rules.items() if rule.when is not None}

    @property
    def evaluated(self) -> dict[str, Rule]:
        """The rules that are not off, by name, sorted."""
        return {name: rule for name, rule in sorted(self.rules.items()) if rule.mode != "off"}

    @property
    def looked_at(self) -> dict[str, frozenset[str]]:
        """The fields that each rule looks at which is not off."""
        conditions = self.conditions
        return {
            name: frozenset(rule.fields) | frozenset(conditions[name].fields if name in conditions else ())
            for name, rule in self.evaluated.items()
        }

    @property
    def widest_window(self) -> timedelta:
        """The longest interval any pattern can span: how long an order can matter to later ones."""
        return max((rule.within for rule in self.evaluated.values()), default=timedelta(0))

    @property
    def within_products(self) -> "FraudRules":
        """These rules without those across products: all orders of a pattern share a product."""
        return self._divided[0] or self

    @property
    def across_products(self) -> Mapping[str, "FraudRules"]:
        """The rules whose patterns have orders of several products, by the field that orders are divided by for them.

        Each is a field of the `by` of all its rules; there are as few of them as will do, none in most files.
        """
        return self._divided[1]

    @cached_property
    def _divided(self) -> tuple["FraudRules | None", dict[str, "FraudRules"]]:
        """Once made, they travel with the rules, as `conditions` do; None where all are within products."""
        left = {name: rule for name, rule in self.evaluated.items() if rule.by and "product_id" not in rule.by}
        within, across = self._without(left) if left else None, dict[str, FraudRules]()
        preferred = list(dict.fromkeys(["user_id", *self.fields, *self.kinds]))  # which has many values, as a rule
        while left:
            of_field = {field: [name for name, rule in left.items() if field in (rule.by or ())] for field in preferred}
            field, names = max(of_field.items(), key=lambda one: len(one[1]))  # of several, the first
            across[field] = self._without(self.rules.keys() - names)
            left = {name: rule for name, rule in left.items() if name not in names}
        return within, across

    def _without(self, names: Collection[str]) -> "FraudRules":
        rules = {name: rule.model_dump() for name, rule in self.rules.items() if name not in names}
        lists = {name: entry.suppressing(rules.keys()).model_dump() for name, entry in self.lists.items()}
        return FraudRules.model_validate(self.model_dump() | {"rules": rules, "lists": lists})

    @property
    def in_shadow(self) -> frozenset[str]:
        """The names of the rules whose findings are shadow reasons."""
        return frozenset(name for name, rule in self.rules.items() if rule.mode == "shadow")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all rules, sorted: what a verdict's reasons can be."""
        return tuple(sorted(self.rules))

    @property
    def limits(self) -> Thresholds:
        """The limits of the six rules that finpro is delivered with; the defaults of one that is not as it was delivered.

        For what makes orders up, or measures: it has to know what rules look for, and of others knows nothing.
        """
        return Thresholds(**thresholds_of(self.rules))

    @property
    def as_delivered(self) -> frozenset[str]:
        """Those of the six rules that are as they were delivered, but for their limits."""
        return frozenset(thresholds_of(self.rules))


def _without_examples(table: dict[str, Any]) -> dict[str, Any]:
    """Examples say nothing of what a rule does (`streaming.rules.examples` reads them)."""
    rules = table["rules"]
    if not isinstance(rules, dict):
        return table
    entries = {
        name: {key: value for key, value in rule.items() if key != "examples"} if isinstance(rule, dict) else rule
        for name, rule in rules.items()
    }
    return table | {"rules": entries}


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"


def load_rules(path: Path) -> FraudRules:
    """Read and validate a rules file, and the files of its lists.

    Raises:
        RulesError: a file cannot be read, is not TOML, or breaks the schema; names every offending key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RulesError(f"Cannot read the fraud rules {path}: {error}. FINPRO_RULES names the file.") from error
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise RulesError(f"The fraud rules {path} are not valid TOML: {error}.") from error
    problems: list[Any] = []
    if is_former(table):
        try:
            table = translated(table)
        except ValidationError as error:
            problems += error.errors()
            table = {name: value for name, value in table.items() if name not in SIX} | {"rules": {}}
    table, unusable = _with_contents(table, path.parent)
    problems += unusable
    try:
        rules = FraudRules.model_validate(table)
    except ValidationError as error:
        problems += error.errors()
    if problems:
        lines = "\n".join(f"  {_explain(problem)}" for problem in problems)
        raise RulesError(f"The fraud rules {path} are not usable:\n{lines}\nconf/fraud_rules.toml shows the form of each key.")
    return rules


def _with_contents(table: dict[str, Any], folder: Path) -> tuple[dict[str, Any], list[Any]]:
    """A rules file's table with what its lists hold, and what is wrong with their files."""
    lists, problems = table.get("lists"), list[Any]()
    if not isinstance(lists, dict):
        return table, problems
    entries = dict(lists)
    for name, entry in lists.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("file"), str):
            continue
        if "content" in entry:
            problems.append({"type": "extra_forbidden", "loc": ("lists", name, "content")})
        try:
            found = read_list(folder / entry["file"])
            if "allows" in entry:
                require_ids(folder / entry["file"], found)
            entries[name] = entry | {"content": packed(found)}
        except ListError as error:
            problems.append({"type": "rules", "msg": f"lists.{name}.file: {error}"})
    return table | {"lists": entries}, problems


def files_of(path: Path) -> list[Path]:
    """The rules file and the files of its lists, as far as it can be read: what a change of the rules can be seen by."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return [path]
    return [path, *(path.parent / name for name in list_files(text))]


def list_files(text: str) -> list[str]:
    """The files that `[lists.NAME] file = …` names in the text of a rules file, sorted; none where that is no TOML."""
    try:
        lists = tomllib.loads(text).get("lists", {})
    except (tomllib.TOMLDecodeError, RecursionError):
        return []
    entries = lists.values() if isinstance(lists, dict) else ()
    return sorted({entry["file"] for entry in entries if isinstance(entry, dict) and isinstance(entry.get("file"), str)})


def _explain(error: Any) -> str:
    if error["type"] == "rules":
        return str(error["msg"])
    place = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"{place}: unknown key; remove it or correct its spelling"
    if error["type"] == "missing":
        return f"{place}: missing"
    message = error["msg"].removeprefix("Value error, ")
    return f"{place}: {message} (found {_short(repr(error['input']))})"
