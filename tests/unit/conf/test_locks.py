"""The lock files fit what pyproject.toml asks for: `make lock` was not forgotten."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from conf.settings import CONF_DIR, project_root

PROJECT = tomllib.loads(Path(project_root(), "pyproject.toml").read_text(encoding="utf-8"))
RUNTIME = PROJECT["project"]["dependencies"]
GROUPS = PROJECT["dependency-groups"]
EXTRAS = PROJECT["project"]["optional-dependencies"]
DEVELOPMENT = [*RUNTIME, *EXTRAS["local"], *GROUPS["dev"], *GROUPS["setup"]]
LOCKS = [
    ("base", RUNTIME),
    ("dev", DEVELOPMENT),
    ("test", [*DEVELOPMENT, *EXTRAS["airflow"]]),
    ("local", [*RUNTIME, *EXTRAS["local"]]),
    ("airflow", [*RUNTIME, *EXTRAS["airflow"]]),
    ("setup", GROUPS["setup"]),
    ("bigquery_emulator", GROUPS["bigquery_emulator"]),
]


@pytest.mark.parametrize(("name", "wanted"), LOCKS)
def test_each_lock_pins_a_version_that_pyproject_allows(name: str, wanted: list[str]) -> None:
    locked = re.findall(r"^([\w.-]+)==([^\s;]+)", (CONF_DIR / "requirements" / f"{name}.txt").read_text(), re.MULTILINE)
    versions: dict[str, list[str]] = {}
    for package, version in locked:
        versions.setdefault(canonicalize_name(package), []).append(version)

    for requirement in map(Requirement, wanted):
        pinned = versions.get(canonicalize_name(requirement.name), [])
        assert pinned, f"{requirement.name} is not in {name}.txt"
        assert all(requirement.specifier.contains(version) for version in pinned), f"{requirement} but {pinned} in {name}.txt"
