"""A second process for commands of finpro's that need no Spark: it has imported what they need before they are called for.

In the first one their threads, and those that drive Spark, would take turns on one core.
"""

import json
import logging
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.metadata import entry_points
from typing import IO, cast

from conf.errors import FinproError

_ENDED = "\0"  # how the line begins that says with which exit code a command has ended


class SecondProcess:
    """Runs commands, one after the other. It ends when this process ends, however that does."""

    def __init__(self, modules: Sequence[str]) -> None:
        """`modules` are what it is to import."""
        self._modules = modules
        self._process: subprocess.Popen[str] | None = None

    def start(self, say: Callable[[str], None]) -> None:
        """Start it, and wait until all is imported; `say` hears what stands against that.

        Raises:
            FinproError: it has ended.
        """
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-m", __name__, *self._modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C is for this process, which then ends that one
        )
        self._listen(say)

    def run(self, arguments: Sequence[str], environment: Mapping[str, str], say: Callable[[str], None]) -> None:
        """Run `finpro` with these arguments and variables; `say` hears each line of its output.

        Raises:
            FinproError: it failed, and has said why; or the process has ended.
        """
        with suppress(BrokenPipeError):  # then it has ended, which shows when it is listened to
            print(json.dumps([arguments, dict(environment)]), file=self._pipe("stdin"), flush=True)
        if code := self._listen(say):
            raise FinproError(f"`finpro {' '.join(arguments)}` ended with exit code {code}.")

    def dismiss(self) -> None:
        """There are no more commands: it may end, which takes a second."""
        self._pipe("stdin").close()

    def end(self) -> None:
        """End it, whatever it does; nothing when it was not started."""
        if self._process:
            self._process.kill()
            self._process.wait()

    def _listen(self, say: Callable[[str], None]) -> int:
        """Hand on its output until a command has ended: the exit code."""
        for line in self._pipe("stdout"):
            if line.startswith(_ENDED):
                return int(line.removeprefix(_ENDED))
            say(line.removesuffix("\n"))
        raise FinproError("The process for commands that need no Spark has ended by itself.")

    def _pipe(self, name: str) -> IO[str]:
        return cast("IO[str]", getattr(self._process, name))


def _serve(modules: Sequence[str]) -> None:
    """What that process does: import, say so, then run a command a line until there are no more."""
    for module in modules:
        import_module(module)
    logging.getLogger().handlers.clear()  # dbt brings one library that has all others log to the terminal
    print(f"{_ENDED}0")
    for line in sys.stdin:
        arguments, environment = json.loads(line)
        os.environ.update(environment)
        print(f"{_ENDED}{_exit_code(arguments)}")


def _exit_code(arguments: Sequence[str]) -> int:
    """Run the command as it is installed."""
    (command,) = entry_points(group="console_scripts", name="finpro")
    sys.argv = ["finpro", *arguments]
    try:
        command.load()()
    except SystemExit as end:
        return int(end.code or 0)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    _serve(sys.argv[1:])
