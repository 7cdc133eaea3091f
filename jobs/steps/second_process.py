"""A second process for commands of finpro's that need no Spark: it has imported what they need before they are called for.

In the first one their threads and those that drive Spark would take turns on one core.
"""

import io
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from importlib.metadata import entry_points
from multiprocessing import get_context
from multiprocessing.connection import Connection

from conf.errors import FinproError

_GRACE_SECONDS = 5


class SecondProcess:
    """Runs commands, one after the other. It ends with this process, however that ends."""

    def __init__(self, modules: Sequence[str]) -> None:
        """`modules` are what it is to import."""
        context = get_context("spawn")
        self._connection, self._theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._theirs, modules), daemon=True)

    def start(self) -> None:
        """Start it, and wait until all is imported.

        Raises:
            FinproError: it ended.
        """
        self._process.start()
        self._theirs.close()
        with _while_it_lives():
            self._connection.recv()

    def run(self, arguments: Sequence[str], environment: Mapping[str, str], say: Callable[[str], None]) -> None:
        """Run `finpro` with these arguments; `say` hears each line of its output.

        Raises:
            FinproError: it failed, and has said why.
        """
        with _while_it_lives():
            self._connection.send((arguments, dict(environment)))
            while isinstance(answer := self._connection.recv(), str):
                say(answer)
        if answer:
            raise FinproError(f"`finpro {' '.join(arguments)}` ended with exit code {answer}.")

    def dismiss(self) -> None:
        """There are no more commands: it may end, which takes a second."""
        self._connection.close()

    def end(self) -> None:
        """End it, whatever it does; nothing when it was not started."""
        if self._process.pid is not None:
            self._process.terminate()
            self._process.join(_GRACE_SECONDS)
            self._process.kill()
            self._process.join()


@contextmanager
def _while_it_lives() -> Iterator[None]:
    """A block that talks to it.

    Raises:
        FinproError: it is no more.
    """
    try:
        yield
    except (EOFError, OSError) as error:
        raise FinproError("The process for commands that need no Spark has ended by itself.") from error


def _serve(connection: Connection, modules: Sequence[str]) -> None:
    """What the process does: import, say so, then run commands until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both processes, and the first one decides
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    for module in modules:
        import_module(module)
    logging.getLogger().handlers.clear()  # dbt brings one library that has all others log to the terminal
    output = _Lines(connection)
    try:
        connection.send(0)
        while True:
            arguments, environment = connection.recv()
            os.environ.update(environment)
            with redirect_stdout(output), redirect_stderr(output):
                code = _exit_code(arguments)
            connection.send(code)
    except (EOFError, OSError):
        return


class _Lines(io.TextIOBase):
    """A file that sends each line."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._rest, self._lock = connection, "", threading.Lock()

    def write(self, text: str) -> int:
        with self._lock:  # dbt's threads tell what they have built
            *lines, self._rest = (self._rest + text).split("\n")
            for line in lines:
                self._connection.send(line)
        return len(text)


def _exit_code(arguments: Sequence[str]) -> int:
    """Run the command as it is installed."""
    (command,) = entry_points(group="console_scripts", name="finpro")
    sys.argv = ["finpro", *arguments]
    try:
        command.load()()
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
