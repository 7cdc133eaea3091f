"""Steps side by side: what waits for what, how they are shown, and how they end together."""

import io
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence

import pytest
from rich.console import Console

from conf.errors import FinproError
from jobs.steps.board import Board, Voice
from jobs.steps.side_by_side import Step, run

_PATIENCE = 10


def quiet(voice: Voice) -> None:
    """A step that has nothing to do."""


def run_steps(steps: Sequence[Step], give_up: Callable[[], None] = lambda: None) -> str:
    """Run steps; what was shown."""
    shown = io.StringIO()
    with Board(Console(file=shown, width=100), time.monotonic()) as board:
        try:
            run(steps, board, give_up)
            board.print_where_the_time_went()
        except FinproError as error:
            return f"{shown.getvalue()}{error}"
    return shown.getvalue()


def test_a_step_begins_when_all_it_waits_for_is_done() -> None:
    done: list[str] = []

    def work(name: str, seconds: float) -> Callable[[Voice], None]:
        def wait(voice: Voice) -> None:
            time.sleep(seconds)
            done.append(name)

        return wait

    steps = [Step("c", "", work("c", 0), ["a", "b"]), Step("a", "", work("a", 0.2)), Step("b", "", work("b", 0), ["a"])]
    run_steps(steps)
    assert done == ["a", "b", "c"]


def test_steps_that_do_not_wait_for_each_other_run_side_by_side() -> None:
    meeting = threading.Barrier(2, timeout=_PATIENCE)
    run_steps([Step(name, "", lambda voice: void(meeting.wait())) for name in ("a", "b")])


def void(_: object) -> None:
    """For a lambda that has to return nothing."""


def test_a_step_can_wait_for_what_another_reaches_on_its_way() -> None:
    has_seen = threading.Event()

    def platform(voice: Voice) -> None:
        voice.reached("kafka")
        assert has_seen.wait(_PATIENCE)

    run_steps([Step("platform", "", platform, reaches=["kafka"]), Step("produce", "", lambda _: has_seen.set(), ["kafka"])])


def test_what_nobody_reaches_is_refused() -> None:
    with pytest.raises(ValueError, match="no step reaches kafka"):
        run_steps([Step("produce", "", quiet, ["kafka"])])


def test_what_a_step_says_is_shown_in_one_piece_with_its_time_and_at_the_end_where_the_time_went() -> None:
    meeting = threading.Barrier(2, timeout=_PATIENCE)

    def talk(voice: Voice) -> None:
        for number in range(3):
            meeting.wait()
            voice.now(f"on my way to {number}")
            voice.say(f"{voice.name} {number} [of 3]")

    shown = run_steps([Step("left", "the left one", talk), Step("right", "the right one", talk)])
    for name in ("left", "right"):
        assert f"{name}: the {name} one · 0." in shown
        assert f"{name} 0 [of 3]\n{name} 1 [of 3]\n{name} 2 [of 3]\n" in shown
    assert "on my way" not in shown
    assert "Where the time went" in shown
    assert "in all" in shown


def test_the_first_error_ends_all_and_the_others_are_told() -> None:
    is_over = threading.Event()
    ends: list[str] = []

    def work_until_told(voice: Voice) -> None:
        assert is_over.wait(_PATIENCE)
        ends.append(voice.name)

    def fail(voice: Voice) -> None:
        voice.say("so far so good")
        raise FinproError("It broke.")

    steps = [Step("long", "", work_until_told), Step("broken", "breaks", fail), Step("next", "", work_until_told, ["broken"])]
    shown = run_steps(steps, is_over.set)
    assert "broken: breaks · failed after 0." in shown
    assert "so far so good" in shown
    assert shown.endswith("It broke.")
    assert ends == ["long"]


def test_what_fails_because_all_is_over_is_not_shown_as_the_error() -> None:
    is_over = threading.Event()

    def fail_when_told(voice: Voice) -> None:
        is_over.wait(_PATIENCE)
        raise FinproError("It was cut off.")

    def fail(voice: Voice) -> None:
        raise FinproError("It broke.")

    shown = run_steps([Step("long", "", fail_when_told), Step("broken", "", fail)], is_over.set)
    assert shown.count("failed after") == 1
    assert "cut off" not in shown


def test_an_interruption_ends_all() -> None:
    is_over = threading.Event()

    def interrupted(voice: Voice) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        assert is_over.wait(_PATIENCE)

    with pytest.raises(KeyboardInterrupt):
        run_steps([Step("long", "", interrupted)], is_over.set)
    assert is_over.is_set()
