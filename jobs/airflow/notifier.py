"""Discord from Airflow: callbacks that DAGs and tasks hang on, through the provider's hook.

Airflow calls them when the state of the task or the run is decided, and whatever happens here changes nothing about it.
"""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from airflow.providers.discord.hooks.discord_webhook import DiscordWebhookHook
from airflow.providers.discord.notifications.discord import DiscordNotifier
from airflow.sdk import Connection
from airflow.sdk.log import mask_secret

from conf.settings import Settings
from jobs.airflow.exports import export_of
from jobs.airflow.settings import task_settings
from jobs.notify.notices import Notice, dag_succeeded, run_consistency, task_failed
from jobs.notify.notifications import ANSWER_SECONDS, deliver, payload

if TYPE_CHECKING:
    from airflow.sdk.definitions.context import Context


class FinproDiscordHook(DiscordWebhookHook):
    """The provider's hook, whose connection is the webhook of finpro's settings."""

    @classmethod
    def get_connection(cls, conn_id: str) -> Connection:
        """The webhook as a connection; its token is masked in Airflow's logs."""
        url = urlsplit(task_settings().require("discord_webhook_url"))
        api, _, webhook = url.path.rpartition("/webhooks/")
        mask_secret(webhook.rpartition("/")[2])
        host = f"{url.scheme}://{url.netloc}{api}/"
        extra = json.dumps({"webhook_endpoint": f"webhooks/{webhook}"})
        return Connection(conn_id=conn_id, conn_type="discord", host=host, extra=extra)


class Discord(DiscordNotifier):
    """Sends what `say` makes of the context; without a webhook in the settings it does nothing."""

    def __init__(self, say: Callable[["Context", Settings], Notice]) -> None:
        super().__init__()
        self.say = say

    @cached_property
    def hook(self) -> DiscordWebhookHook:
        """The way to the webhook."""
        return FinproDiscordHook(http_conn_id=self.discord_conn_id)

    def notify(self, context: "Context") -> None:
        """Send; a failure is a line in the log, which does not hold the webhook."""
        try:
            settings = task_settings()
            if settings.discord_webhook_url is not None:
                self._post(payload(self.say(context, settings)))
        except Exception as error:  # whatever it is, the run is over and no concern of this
            self.log.warning("Discord was not told: %s", error)

    def _post(self, body: dict[str, Any]) -> None:
        # Not the hook's own `execute`: it has no time-out, and logs the webhook when it cannot connect.
        session = self.hook.get_conn()
        url = self.hook.url_from_endpoint(self.hook.webhook_endpoint)
        deliver(partial(session.post, url, json=body, timeout=ANSWER_SECONDS))


def _dag_succeeded(context: "Context", _: Settings) -> Notice:
    run: Any = context["dag_run"]
    seconds = (datetime.now(UTC) - run.start_date).total_seconds() if run.start_date else None
    return dag_succeeded(run.dag_id, run.run_id, seconds)


def _task_failed(context: "Context", settings: Settings) -> Notice:
    ti: Any = context["ti"]
    error = context.get("exception") or "the task ended without an error of its own: it was killed, or timed out"
    return task_failed(
        f"{ti.dag_id}.{ti.task_id}", ti.run_id, attempt=ti.try_number, error=error, log_url=ti.log_url, settings=settings
    )


def _run_reconciled(context: "Context", settings: Settings) -> Notice:
    return run_consistency(settings, export_of(context["dag_run"]))


DAG_SUCCEEDED = Discord(_dag_succeeded)  # of the task that completes a run: a run that skips it has made nothing
TASK_FAILED = Discord(_task_failed)
RUN_RECONCILED = Discord(_run_reconciled)
