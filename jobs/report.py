"""`finpro report`: reads the marts and writes the page."""

import os
from datetime import UTC, datetime
from pathlib import Path
from urllib.request import pathname2url

from batch.google_cloud import bigquery_client, explained, open_dataset
from batch.report.marts import read_marts
from batch.report.pages import write_page
from batch.report.report_page import Expectation, Gate, Surroundings, render_report
from conf.rules import load_rules
from conf.settings import Settings, finpro_home
from expectations.outcome import data_docs, read_gate_run
from jobs.transform import docs_page


def write_report(settings: Settings, output: Path | None, *, locale: str) -> Path:
    """Write the report and return where it is: `output`, or `report.html` in finpro's home.

    A page that was there before stays until the new one is complete.

    Raises:
        ReportError: the marts are not there, or hold no order.
        FinproError: BigQuery does not answer, or there is no such locale.
    """
    client = bigquery_client(settings, "report")
    open_dataset(settings, client, "bigquery_marts_dataset")
    with explained(settings):
        marts = read_marts(client, marts=settings.bigquery_marts_dataset, raw=settings.bigquery_dataset)
    path = (output or finpro_home() / "report.html").absolute()
    return write_page(path, render_report(marts, _surroundings(settings, path.parent), locale=locale))


def _surroundings(settings: Settings, folder: Path) -> Surroundings:
    rules = load_rules(settings.rules)
    pages = {"data docs: every expectation in full": data_docs() / "index.html", "the models and columns": docs_page()}
    return Surroundings(
        gate=_gate(),
        links={title: pathname2url(os.path.relpath(page, folder)) for title, page in pages.items() if page.exists()},
        time_zone=rules.time_zone,
        rules_version=rules.version,
        rules=[name for name in rules.evaluated if name not in rules.in_shadow],
        written_at=datetime.now(UTC),
    )


def _gate() -> Gate | None:
    run = read_gate_run(data_docs())
    return run and Gate(
        run.run_id,
        [
            Expectation(found.table, found.expected, found.holds, found.severity.value, found.stops, found.finding())
            for found in run.outcomes
        ],
    )
