"""Delivering a notice to Discord: within a bound of time, at the pace Discord asks for, and without the webhook in any log.

`python -m jobs.notify.notifications` delivers the notice on its standard input: what `send_aside` starts.
"""

import json
import logging
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from http import HTTPStatus
from typing import Any

import requests
import tenacity
from discord_webhook import DiscordWebhook

from conf.errors import FinproError, NotificationError
from conf.settings import Settings, finpro_home, load_settings
from jobs.local.ports import bypass_proxies
from jobs.local.private_files import private_directory
from jobs.notify.notices import Notice, command_ended

PATIENCE_SECONDS = 20  # for one notice, with everything, where somebody waits for it
ANSWER_SECONDS = 10  # for one answer of Discord's
_ASIDE_SECONDS = 300
_LONGEST_TITLE, _LONGEST_TEXT = 256, 4096  # characters: Discord refuses a longer message as a whole

_log = logging.getLogger(__name__)


class _NotNow(Exception):
    """Worth another try; `seconds` is the pause that Discord asked for, if it did."""

    def __init__(self, why: str, seconds: float | None = None) -> None:
        super().__init__(why)
        self.seconds = seconds


def payload(notice: Notice) -> dict[str, Any]:
    """A notice as the body of Discord's webhook request: whatever names the text holds, nobody is called by them."""
    embed = {"title": notice.title[:_LONGEST_TITLE], "description": notice.text[:_LONGEST_TEXT], "color": notice.colour}
    return {"embeds": [embed], "allowed_mentions": {"parse": []}}


def send(settings: Settings, notice: Notice, *, patience_seconds: float = PATIENCE_SECONDS) -> None:
    """Send a notice to the webhook of the settings, and wait until it is there.

    Raises:
        SettingsError: the settings have no webhook.
        NotificationError: it did not get through within `patience_seconds`.
    """
    url = settings.require("discord_webhook_url")
    webhook = DiscordWebhook(url, timeout=ANSWER_SECONDS, **payload(notice))
    deliver(webhook.api_post_request, patience_seconds)


def deliver(post: Callable[[], requests.Response], patience_seconds: float = PATIENCE_SECONDS) -> None:
    """Call `post` until Discord has taken the message: after a refusal for now, a breakdown or no connection once more.

    When Discord says how long to wait, that long. An answer that does not come may mean that the message is there: that
    is no reason to send it again.

    Raises:
        NotificationError: it was refused, or not taken within `patience_seconds`; the webhook is not in the message.
    """
    taken: Future[None] = Future()

    def work() -> None:
        try:
            _until_taken(post, patience_seconds)
            taken.set_result(None)
        except Exception as error:  # raised again where somebody waits
            taken.set_exception(error)

    # No time-out of a request bounds an answer that comes byte by byte.
    threading.Thread(target=work, daemon=True).start()
    try:
        taken.result(patience_seconds)
    except TimeoutError:
        raise NotificationError(f"Discord did not take a notification within {patience_seconds:.0f} s") from None


def send_aside(settings: Settings, notice: Notice) -> None:
    """Send a notice from a process of its own, which outlives this one: nothing here waits for it, or fails with it.

    What becomes of it is in `logs/notifications.log` in finpro's home.

    Raises:
        SettingsError: the settings have no webhook.
    """
    settings.require("discord_webhook_url")
    with suppress(OSError):  # no process to be had, or it has ended already: the run matters more
        log = private_directory(finpro_home() / "logs") / "notifications.log"
        with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)) as output:
            command = [sys.executable, "-m", "jobs.notify.notifications"]
            child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True)
        child.returncode = 0  # meant to go on: without this, Python would warn of a child that nobody waited for
        with child.stdin as stdin:  # type: ignore[union-attr]
            stdin.write(json.dumps(asdict(notice)).encode())


@contextmanager
def announced(settings: Settings, command: str, *, wanted: bool) -> Iterator[Callable[[Notice], None]]:
    """For a command that may have been asked to notify: gives what sends a notice aside, and tells of a failure itself.

    Raises:
        SettingsError: it was asked to, and the settings have no webhook; before the block has run.
    """
    if not wanted:
        yield lambda _: None
        return
    settings.require("discord_webhook_url")
    tell = partial(send_aside, settings)
    try:
        yield tell
    except Exception as error:
        tell(command_ended(command, error, settings))
        raise


def _until_taken(post: Callable[[], requests.Response], patience_seconds: float) -> None:
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(_NotNow),
        wait=_pause,
        stop=tenacity.stop_before_delay(patience_seconds),
        reraise=True,
    )
    try:
        with _silence():
            retrying(_attempt, post)
    except _NotNow as error:
        raise NotificationError(f"Discord did not take a notification in {patience_seconds:.0f} s: {error}") from None


def _attempt(post: Callable[[], requests.Response]) -> None:
    """One try. What the HTTP client raises names the webhook: it is neither quoted nor chained."""
    try:
        response = post()
    except requests.ConnectionError:
        raise _NotNow("it cannot be reached") from None
    except requests.RequestException as error:
        raise NotificationError(f"Discord did not answer a notification properly: {type(error).__name__}") from None
    if response.status_code == HTTPStatus.TOO_MANY_REQUESTS:
        raise _NotNow("it takes no more for now (429)", _retry_after(response))
    if response.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
        raise _NotNow(f"it answered {response.status_code}")
    if not response.ok:
        raise NotificationError(
            f"Discord refused a notification ({response.status_code}):"
            " is the webhook that FINPRO_DISCORD_WEBHOOK_URL names still there?"
        )


def _retry_after(response: requests.Response) -> float | None:
    try:
        seconds = float(response.headers.get("Retry-After") or response.json()["retry_after"])
    except (ValueError, TypeError, KeyError):
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def _pause(state: tenacity.RetryCallState) -> float:
    reason = state.outcome.exception() if state.outcome else None
    if isinstance(reason, _NotNow) and reason.seconds is not None:
        return reason.seconds
    return tenacity.wait_random_exponential(multiplier=0.5, max=30)(state)


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the HTTP client from writing the webhook into a debug log."""

    def has_no_url(record: logging.LogRecord) -> bool:
        return record.levelno > logging.DEBUG

    client = logging.getLogger("urllib3.connectionpool")
    client.addFilter(has_no_url)
    try:
        yield
    finally:
        client.removeFilter(has_no_url)


def main() -> None:
    """Deliver the notice on standard input, and log how that went."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    bypass_proxies()
    notice = Notice(**json.load(sys.stdin))
    try:
        send(load_settings(), notice, patience_seconds=_ASIDE_SECONDS)
        _log.info("sent: %s", notice.title)
    except FinproError as error:
        _log.warning("not sent: %s (%s)", notice.title, error)


if __name__ == "__main__":
    main()
