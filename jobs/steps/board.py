"""What one sees of steps that run side by side.

On a terminal a line for each that is at work; what a step had to say in one piece, when it has ended; at last where the time
went.
"""

import io
import threading
import time
from collections.abc import Callable

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

_BAR = 40  # characters


class Voice:
    """How a step tells what it does.

    Attributes:
        console: what is printed here is shown when the step has ended.
        ticker: of what is printed here the newest line is shown while the step is at work, and nothing stays.
        reached: to be called with the name of something that other steps wait for.
    """

    def __init__(self, name: str, title: str, like: Console, reached: Callable[[str], None]) -> None:
        """`like` is the console on which it will be shown."""
        self.name, self.title, self.reached = name, title, reached
        self.began = time.monotonic()
        self.seconds: float | None = None
        self.newest = ""
        self._said = io.StringIO()
        self.console, self.ticker = _console(self._said, like), _console(_Ticker(self), like)

    def say(self, text: str) -> None:
        """Tell a line that stays."""
        self.newest = text
        self.console.print(text, markup=False)

    def now(self, text: str) -> None:
        """Tell a line that is of interest only now."""
        self.newest = text

    @property
    def said(self) -> Text:
        """All that stays."""
        return Text.from_ansi(self._said.getvalue())


class _Ticker(io.StringIO):
    """A file that tells each line it is given as of interest only now."""

    def __init__(self, voice: Voice) -> None:
        super().__init__()
        self._voice = voice

    def write(self, text: str) -> int:
        if text.strip():
            self._voice.now(Text.from_ansi(text.strip()).plain)
        return len(text)


def _console(file: io.StringIO, like: Console) -> Console:
    return Console(file=file, force_terminal=like.is_terminal, width=like.width, highlight=False, soft_wrap=True)


class Board:
    """Shows steps while the block lasts."""

    def __init__(self, console: Console, zero: float) -> None:
        """`zero` is when the command began, as `time.monotonic` counts."""
        self._console, self._zero, self._lock = console, zero, threading.Lock()
        self._voices: list[Voice] = []
        self._is_over = False
        self._spinner = Spinner("dots")
        self._live = Live(console=console, get_renderable=self._at_work, refresh_per_second=5, transient=True)

    def __enter__(self) -> "Board":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def begin(self, name: str, title: str, reached: Callable[[str], None]) -> Voice:
        """A step begins."""
        voice = Voice(name, title, self._console, reached)
        with self._lock:
            self._voices.append(voice)
        return voice

    def end(self, voice: Voice, *, failed: bool = False) -> None:
        """A step has ended: what it said is shown, under a line that says how long it took. After a failure all is over."""
        voice.seconds = time.monotonic() - voice.began
        took = f"[red]failed after {voice.seconds:.1f} s[/]" if failed else f"{voice.seconds:.1f} s"
        with self._lock:
            if self._is_over:
                return
            self._is_over = failed
            self._console.rule(f"{voice.name}: {voice.title} · {took}")
            if voice.said:
                self._console.print(voice.said, end="", soft_wrap=True)

    def over(self) -> None:
        """All is over: how the steps end that are still at work says nothing."""
        with self._lock:
            self._is_over = True

    def print_where_the_time_went(self) -> None:
        """A line a step, in the order in which they began, and how long it took in all."""
        total = time.monotonic() - self._zero
        table = Table(title="Where the time went", show_footer=True)
        table.add_column("step", "in all")
        table.add_column("from", justify="right")
        table.add_column("seconds", f"{total:.1f}", justify="right")
        table.add_column("")
        until = min(voice.began for voice in self._voices) - self._zero
        lines = [(voice.name, voice.began - self._zero, voice.seconds or 0.0) for voice in self._voices]
        for name, began, seconds in [("start", 0.0, until), *lines]:
            begin, end = (round(moment * _BAR / total) for moment in (began, began + seconds))
            table.add_row(name, f"{began:.1f}", f"{seconds:.1f}", " " * begin + "━" * max(end - begin, 1))
        self._console.print(table)

    def _at_work(self) -> Table:
        """A line for each step that has begun and not ended."""
        table = Table.grid(padding=(0, 1))
        table.add_column()
        table.add_column()
        table.add_column(justify="right")
        table.add_column(no_wrap=True, overflow="ellipsis")
        now = time.monotonic()
        for voice in [voice for voice in self._voices if voice.seconds is None]:
            newest = Text(voice.newest.strip().rsplit("\n", 1)[-1] or voice.title, style="dim")
            table.add_row(self._spinner, voice.name, f"{now - voice.began:.0f} s", newest)
        return table
