"""What is found about proposed rules, as one HTML page that needs no network, no script and no other file."""

from datetime import UTC, datetime
from pathlib import Path

from batch.report.charts import daily_chart
from batch.report.pages import page_template
from streaming.history.proposal import HELD, MISSED, Trial


def render_proposal(trial: Trial, by: str, written_at: datetime, *, locale: str = "en") -> str:
    """The page, as HTML. Every figure also stands in a `data` element with its exact value.

    Args:
        trial: of at least one order.
        by: who proposes the rules.
        written_at: the present time.
        locale: how numbers and dates are written; the words are English.

    Raises:
        SettingsError: there is no such locale.
    """
    template = page_template(Path(__file__).with_name("proposal.html.j2"), locale=locale, time_zone=trial.rules.time_zone)
    days = trial.found.days
    return template.render(
        trial=trial,
        found=trial.found,
        rules=trial.rules,
        by=by,
        alerts=daily_chart([row["day"] for row in days], [row["after"] for row in days], [row["before"] for row in days]),
        mistakes={kind: [mistake for mistake in trial.mistakes if mistake.kind == kind] for kind in (HELD, MISSED)},
        now=written_at.astimezone(UTC),
    )
