"""Background processes that outlive the command which starts them: found again, never confused with another, stopped."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from conf.errors import PlatformError
from jobs.local.private_files import private_directory, write_private

_KEPT_FOR_CHILDREN = ("PATH", "LANG", "LC_ALL", "HOME", "TMPDIR", "LD_LIBRARY_PATH")
_SAME_START_SECONDS = 1.0
_TAIL_LINES = 15


@dataclass(frozen=True)
class Daemon:
    """One background process: its record in `run/`, its log in `logs/`, both under the platform's `home`."""

    name: str
    home: Path

    @property
    def log(self) -> Path:
        """Where its standard output and error go."""
        return self.home / "logs" / f"{self.name}.log"

    @property
    def _record(self) -> Path:
        return self.home / "run" / f"{self.name}.json"

    def process(self) -> psutil.Process | None:
        """The running process, or None."""
        try:
            return recorded_process(json.loads(self._record.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError):
            return None

    def start(self, command: list[str], *, environment: Mapping[str, str] | None = None, cwd: Path | None = None) -> None:
        """Start it in a session of its own, so that it outlives this command, with nothing of finpro's in its environment.

        Args:
            command: the program and its arguments.
            environment: variables to add to what every background process gets.
            cwd: its working directory; by default the platform's home.

        Raises:
            PlatformError: the program cannot be run.
        """
        private_directory(self.log.parent)
        private_directory(self._record.parent)
        if self.log.exists():
            self.log.replace(self.log.with_suffix(".log.1"))
        with os.fdopen(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
            try:
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=cwd or self.home,
                    env=child_environment() | dict(environment or {}),
                    start_new_session=True,
                    umask=0o077,
                )
            except OSError as error:
                raise PlatformError(f"{self.name} cannot be started: {command[0]}: {error.strerror}") from error
        write_private(self._record, json.dumps(record_of(child.pid)))
        child.returncode = 0  # meant to go on: without this, Python would warn of a child that nobody waited for

    def listens_on(self, port: int) -> bool:
        """Whether it accepts connections on this port: it, and no other program."""
        process = self.process()
        return process is not None and listens(process, port)

    def wait_until(self, answers: Callable[[], bool], *, seconds: float) -> None:
        """Wait until `answers()`.

        Raises:
            PlatformError: it ended, or does not answer within `seconds`; names the log and shows its end.
        """
        deadline = time.monotonic() + seconds
        while not answers():
            if self.process() is None:
                raise PlatformError(self.explain(f"{self.name} ended while it was starting"))
            if time.monotonic() > deadline:
                raise PlatformError(
                    self.explain(f"{self.name} does not answer after {seconds:.0f} s: stop it with `finpro down`")
                )
            time.sleep(0.1)

    def stop(self, *, first: signal.Signals, patience_seconds: float) -> bool:
        """End it and its children: signal `first`, then SIGKILL. True when there was something to end."""
        process = self.process()
        if process is not None:
            family = [process, *_children(process)]
            _signal([process], first)
            _signal(_wait_until_gone(family, patience_seconds), signal.SIGKILL)
            _wait_until_gone(family, patience_seconds)
        self._record.unlink(missing_ok=True)
        return process is not None

    def explain(self, problem: str) -> str:
        """`problem`, where the log is, and its last lines."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.exists() else []
        tail = "\n".join(f"  {line}" for line in lines[-_TAIL_LINES:]) or "  (it is empty)"
        return f"{problem}.\nIts log {self.log} ends with:\n{tail}"


def record_of(pid: int) -> dict[str, Any]:
    """What a record says of a process, for `recorded_process` to find it again."""
    return {"pid": pid, "create_time": psutil.Process(pid).create_time()}


def recorded_process(record: Any) -> psutil.Process | None:
    """The process that a record speaks of, if it still runs.

    A record may be older than the machine's last boot, and its pid may be somebody else's by now: the time the process was
    created decides.
    """
    try:
        process = psutil.Process(record["pid"])
        is_same = abs(process.create_time() - record["create_time"]) <= _SAME_START_SECONDS
    except (KeyError, TypeError, ValueError, psutil.NoSuchProcess):
        return None
    return process if is_same and _lives(process) else None


def listens(process: psutil.Process, port: int) -> bool:
    """Whether this process, and no other, accepts connections on this port."""
    try:
        sockets = process.net_connections(kind="tcp")
    except psutil.NoSuchProcess:
        return False
    return any(one.status == psutil.CONN_LISTEN and one.laddr.port == port for one in sockets)


def run_once(command: list[str], *, cwd: Path, failure: str, environment: Mapping[str, str] | None = None) -> None:
    """Run a program to its end, with the same environment as a background one, and these variables.

    Raises:
        PlatformError: it failed: `failure`, and all it said.
    """
    variables = child_environment() | dict(environment or {})
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=cwd, umask=0o077)
    if done.returncode != 0:
        raise PlatformError(f"{failure}:\n{(done.stdout + done.stderr).strip()}")


def child_environment() -> dict[str, str]:
    """What a background process gets of this process's environment: no passwords, no settings."""
    kept = {name: os.environ[name] for name in _KEPT_FOR_CHILDREN if name in os.environ}
    return kept | {"TZ": "UTC"}


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _signal(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _lives(process: psutil.Process) -> bool:
    """Whether it still does anything: a container's first process often leaves the dead unburied, as zombies."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _wait_until_gone(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Wait until none of them lives; returns those that still do after `seconds`."""
    deadline = time.monotonic() + seconds
    while (alive := [process for process in processes if _lives(process)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    psutil.wait_procs(processes, timeout=0)  # buries those that this very process started
    return alive
