"""Which rules were in force when: a small file for each change, `<lakehouse>/rules/<since>.json`.

A verdict given at `screened_at` was given by the newest rules whose `since` is not after it, on a replay too: so the audit
can give it again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from py4j.protocol import Py4JError
from pydantic import TypeAdapter, ValidationError
from pyspark.sql import SparkSession

from conf.errors import LakehouseError, RulesError
from conf.rules import FraudRules

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
    before = rules_in_force(spark, lakehouse)
    after = with_rules(before, rules, since)
    for entry in after[len(before) :]:
        _create(spark, f"{_folder(lakehouse)}/{entry.since.strftime(_NAME)}", _one.dump_json(entry, indent=2))
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
    return sorted((_parsed(name, text) for name, text in _files(spark, _folder(lakehouse))), key=_since)


def _folder(lakehouse: str) -> str:
    return f"{lakehouse.rstrip('/')}/rules"


def _parsed(name: str, text: str) -> RulesInForce:
    try:
        return _one.validate_json(text)
    except ValidationError as error:
        raise RulesError(f"{name} does not hold rules that were once in force: restore it from a copy.\n{error}") from error


def _files(spark: SparkSession, folder: str) -> list[tuple[str, str]]:
    """Name and text of each file of a change."""
    jvm, path = _jvm(spark), _path(spark, folder)
    try:
        file_system = path.getFileSystem(spark._jsc.hadoopConfiguration())
        if not file_system.exists(path):
            return []
        found = [status.getPath() for status in file_system.listStatus(path)]
        changes = [file for file in found if file.getName().endswith(".json") and not file.getName().startswith(".")]
        return [(file.toString(), _read(jvm, file_system, file)) for file in changes]
    except Py4JError as error:
        raise _unusable(folder, "read", error) from error


def _read(jvm: Any, file_system: Any, file: Any) -> str:
    stream = file_system.open(file)
    try:
        return str(jvm.org.apache.commons.io.IOUtils.toString(stream, "UTF-8"))
    finally:
        stream.close()


def _create(spark: SparkSession, name: str, contents: bytes) -> None:
    """Write a file under another name and rename it: it is there whole, or not at all."""
    target = _path(spark, name)
    unfinished = _path(spark, f"{name}.unfinished")
    try:
        file_system = target.getFileSystem(spark._jsc.hadoopConfiguration())
        stream = file_system.create(unfinished, True)
        try:
            stream.write(bytearray(contents))
        finally:
            stream.close()
        renamed = file_system.rename(unfinished, target)
    except Py4JError as error:
        raise _unusable(name, "written", error) from error
    if not renamed:
        raise LakehouseError(f"{name} cannot be written: is FINPRO_LAKEHOUSE right, and is this user allowed there?")


def _jvm(spark: SparkSession) -> Any:
    return spark._jvm


def _path(spark: SparkSession, name: str) -> Any:
    return _jvm(spark).org.apache.hadoop.fs.Path(name)


def _unusable(name: str, verb: str, error: Py4JError) -> LakehouseError:
    java = getattr(error, "java_exception", None)
    why = java.toString() if java else error
    return LakehouseError(f"{name} cannot be {verb}: is FINPRO_LAKEHOUSE right, and is this user allowed there?\n({why})")
