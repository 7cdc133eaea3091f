"""A rules file as it stands, with what it needs beside it: what is proposed, compared by its fingerprint, and put in force."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from conf.errors import RulesError
from conf.lists import as_csv, unpacked
from conf.rules import FraudRules, list_files, load_rules


@dataclass(frozen=True)
class Content:
    """The text of a rules file, and by name the texts of the files that it names and that lie beside it."""

    text: str
    beside: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Content":
        """That of a file.

        Raises:
            RulesError: it, or a file that it names, cannot be read.
        """
        text = _read(path)
        return cls(text, {name: _read(path.parent / name) for name in _named(path, text)})

    @property
    def fingerprint(self) -> str:
        """The same for the same bytes, and for no others: SHA-256, in hexadecimal digits."""
        return sha256(self.as_json().encode()).hexdigest()

    @property
    def rules(self) -> FraudRules:
        """What it says.

        Raises:
            RulesError: it cannot be used.
        """
        with TemporaryDirectory() as folder:
            return load_rules(self.write(Path(folder) / "rules.toml"))

    def write(self, path: Path) -> Path:
        """Put it there, each file at once, the rules file last: who reads that one finds what it needs. Returns its place.

        Where `path` is a link, the file that it leads to is replaced. Who may read a file stays as it was.

        Raises:
            RulesError: it cannot be written there; the rules file is as it was.
        """
        place = path.resolve()
        texts = {path.parent / name: text for name, text in self.beside.items()} | {place: self.text}
        unfinished = {target: target.with_name(f".{target.name}.{os.getpid()}") for target in texts}
        try:
            for target, text in texts.items():
                target.parent.mkdir(parents=True, exist_ok=True)
                _write_through(unfinished[target], text)
                if target.exists():
                    shutil.copymode(target, unfinished[target])
            for target in texts:
                unfinished[target].replace(target)
        except OSError as error:
            for left in unfinished.values():
                with suppress(OSError):
                    left.unlink()
            raise RulesError(f"{place} cannot be written: {error}. FINPRO_RULES names the file in force.") from error
        return place

    def as_json(self) -> str:
        """As JSON, always the same for the same content."""
        return json.dumps({"beside": dict(self.beside), "text": self.text}, sort_keys=True)


def content_of(stored: Mapping[str, Any]) -> Content:
    """Back from what `as_json` gives, decoded."""
    return Content(stored["text"], stored["beside"])


def rewritten(rules: FraudRules) -> Content:
    """Rules as files that say the same, without comments and examples: for those whose files nobody has kept.

    Raises:
        RulesError: the file of a list does not lie beside the rules.
    """
    for entry in rules.lists.values():
        _require_beside("these rules", entry.file)
    return Content(_as_toml(rules), {entry.file: as_csv(unpacked(entry.content)) for entry in rules.lists.values()})


def _as_toml(rules: FraudRules) -> str:
    said = rules.model_dump(mode="json", exclude_defaults=True)
    for entry in said.get("lists", {}).values():
        entry.pop("content", None)
    return "\n".join(["# Written by finpro from the record of rules: comments and examples are not in it.", *_tables(said), ""])


def _tables(said: Mapping[str, Any]) -> Iterator[str]:
    """The lines of a TOML document: what stands by itself, then the tables, one for each entry of `rules` and its like."""
    yield from (f"{name} = {_value(value)}" for name, value in said.items() if not isinstance(value, dict))
    for table, entries in said.items():
        if not isinstance(entries, dict):
            continue
        if any(not isinstance(entry, dict) for entry in entries.values()):
            entries, place = {table: entries}, ""
        else:
            place = f"{table}."
        for name, entry in entries.items():
            yield f"\n[{place}{name}]"
            yield from (f"{key} = {_value(value)}" for key, value in entry.items())


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {_value(inner)}' for key, inner in value.items())} }}"
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RulesError(f"Cannot read {path}: {error}.") from error


def _named(path: Path, text: str) -> list[str]:
    """The files of its lists, all of which lie beside it."""
    names = list_files(text)
    for name in names:
        _require_beside(str(path), name)
    return names


def _require_beside(rules: str, name: str) -> None:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise RulesError(f"{rules}: {name} does not lie beside the rules: name lists by a path below the folder of the file.")


def _write_through(path: Path, text: str) -> None:
    """Write a file so that it is on the disk before it gets its name: after a crash a renamed one may be empty otherwise."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
