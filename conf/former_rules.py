"""The rules files of old: six rules in sections of their own, with thresholds. They are read still, as entries.

What was recorded of them (the history of rules in the lakehouse) is in this form too. Everything that knows it is in this
module: how its sections become entries of today's form, and back where an entry is one of the six as they were delivered.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from conf.durations import Duration

Limit = Annotated[int, Field(ge=0, le=2**63 - 1)]
Members = Annotated[int, Field(ge=2, le=1_000)]


class _Section(BaseModel, ABC):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    mode: Literal["enforce", "shadow"] = "enforce"

    @abstractmethod
    def _says(self) -> dict[str, Any]:
        """Condition or pattern, as in an entry of today's form."""

    def entry(self) -> dict[str, Any]:
        """As an entry of today's form."""
        return self._says() | {"mode": self.mode}


class ForeignCountry(_Section):
    """The country of an order is not `home`."""

    home: Annotated[str, Field(pattern=r"^[A-Z]{2}$")] = "ID"

    def _says(self) -> dict[str, Any]:
        return {"when": f"country <> '{self.home}'"}


class NightQuantity(_Section):
    """Local time is in [00:00, 04:00) and quantity is above the limit."""

    above: Limit = 100

    def _says(self) -> dict[str, Any]:
        return {"when": f"local_hour < 4 and quantity > {self.above}"}


class NightAmount(_Section):
    """Local time is in [00:00, 04:00) and the amount, in whole rupiah, is above the limit."""

    above: Limit = 100_000_000

    def _says(self) -> dict[str, Any]:
        return {"when": f"local_hour < 4 and amount_numeric > {self.above}"}


class RepeatPurchase(_Section):
    """So many orders of one user for one product."""

    orders: Members = 3
    within: Duration = timedelta(seconds=10)

    def _says(self) -> dict[str, Any]:
        return {"by": ["user_id", "product_id"], "count": {"at_least": self.orders, "within": self.within}}


class _Users(_Section):
    """Orders of so many users for one product and quantity, in a pattern of this form."""

    form: ClassVar[str]

    users: Members = 3
    within: Duration = timedelta(seconds=10)

    def _says(self) -> dict[str, Any]:
        pattern = {"of": "user_id", "at_least": self.users, "within": self.within}
        return {"by": ["product_id", "quantity"], self.form: pattern}


class SequentialUsers(_Users):
    """Orders of so many users with consecutive ids for one product and quantity."""

    form = "consecutive"


class CoordinatedUsers(_Users):
    """Orders of so many different users for one product and quantity."""

    form = "distinct"


class Thresholds(BaseModel):
    """The sections; one that is absent has its defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    foreign_country: ForeignCountry = ForeignCountry()
    night_quantity: NightQuantity = NightQuantity()
    night_amount: NightAmount = NightAmount()
    repeat_purchase: RepeatPurchase = RepeatPurchase()
    sequential_users: SequentialUsers = SequentialUsers()
    coordinated_users: CoordinatedUsers = CoordinatedUsers()

    def entries(self) -> dict[str, Any]:
        """As entries of today's form, by name."""
        return {name: getattr(self, name).entry() for name in SIX}


SIX = tuple(sorted(Thresholds.model_fields))


def is_former(table: Mapping[str, Any]) -> bool:
    """Whether a rules file is of the old form, in which each of the six rules is there, said or not."""
    return "rules" not in table


def translated(table: Mapping[str, Any]) -> dict[str, Any]:
    """A rules file of the old form in today's.

    Raises:
        ValidationError: a section breaks its schema.
    """
    sections = {name: table[name] for name in SIX if name in table}
    rest = {name: value for name, value in table.items() if name not in SIX}
    return rest | {"rules": Thresholds.model_validate(sections).entries()}


def thresholds_of(rules: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the six sections whose rules (entries by name) are as they were delivered, but for their limits.

    What makes orders up, or measures, needs to know what the six look for; of other rules it knows nothing.
    """
    found = {name: _section(name, rules[name]) for name in SIX if name in rules}
    return {name: section for name, section in found.items() if section is not None}


def _section(name: str, rule: Any) -> _Section | None:
    """The section that says what a rule says; None where there is none."""
    if name in _CONDITIONS:
        kind, key, form = _CONDITIONS[name]
        match = re.fullmatch(form, rule.when or "")
        if rule.by or not match:
            return None
        return kind.model_validate({key: match[1] if key == "home" else int(match[1]), "mode": _mode(rule)})
    kind, key, form = _PATTERNS[name]
    pattern = getattr(rule, form)
    if pattern is None or rule.when:
        return None
    section = kind.model_validate({key: pattern.at_least, "within": pattern.within, "mode": _mode(rule)})
    entry = section.entry()
    is_same = list(rule.by) == entry["by"] and getattr(pattern, "of", None) == entry[form].get("of")
    return section if is_same else None


def _mode(rule: Any) -> str:
    return "enforce" if rule.mode == "enforce" else "shadow"


_CONDITIONS: dict[str, tuple[type[_Section], str, str]] = {
    "foreign_country": (ForeignCountry, "home", r"country <> '([A-Z]{2})'"),
    "night_quantity": (NightQuantity, "above", r"local_hour < 4 and quantity > ([0-9]+)"),
    "night_amount": (NightAmount, "above", r"local_hour < 4 and amount_numeric > ([0-9]+)"),
}
_PATTERNS: dict[str, tuple[type[_Section], str, str]] = {
    "repeat_purchase": (RepeatPurchase, "orders", "count"),
    "sequential_users": (SequentialUsers, "users", "consecutive"),
    "coordinated_users": (CoordinatedUsers, "users", "distinct"),
}
