"""What `make` has set up."""

import os
import shutil
import subprocess
import sys
from importlib.util import cache_from_source, find_spec
from pathlib import Path

import pytest

from conf.settings import project_root


@pytest.mark.parametrize(
    "name", ["pyspark.worker", "pandas", "polars", "great_expectations", "airflow", "streaming.screening.pipeline"]
)
def test_modules_are_compiled_before_their_first_import(name: str) -> None:
    spec = find_spec(name)

    assert spec is not None
    assert spec.origin is not None
    assert Path(cache_from_source(spec.origin)).is_file(), "make setup has not compiled it"


def test_a_machine_that_packages_have_no_builds_for_is_told_what_would_do(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "conf/requirements/setup.txt", "conf/requirements/dev.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(project_root() / name, tmp_path / name)
    shutil.copy(project_root() / "conf/requirements/bigquery_emulator.txt", tmp_path / "conf/requirements")
    uname = tmp_path / "bin" / "uname"
    uname.parent.mkdir()
    uname.write_text("#!/bin/sh\ncase $1 in -s) echo Darwin ;; *) echo x86_64 ;; esac\n")
    uname.chmod(0o755)
    made = subprocess.run(
        ["make", "setup", f"PYTHON={sys.executable}"],
        cwd=tmp_path,
        env={"PATH": os.pathsep.join([str(uname.parent), os.environ["PATH"]])},
        capture_output=True,
        text=True,
    )

    assert made.returncode != 0
    assert "this is Darwin on x86_64: run it in containers, docs/containers.md" in made.stderr
    assert not (tmp_path / ".venv").exists()
