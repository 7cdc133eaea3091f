"""docker-compose.yml as its engine would read it, for a machine that has none: merged, and with its variables filled in."""

import re
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from conf.settings import project_root

FILE = Path(project_root(), "docker-compose.yml")
VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?:(?P<kind>:?[-?])(?P<rest>[^}]*))?\}")


class MissingVariable(Exception):
    """The file asks for a variable that has no value."""


def compose(environment: dict[str, str]) -> dict[str, Any]:
    """The whole file, with the variables of `environment`.

    Raises:
        MissingVariable: one that it cannot do without is not in there.
    """

    def value(match: re.Match[str]) -> str:
        name, kind, rest = match["name"], match["kind"] or ":-", match["rest"] or ""
        found = environment.get(name)
        if found or (found is not None and not kind.startswith(":")):
            return found
        if kind.endswith("?"):
            raise MissingVariable(name)
        return rest

    def filled(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: filled(inner) for key, inner in part.items()}
        if isinstance(part, list):
            return [filled(inner) for inner in part]
        return VARIABLE.sub(value, part) if isinstance(part, str) else part

    whole: dict[str, Any] = filled(yaml.safe_load(FILE.read_text(encoding="utf-8")))
    return whole


def secrets() -> dict[str, str]:
    """A value for each variable that the file insists on."""
    text = FILE.read_text(encoding="utf-8")
    return {match["name"]: "a" * 48 for match in VARIABLE.finditer(text) if (match["kind"] or "").endswith("?")}


def services() -> dict[str, dict[str, Any]]:
    """Its services, by name."""
    found: dict[str, dict[str, Any]] = compose(secrets())["services"]
    return found
