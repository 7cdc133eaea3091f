"""A finpro home for a test session, and its end: whatever runs in it ends with the session, also when that is killed.

`python -m tests.runs.homes HOME FOLDER…` is the guard that sees to it: it waits until its standard input is closed.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from conf.settings import project_root


@contextmanager
def guarded(home: Path, *folders: Path) -> Iterator[None]:
    """A block, after whose end, or death, nothing runs any more that has to do with these folders, and the home is gone."""
    guard = subprocess.Popen(
        [sys.executable, "-m", __name__, str(home), *map(str, folders)],
        stdin=subprocess.PIPE,
        cwd=project_root(),
        start_new_session=True,  # what is sent to the session's group is not for it
    )
    assert guard.stdin is not None
    try:
        yield
    finally:
        guard.stdin.close()
        guard.wait()


def processes_of(folders: Sequence[Path], but: Collection[int] = ()) -> list[psutil.Process]:
    """The processes that work in one of these folders, or were told of it in arguments or environment; but not these."""
    return [one for one in psutil.process_iter() if one.pid not in but and _knows(one, folders)]


def _knows(process: psutil.Process, folders: Sequence[Path]) -> bool:
    try:
        told = [process.cwd(), *process.cmdline(), *process.environ().values()]
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return False
    return any(f"{folder}{os.sep}" in f"{text}{os.sep}" for folder in folders for text in told)


def _guard(home: Path, *folders: Path) -> None:
    """Wait for the end of the session that has started this process; then end what runs there, and delete the home."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    ours = {os.getpid(), os.getppid()}
    sys.stdin.buffer.read()
    while left := processes_of([home, *folders], but=ours):
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=5)
    shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    _guard(*map(Path, sys.argv[1:]))
