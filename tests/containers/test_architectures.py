"""What the images and the embedded platform are made of has, in the locked versions, a build for each kind of machine."""

import subprocess
import sys
from pathlib import Path

import pytest

from conf.settings import CONF_DIR

UV = Path(sys.executable).parent / "uv"


@pytest.mark.parametrize(
    ("locked", "machine"),
    [
        ("local", "aarch64-unknown-linux-gnu"),
        ("airflow", "aarch64-unknown-linux-gnu"),
        ("bigquery_emulator", "aarch64-unknown-linux-gnu"),
        ("dev", "aarch64-unknown-linux-gnu"),
        ("dev", "aarch64-apple-darwin"),
        ("bigquery_emulator", "aarch64-apple-darwin"),
    ],
)
def test_every_locked_package_has_a_build(locked: str, machine: str, tmp_path: Path) -> None:
    install = [str(UV), "pip", "install", "--dry-run", "--python", sys.executable, "--target", str(tmp_path), "--no-deps"]
    only_builds = [
        "--only-binary",
        ":all:",
        "--no-binary",
        "pyspark",
        "--python-platform",
        machine,
    ]  # it has no code of a machine
    requirements = ["--require-hashes", "--requirement", str(CONF_DIR / "requirements" / f"{locked}.txt")]
    done = subprocess.run([*install, *only_builds, *requirements], capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stderr
