"""The second process: it runs commands, and ends with the first one, however that ends."""

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
    process.start(print)
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


def test_a_command_may_end_in_a_stack_trace_and_the_next_one_runs(second: SecondProcess, tmp_path: Path) -> None:
    lines: list[str] = []
    with pytest.raises(FinproError, match="ended with exit code 1"):
        second.run(["--debug", "env"], {"FINPRO_HOME": str(tmp_path)}, lines.append)
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith("conf.errors.PlatformError")
    second.run(["env", "--help"], {}, lines.append)


def test_it_is_an_error_when_it_is_killed(second: SecondProcess) -> None:
    assert second._process
    second._process.kill()
    with pytest.raises(FinproError, match="has ended by itself"):
        second.run(["env", "--help"], {}, print)


def test_what_cannot_be_imported_is_said() -> None:
    lines: list[str] = []
    second = SecondProcess(["no_such_module"])
    with pytest.raises(FinproError, match="has ended by itself"):
        second.start(lines.append)
    assert lines[-1] == "ModuleNotFoundError: No module named 'no_such_module'"
    second.end()


def test_it_ends_when_there_are_no_more_commands(second: SecondProcess) -> None:
    second.dismiss()
    assert second._process
    assert second._process.wait(_PATIENCE) == 0


def test_it_ends_with_the_first_process_even_when_that_is_killed() -> None:
    program = """
import time
from jobs.steps.second_process import SecondProcess
second = SecondProcess(["json"])
second.start(print)
print(second._process.pid, flush=True)
time.sleep(60)
"""
    first = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert first.stdout
    second = psutil.Process(int(first.stdout.readline()))
    first.kill()
    first.communicate()
    deadline = time.monotonic() + _PATIENCE
    while second.is_running() and second.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
