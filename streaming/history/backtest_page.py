"""What a backtest found, as one HTML page that needs no network, no script and no other file."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from batch.report.charts import DailyChart, daily_chart
from batch.report.pages import page_template
from conf.rules import FraudRules
from streaming.history.backtest import Backtest, Example


class _Row(NamedTuple):
    """An example as the page shows it; `evidence` is null where the candidate gives none."""

    rule: str
    kind: str
    order: Mapping[str, Any]
    evidence: Mapping[str, Any] | None


def render_backtest(found: Backtest, rules: FraudRules, written_at: datetime, *, locale: str = "en") -> str:
    """The page, as HTML. Every figure also stands in a `data` element with its exact value.

    Args:
        found: about at least one order.
        rules: the candidate.
        written_at: the present time.
        locale: how numbers and dates are written; the words are English.

    Raises:
        SettingsError: there is no such locale.
    """
    template = page_template(Path(__file__).with_name("backtest.html.j2"), locale=locale, time_zone=rules.time_zone)
    return template.render(
        found=found,
        rules=rules,
        frauds=_chart(found, ""),
        charts={rule: _chart(found, f"{rule}_") for rule in found.rules},
        examples=[_row(example) for example in found.examples],
        now=written_at.astimezone(UTC),
    )


def _chart(found: Backtest, prefix: str) -> DailyChart:
    """Bars are the candidate's, the line is in force."""
    days = [row["day"] for row in found.days]
    return daily_chart(days, [row[f"{prefix}after"] for row in found.days], [row[f"{prefix}before"] for row in found.days])


def _row(example: Example) -> _Row:
    evidence = msgspec.json.decode(example.evidence) if example.evidence else None
    return _Row(example.rule, example.kind, example.order, evidence)
