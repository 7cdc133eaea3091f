"""What a test session starts ends with it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.runs.homes import processes_of

SESSION = """
import subprocess, sys
from pathlib import Path
from tests.runs.homes import guarded
home, elsewhere = map(Path, sys.argv[1:])
with guarded(home, elsewhere):
    for options in ({"cwd": home}, {"cwd": elsewhere}, {"cwd": "/", "env": {"FINPRO_HOME": str(home)}}):
        subprocess.Popen(["sleep", "600"], start_new_session=True, **options)
    print("begun", flush=True)
    sys.stdin.read()
"""


def all_begun(session: "subprocess.Popen[str]", *homes: Path) -> list[psutil.Process]:
    """The session's processes. What has just been started can be without an environment for a moment."""
    deadline = time.monotonic() + 10
    while True:
        begun = processes_of(homes, but=[session.pid])
        if [one.name() for one in begun].count("sleep") == 3:
            return begun
        assert time.monotonic() < deadline, begun


@pytest.mark.parametrize("end", ["killed", "ended"])
def test_nothing_runs_on_in_the_home_of_a_session_that_is_gone(tmp_path: Path, end: str) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    command = [sys.executable, "-c", SESSION, str(home), str(elsewhere)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True) as session:
        assert session.stdout is not None
        assert session.stdin is not None
        assert session.stdout.readline() == "begun\n"
        begun = all_begun(session, home, elsewhere)
        if end == "killed":
            os.killpg(session.pid, signal.SIGKILL)
        else:
            session.stdin.close()
        _, left = psutil.wait_procs(begun, timeout=20)
    assert left == []
    assert not home.exists()
    assert elsewhere.exists()
