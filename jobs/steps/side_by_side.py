"""Steps that run side by side: each in a thread of its own, as soon as those that it waits for are done."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from queue import SimpleQueue

from jobs.steps.board import Board, Voice

_GRACE_SECONDS = 5


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: a word for it.
        title: what it does, for who watches.
        work: does it, and tells about it.
        after: what must be done before: names of steps, or of what steps reach on their way.
        reaches: what it tells that it has reached, on its way.
    """

    name: str
    title: str
    work: Callable[[Voice], None]
    after: Sequence[str] = ()
    reaches: Sequence[str] = ()


def run(steps: Sequence[Step], board: Board, give_up: Callable[[], None]) -> None:
    """Run all steps, and show them.

    The first error of a step, or an interruption, ends all: it is raised once the others have ended, or after a while.

    Args:
        steps: in the order in which they begin where nothing else decides.
        board: shows them.
        give_up: called when it ends early: has the steps that are at work end soon.
    """
    milestones = [name for step in steps for name in step.reaches]
    by_name = {step.name: step for step in steps}
    if unknown := {name for step in steps for name in step.after} - {*by_name, *milestones}:
        raise ValueError(f"no step reaches {', '.join(sorted(unknown))}")
    order = TopologicalSorter({step.name: step.after for step in steps})
    order.prepare()
    ended = SimpleQueue[tuple[str, BaseException | None]]()
    threads: list[threading.Thread] = []
    try:
        while order.is_active():
            threads += [_begun(by_name[name], board, ended) for name in order.get_ready() if name in by_name]
            name, error = ended.get()
            if error:
                raise error
            order.done(name)
    except BaseException:
        board.over()
        give_up()
        until = time.monotonic() + _GRACE_SECONDS
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        raise


def _begun(step: Step, board: Board, ended: "SimpleQueue[tuple[str, BaseException | None]]") -> threading.Thread:
    """A thread in which the step is at work; what it reaches, and its end, are put into the queue."""
    voice = board.begin(step.name, step.title, lambda name: ended.put((name, None)))

    def work() -> None:
        error: BaseException | None = None
        try:
            step.work(voice)
        except BaseException as raised:
            error = raised
        board.end(voice, failed=error is not None)
        ended.put((step.name, error))

    thread = threading.Thread(target=work, name=step.name, daemon=True)
    thread.start()
    return thread
