"""What differs between two sets of rules: by rule, field by field."""

import json
from collections.abc import Iterator, Mapping
from hashlib import sha256
from typing import Any, NamedTuple

from conf.lists import unpacked
from conf.rules import FraudRules

_UNITS = (("h", 3600), ("min", 60))
ADDED, REMOVED, CHANGED = "added", "removed", "changed"


class Difference(NamedTuple):
    """What one field says before and after, as text; null where it says nothing there.

    `entry` is a rule or a list, such as rules.night_amount, which as a whole is ADDED, REMOVED or CHANGED (`kind`); empty for a
    field of the file itself, such as `lateness`.
    """

    kind: str
    entry: str
    field: str
    before: str | None
    after: str | None


def differences(before: FraudRules, after: FraudRules) -> list[Difference]:
    """By entry and field, fields of the file itself first. The version is a name, and no difference."""
    old, new = (dict(_fields(rules.model_dump(exclude={"version"}, exclude_none=True))) for rules in (before, after))
    entries = [{entry for entry, _ in side} for side in (old, new)]
    found = []
    for entry, name in sorted(old.keys() | new.keys()):
        is_in_both = not entry or all(entry in side for side in entries)
        kind = CHANGED if is_in_both else ADDED if entry in entries[1] else REMOVED
        said, says = old.get((entry, name)), new.get((entry, name))
        if said != says:
            found.append(Difference(kind, entry, name, said, says))
    return found


def _fields(said: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], str]]:
    """(entry, field) → what it says; a blank text says nothing."""
    for name, value in said.items():
        if not isinstance(value, dict):
            yield ("", name), _text(value)
            continue
        for entry, fields in value.items():
            if isinstance(fields, dict):
                yield from (((f"{name}.{entry}", place), _text(leaf)) for place, leaf in _leaves(fields) if leaf != "")
            else:
                yield (name, entry), _text(fields)


def _leaves(said: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in said.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{place}{name}.")
        elif name == "content":  # of a list: it may be long
            yield "values", f"{len(unpacked(value).values):,} ({sha256(value.encode()).hexdigest()[:12]})"
        else:
            yield f"{place}{name}", value


def _text(value: Any) -> str:
    if isinstance(value, float):  # only durations are
        unit, seconds = next((one for one in _UNITS if value % one[1] == 0 and value), ("s", 1))
        return f"{value / seconds:g} {unit}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def in_words(found: list[Difference]) -> list[str]:
    """A line for each difference, below one for each entry that was added, removed or changed."""
    lines: list[str] = []
    told = ""
    for one in found:
        if one.entry and one.entry != told:
            lines.append(f"{one.kind} {one.entry}")
        told = one.entry
        before, after = one.before or "nothing", one.after or "nothing"
        says = {ADDED: after, REMOVED: before, CHANGED: f"{before} -> {after}"}[one.kind]
        lines.append(f"{'  ' if one.entry else ''}{one.field}: {says}")
    return lines
