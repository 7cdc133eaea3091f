"""Running commands of `finpro`: in this process where its answer is the claim, as a process where the process is."""

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest

from jobs import cli
from jobs.spark import driver

FINPRO = str(Path(sys.executable).parent / "finpro")


class Ended(NamedTuple):
    """A command that has ended: its exit code, and what it said."""

    returncode: int
    stdout: str
    stderr: str


def finpro(*arguments: str, **environment: str) -> Ended:
    """Run a command to its end, in this process: from its arguments to its exit code, its Spark job on the tests' own Spark.

    A test of a command that needs Spark asks for `spark_session`.
    """
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr(driver, "become_driver", _no_spark)
        returncode = cli.run(list(arguments))
    return Ended(returncode, out.getvalue(), err.getvalue())


def _no_spark(job: str, **_: object) -> None:
    raise AssertionError(f"{job} needs Spark: the test has to ask for `spark_session`")


def finpro_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, as a process of its own, which starts a Spark of its own where it needs one."""
    return subprocess.run([FINPRO, *arguments], capture_output=True, text=True, timeout=240)
