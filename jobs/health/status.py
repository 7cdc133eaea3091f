"""`finpro status`: the health of the whole platform, one line a part, all asked side by side and for a limited time."""

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

from conf.errors import FinproError, SettingsError
from conf.settings import Settings
from jobs.health.checks import CHECKS, REQUIRED, import_what_checks_need
from jobs.health.findings import Check, Finding, State

if TYPE_CHECKING:
    from rich.console import RenderableType  # by who shows something

_STYLES = {State.OK: "green", State.OFF: "dim", State.WARN: "yellow", State.DOWN: "bold red"}


class Health(NamedTuple):
    """One part of the platform: how it fares, how long the answer took, and of a part that has runs when the last one ended."""

    part: str
    state: State
    text: str
    seconds: float
    at: datetime | None = None


def health(settings: Settings, *, timeout_seconds: float, checks: Mapping[str, Check] = CHECKS) -> list[Health]:
    """Ask every part, side by side; one that has not answered in time is down."""
    import_what_checks_need(settings)
    return list(_ask(checks, settings, timeout_seconds))


def is_down(parts: list[Health]) -> bool:
    """Whether anything needs a person."""
    return any(part.state is State.DOWN for part in parts)


def as_json(parts: list[Health]) -> str:
    """One object: `healthy`, and `parts` with `part`, `state`, `text`, `seconds` and `at` each."""
    rows = [
        part._asdict()
        | {"state": part.state.value, "seconds": round(part.seconds, 3), "at": part.at.isoformat() if part.at else None}
        for part in parts
    ]
    return json.dumps({"healthy": not is_down(parts), "parts": rows}, ensure_ascii=False)


def as_table(parts: list[Health]) -> "RenderableType":
    """For a terminal: a line a part."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    for part in parts:
        style = _STYLES[part.state]
        table.add_row(Text(part.state.value, style), part.part, Text(part.text, style if part.state is State.DOWN else ""))
    return Group(table, Text(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC", "dim"))


def watch(settings: Settings, *, timeout_seconds: float, every_seconds: float) -> list[Health]:
    """Show the platform's health until Ctrl-C; returns what was seen last."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    parts: list[Health] = []
    console = Console(highlight=False)
    with suppress(KeyboardInterrupt), Live(Text("asking …"), console=console, screen=True, auto_refresh=False) as live:
        while True:
            parts = health(settings, timeout_seconds=timeout_seconds)
            live.update(as_table(parts), refresh=True)
            time.sleep(every_seconds)
    return parts


def _ask(checks: Mapping[str, Check], settings: Settings, timeout_seconds: float) -> Iterator[Health]:
    """Run the checks in threads of their own, which nobody waits for beyond the time limit."""
    answers: dict[str, SimpleQueue[Health]] = {}
    for part, check in checks.items():
        answers[part] = SimpleQueue()
        threading.Thread(target=_answer, args=(part, check, settings, answers[part]), name=part, daemon=True).start()
    deadline = time.monotonic() + timeout_seconds
    for part, answer in answers.items():
        try:
            yield answer.get(timeout=max(deadline - time.monotonic(), 0.001))
        except Empty:
            yield Health(part, State.DOWN, f"no answer within {timeout_seconds:g} s", timeout_seconds)


def _answer(part: str, check: Check, settings: Settings, answer: SimpleQueue[Health]) -> None:
    started = time.monotonic()
    try:
        found = check(settings)
    except SettingsError as error:
        found = Finding(State.DOWN if part in REQUIRED else State.OFF, f"not configured: {_first_line(error)}")
    except FinproError as error:
        found = Finding(State.DOWN, _first_line(error))
    except Exception as error:  # a check that breaks must not hide what the others found
        found = Finding(State.DOWN, f"cannot be checked: {type(error).__name__}: {_first_line(error)}")
    answer.put(Health(part, found.state, found.text, time.monotonic() - started, found.at))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
