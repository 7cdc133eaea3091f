"""`fraud_rules.toml`, typed: the thresholds of the six rules, validated when they are read."""

import re
import tomllib
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from conf.errors import RulesError

_UNITS = {"ms": "milliseconds", "s": "seconds", "sec": "seconds", "m": "minutes", "min": "minutes", "h": "hours"}
_UNITS |= {unit: unit for unit in ("milliseconds", "seconds", "minutes", "hours")}
_UNITS |= {unit.removesuffix("s"): unit for unit in ("seconds", "minutes", "hours")}


def _duration(value: Any) -> timedelta:
    """Seconds as a number, or text with a unit."""
    if isinstance(value, timedelta):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return timedelta(seconds=value)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", value.strip()) if isinstance(value, str) else None
    if match is None or match[2] not in _UNITS:
        raise ValueError('is not a duration: write seconds (10) or text such as "10 s", "500 ms", "2 min"')
    return timedelta(**{_UNITS[match[2]]: float(match[1])})


def _within_a_day(value: timedelta) -> timedelta:
    if value < timedelta(0):
        raise ValueError("must not be negative")
    if value > timedelta(days=1):
        raise ValueError("must be at most a day: every order of that long is kept in state")
    return value


def _zone(value: str) -> str:
    try:
        ZoneInfo(value)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ValueError(f'is not a time zone: "{value}". Use an IANA name such as "Asia/Jakarta"') from error
    return value


# As JSON it is seconds, which `_duration` reads.
Duration = Annotated[
    timedelta, BeforeValidator(_duration), AfterValidator(_within_a_day), PlainSerializer(timedelta.total_seconds)
]

Limit = Annotated[int, Field(ge=0, le=2**63 - 1)]
Members = Annotated[int, Field(ge=2, le=1_000)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Rule(_Table):
    """What every rule has. In shadow it is evaluated and counted, and changes no verdict's reasons or status."""

    mode: Literal["enforce", "shadow"] = "enforce"


class ForeignCountry(Rule):
    home: Annotated[str, Field(pattern=r"^[A-Z]{2}$")] = "ID"


class NightQuantity(Rule):
    above: Limit = 100


class NightAmount(Rule):
    above: Limit = 100_000_000


class RepeatPurchase(Rule):
    orders: Members = 3
    within: Duration = timedelta(seconds=10)


class SequentialUsers(Rule):
    users: Members = 3
    within: Duration = timedelta(seconds=10)


class CoordinatedUsers(Rule):
    users: Members = 3
    within: Duration = timedelta(seconds=10)


class FraudRules(_Table):
    """The thresholds in force. `version` goes into every verdict given with them."""

    version: Annotated[str, Field(min_length=1, max_length=64)]
    time_zone: Annotated[str, AfterValidator(_zone)] = "Asia/Jakarta"
    lateness: Duration = timedelta(seconds=30)
    max_future_skew: Duration = timedelta(seconds=60)
    foreign_country: ForeignCountry = ForeignCountry()
    night_quantity: NightQuantity = NightQuantity()
    night_amount: NightAmount = NightAmount()
    repeat_purchase: RepeatPurchase = RepeatPurchase()
    sequential_users: SequentialUsers = SequentialUsers()
    coordinated_users: CoordinatedUsers = CoordinatedUsers()

    @property
    def widest_window(self) -> timedelta:
        """The longest interval any pattern can span: how long an order can matter to later ones."""
        return max(self.repeat_purchase.within, self.sequential_users.within, self.coordinated_users.within)

    @property
    def in_shadow(self) -> frozenset[str]:
        """The names of the rules whose findings are shadow reasons."""
        return frozenset(name for name in RULE_NAMES if getattr(self, name).mode == "shadow")


# What a verdict's reasons can be: the rules' own names.
RULE_NAMES = tuple(sorted(name for name, field in FraudRules.model_fields.items() if isinstance(field.default, Rule)))


def load_rules(path: Path) -> FraudRules:
    """Read and validate a rules file.

    Raises:
        RulesError: the file cannot be read, is not TOML, or breaks the schema; names every offending key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RulesError(f"Cannot read the fraud rules {path}: {error}. FINPRO_RULES names the file.") from error
    try:
        return FraudRules.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise RulesError(f"The fraud rules {path} are not valid TOML: {error}.") from error
    except ValidationError as error:
        problems = "\n".join(f"  {'.'.join(map(str, e['loc']))}: {_explain(e)}" for e in error.errors())
        message = f"The fraud rules {path} are not usable:\n{problems}\nconf/fraud_rules.toml shows every key."
        raise RulesError(message) from error


def _explain(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "unknown key; remove it or correct its spelling"
    if error["type"] == "missing":
        return "missing"
    message = error["msg"].removeprefix("Value error, ")
    return f"{message} (found {error['input']!r})"
