"""Which rules were in force when: a small file for each change, `<lakehouse>/rules/<since>.json`.

A verdict given at `screened_at` was given by the newest rules whose `since` is not after it, on a replay too: so the audit
can give it again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from pyarrow import fs
from pydantic import TypeAdapter, ValidationError
from pyspark.sql import SparkSession

from batch.file_systems import file_system
from conf.errors import LakehouseError, RulesError
from conf.rules import FraudRules
from conf.settings import Settings
from streaming.small_files import Folder

_NAME = "%Y%m%dT%H%M%S.%fZ.json"  # sorts by time


@dataclass(frozen=True)
class RulesInForce:
    """Rules, and since when they are in force."""

    since: datetime
    rules: FraudRules


_one = TypeAdapter(RulesInForce)
_many = TypeAdapter(list[RulesInForce])


def encode_rules(history: Sequence[RulesInForce]) -> str:
    """As JSON."""
    return _many.dump_json(list(history)).decode()


def decode_rules(text: str) -> list[RulesInForce]:
    """Back from JSON."""
    return _many.validate_json(text)


def rules_at(history: Sequence[RulesInForce], moment: datetime) -> FraudRules:
    """The rules in force at a moment; before the first change known, the first rules."""
    return max((entry for entry in history if entry.since <= moment), key=_since, default=min(history, key=_since)).rules


def _since(entry: RulesInForce) -> datetime:
    return entry.since


def record(spark: SparkSession, lakehouse: str, rules: FraudRules, since: datetime) -> list[RulesInForce]:
    """Note that these rules are in force from now on; returns the whole history. Nothing happens where they are already.

    Args:
        spark: whose file systems reach the lakehouse.
        lakehouse: a path, or gs://bucket/folder.
        rules: what is taken up.
        since: the present time, in UTC.

    Raises:
        RulesError: the version was used before for other rules.
        LakehouseError: the lakehouse cannot be read or written.
    """
    folder = _folder(spark, lakehouse)
    before = _recorded(folder)
    after = with_rules(before, rules, since)
    for entry in after[len(before) :]:
        folder.write(entry.since.strftime(_NAME), _one.dump_json(entry, indent=2).decode())
    return after


def with_rules(history: list[RulesInForce], rules: FraudRules, since: datetime) -> list[RulesInForce]:
    """The history, the oldest first, once these rules are taken up: the same where they are in force already.

    Raises:
        RulesError: the version was used before for other rules.
    """
    for entry in history:
        if entry.rules.version == rules.version and entry.rules != rules:
            raise RulesError(
                f"Rules version {rules.version} was used before with other contents, since {entry.since:%Y-%m-%d %H:%M} UTC:"
                " give the changed rules a new version."
            )
    if not history:
        return [RulesInForce(since, rules)]
    newest = history[-1]
    if newest.rules == rules:
        return history
    # A clock that was set back must not change the order.
    return [*history, RulesInForce(max(since, newest.since + timedelta(microseconds=1)), rules)]


def rules_in_force(spark: SparkSession, lakehouse: str) -> list[RulesInForce]:
    """Every change recorded, the oldest first; empty where there is none.

    Raises:
        RulesError: what was recorded cannot be read as rules.
        LakehouseError: the lakehouse cannot be read.
    """
    return _recorded(_folder(spark, lakehouse))


def recorded_without_spark(settings: Settings) -> list[RulesInForce]:
    """`rules_in_force`, for a command that shall not wait for a Spark to start.

    Raises:
        SettingsError: of this kind of lakehouse only Spark knows how to read.
        RulesError: what was recorded cannot be read as rules.
        LakehouseError: the lakehouse cannot be read.
    """
    system, path = file_system(f"{settings.lakehouse.rstrip('/')}/rules", settings)
    try:
        found = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
        files = [file for file in found if file.is_file and _is_record(file.base_name)]
        texts = {file.path: system.open_input_file(file.path).readall().decode() for file in files}
    except (OSError, UnicodeDecodeError) as error:
        raise LakehouseError(f"{settings.lakehouse}/rules cannot be read: {error}. Is FINPRO_LAKEHOUSE right?") from error
    return sorted((_parsed(name, text) for name, text in texts.items()), key=_since)


def _folder(spark: SparkSession, lakehouse: str) -> Folder:
    return Folder(spark, f"{lakehouse.rstrip('/')}/rules", "FINPRO_LAKEHOUSE")


def _recorded(folder: Folder) -> list[RulesInForce]:
    names = filter(_is_record, folder.names())
    return sorted((_parsed(f"{folder.path}/{name}", folder.read(name)) for name in names), key=_since)


def _is_record(name: str) -> bool:
    return name.endswith(".json") and not name.startswith(".")


def _parsed(name: str, text: str) -> RulesInForce:
    try:
        return _one.validate_json(text)
    except ValidationError as error:
        raise RulesError(f"{name} does not hold rules that were once in force: restore it from a copy.\n{error}") from error
