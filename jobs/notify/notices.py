"""What people are told of runs and of fraud: short texts without secrets, whoever delivers them."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

from pydantic import SecretStr

from conf.errors import NotificationError
from conf.rules import load_rules
from conf.settings import Settings

if TYPE_CHECKING:
    from batch.warehouse.monitoring import Finding, FraudHour

GOOD, BAD, PLAIN = 0x2E7D32, 0xC62828, 0x1565C0

_LONGEST_BLOCK = 1500  # characters: what a person reads of an error, and well within what Discord takes
_LONGEST_TABLE = 3500
_BROKEN_BACKTICK = "`\u200b"  # three of them in a row end no code block

_NAME = r"(?:password|passwd|passphrase|secret|token|api_?key|credential)[\w.-]{0,30}"
_VALUE = r"(?:\"[^\"]*\"|'[^']*'|[^\s,;&})]+)"
_SECRETS = [
    (r"https?://[^\s'\"]{1,200}/webhooks/[^\s'\"]+", "(a webhook)"),
    (r"(://[^\s:/@]*):[^\s/]+@", r"\1:***@"),
    (r"-----BEGIN [^-]*PRIVATE KEY-----.*?(?:-----END [^-]*-----|\Z)", "(a private key)"),
    (r"\b(Bearer|Basic)\s+[\w.~+/=-]{8,}", r"\1 ***"),
    (rf"({_NAME}[\"']?\s*=\s*){_VALUE}", r"\1***"),
    (rf"({_NAME}[\"']\s*:\s*){_VALUE}", r"\1***"),
    (rf"({_NAME}:\s*)(?=\S*\d)\S{{8,}}", r"\1***"),  # "password: correct it" is advice, not a password
]


@dataclass(frozen=True)
class Notice:
    """One message; its colour says whether it is good news."""

    title: str
    text: str
    colour: int = PLAIN


def scrubbed(text: str, settings: Settings | None = None) -> str:
    """`text` without passwords, tokens, keys and webhook URLs: those of the settings, and all that looks like one."""
    for secret in _secrets(settings) if settings else ():
        text = text.replace(secret, "***")
    for pattern, instead in _SECRETS:
        text = re.sub(pattern, instead, text, flags=re.IGNORECASE | re.DOTALL)
    return text


def dag_succeeded(dag_id: str, run_id: str, seconds: float | None = None) -> Notice:
    """A run of a DAG came to its end, after so many seconds."""
    lasted = f"\nIt took {timedelta(seconds=round(seconds))}." if seconds is not None else ""
    return Notice(f"{dag_id} succeeded", f"run {_code(run_id)}{lasted}", GOOD)


def task_failed(
    task: str, run_id: str, *, attempt: int, error: object, log_url: str | None, settings: Settings | None = None
) -> Notice:
    """A task (`dag.task`) failed and is not tried again; the error is cut and scrubbed."""
    lines = [f"run {_code(run_id)}, try {attempt}", _error(error, settings)]
    lines += [f"[log]({log_url})"] if log_url else []
    return Notice(f"{task} failed", "\n".join(lines), BAD)


def command_ended(
    command: str, error: object | None = None, settings: Settings | None = None, *, run_id: str | None = None
) -> Notice:
    """A `finpro` command came to its end, of a run, or failed with an error, which is cut and scrubbed."""
    if error is None:
        return Notice(f"finpro {command} succeeded", f"run {_code(run_id)}" if run_id else "", GOOD)
    return Notice(f"finpro {command} failed", _error(error, settings), BAD)


def consistency(found: "list[Finding]") -> Notice:
    """What reconciliation found for the tables of one run, as a table."""
    agrees = all(one.status == "Consistent" for one in found)
    rows = [(one.table_name, f"{one.source_rows:,}", f"{one.destination_rows:,}", one.status) for one in found]
    table = _table(("table", "Postgres", "BigQuery", "status"), rows)
    return Notice(f"Run {found[0].run_id} is {'Consistent' if agrees else 'Inconsistent'}", table, GOOD if agrees else BAD)


def run_consistency(settings: Settings, run_id: str | None = None) -> Notice:
    """`consistency` of a run, by default the newest one, as `ingestion_monitoring` has it.

    Raises:
        NotificationError: such a run has not been reconciled.
        FinproError: the settings lack Postgres, or it does not answer.
    """
    from batch.warehouse.monitoring import (
        findings,  # Airflow reads this module again and again, and has no need of Postgres for that
    )

    found = findings(settings.require("postgres_dsn"), run_id)
    if not found:
        which = f"Run {run_id} has not been reconciled" if run_id else "No run has been reconciled"
        raise NotificationError(f"{which}: `finpro reconcile` first.")
    return consistency(found)


def digest(hours: "list[FraudHour]", time_zone: str) -> Notice:
    """Orders, frauds and reasons of one or more hours that follow one another, in local time of `time_zone`."""
    zone = ZoneInfo(time_zone)
    orders, frauds, amount = (sum(getattr(one, figure) for one in hours) for figure in ("orders", "frauds", "amount"))
    begin, end = hours[0].hour.astimezone(zone), hours[-1].hour.astimezone(zone) + timedelta(hours=1)
    share = f" ({frauds / orders:.1%})" if orders else ""
    rows = [(f"{one.hour.astimezone(zone):%d %b %H:%M}", f"{one.orders:,}", f"{one.frauds:,}", _reasons(one)) for one in hours]
    return Notice(
        f"Fraud from {begin:%d %b %H:%M} to {end:%H:%M} {end:%Z}",
        f"{frauds:,} of {orders:,} orders{share}, worth Rp{amount:,}.\n"
        + _table(("hour", "orders", "frauds", "by reason"), rows),
    )


def fraud_digest(settings: Settings, *, hours: int = 1, now: datetime | None = None) -> Notice:
    """`digest` of the last full hours before `now`.

    Raises:
        FinproError: the settings lack Postgres, it does not answer, or the rules cannot be read.
    """
    from batch.warehouse.monitoring import fraud_by_hour

    until = (now or datetime.now(UTC)).replace(minute=0, second=0, microsecond=0)
    counted = fraud_by_hour(settings.require("postgres_dsn"), until - timedelta(hours=hours), until)
    return digest(counted, load_rules(settings.rules).time_zone)


def _secrets(settings: Settings) -> list[str]:
    """Longest first: one that is part of another leaves no rest of it."""
    known = [value.get_secret_value() for _, value in settings if isinstance(value, SecretStr)]
    passwords = [urlsplit(secret).password for secret in known if "://" in secret]
    return sorted(filter(None, [*known, *passwords]), key=len, reverse=True)


def _error(error: object, settings: Settings | None) -> str:
    begin = str(error).strip()[: 5 * _LONGEST_BLOCK]  # an error may quote megabytes, and only its begin is shown
    text = scrubbed(begin or type(error).__name__, settings)
    return f"```\n{_cut(text, _LONGEST_BLOCK).replace('`', _BROKEN_BACKTICK)}\n```"


def _code(text: str) -> str:
    return f"`{text.replace('`', '')}`"


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]} …"


def _reasons(one: "FraudHour") -> str:
    most_first = sorted(one.reasons.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{reason} {count:,}" for reason, count in most_first)


def _table(head: tuple[str, str, str, str], rows: list[tuple[str, str, str, str]]) -> str:
    """Four columns of text, the two in the middle are figures; as many rows as a message holds."""
    first, second, third = (max(len(row[index]) for row in [head, *rows]) for index in range(3))
    lines = [f"{a:<{first}}  {b:>{second}}  {c:>{third}}  {d}".rstrip() for a, b, c, d in [head, *rows]]
    return f"```\n{_cut(chr(10).join(lines), _LONGEST_TABLE)}\n```"
