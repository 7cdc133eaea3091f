"""The second process: it runs commands, and ends with the first one, however that ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from conf.errors import FinproError
from jobs.steps.second_process import SecondProcess

_PATIENCE = 10


@pytest.fixture
def second() -> Iterator[SecondProcess]:
    """A second process, started."""
    process = SecondProcess(["json"])
    process.start()
    yield process
    process.end()


def test_a_command_says_what_it_says_in_a_terminal(second: SecondProcess) -> None:
    lines: list[str] = []
    second.run(["env", "--help"], {}, lines.append)
    assert any(line.startswith("Usage: finpro env") for line in lines)


def test_a_command_that_fails_says_why_and_is_an_error_and_the_next_one_runs(second: SecondProcess, tmp_path: Path) -> None:
    lines: list[str] = []
    with pytest.raises(FinproError, match="`finpro env` ended with exit code 5"):
        second.run(["env"], {"FINPRO_HOME": str(tmp_path)}, lines.append)
    assert lines[0].startswith("finpro: The embedded platform is not up")
    second.run(["env", "--help"], {}, lines.append)


def test_it_is_an_error_when_it_is_killed() -> None:
    second = SecondProcess(["json"])
    second.start()
    psutil.Process(second._process.pid).kill()
    with pytest.raises(FinproError, match="has ended by itself"):
        second.run(["env", "--help"], {}, lambda line: None)
    second.end()


def test_it_ends_with_the_first_process_even_when_that_is_killed() -> None:
    program = """
import time
from jobs.steps.second_process import SecondProcess
if __name__ == "__main__":
    second = SecondProcess(["json"])
    second.start()
    print(second._process.pid, flush=True)
    time.sleep(60)
"""
    first = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert first.stdout
    second = psutil.Process(int(first.stdout.readline()))
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    first.stdout.close()
    deadline = time.monotonic() + _PATIENCE
    while second.is_running() and second.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
