"""`finpro validate`: the gate between the raw tables in BigQuery and everything that is built on them."""

from collections.abc import Callable
from datetime import UTC, datetime

from google.cloud import bigquery

from batch.google_cloud import bigquery_client, explained, open_bucket, open_dataset
from batch.warehouse.manifest import read_manifest
from batch.warehouse.steps import counted
from conf.errors import ExpectationsFailed
from conf.rules import load_rules
from conf.settings import Settings
from expectations.outcome import Outcome, data_docs


def validate(settings: Settings, run_id: str | None, *, say: Callable[[str], None]) -> list[Outcome]:
    """Check the raw tables against an export run (without a run id: the newest), say what does not hold, publish data docs.

    Raises:
        ExpectationsFailed: an expectation of the severity `fail` does not hold; nothing may be built on these tables.
        FinproError: there is no such run, or BigQuery does not answer or refuses.
    """
    manifest = read_manifest(open_bucket(settings), run_id)
    source_rows = {table.table: table.source_rows for table in manifest.tables}
    client = bigquery_client(settings, "validate", manifest.run_id)
    _check_tables(settings, client, set(source_rows))
    from expectations.gate import run_gate  # takes seconds: after everything that can be wrong before

    with explained(settings), counted(settings, manifest.run_id, "validate", client):
        outcomes = run_gate(
            client,
            settings.bigquery_dataset,
            run_id=manifest.run_id,
            source_rows=source_rows,
            latest_event=datetime.now(UTC) + load_rules(settings.rules).max_future_skew,
            data_docs=data_docs(),
        )
        if client.refusal is not None:  # of which the library says only that an expectation could not be checked
            raise client.refusal
    _tell(manifest.run_id, outcomes, say)
    return outcomes


def _check_tables(settings: Settings, client: bigquery.Client, expected: set[str]) -> None:
    dataset = open_dataset(settings, client)
    with explained(settings):
        missing = sorted(expected - {table.table_id for table in client.list_tables(dataset)})
    if missing:
        raise ExpectationsFailed(f"{', '.join(missing)}: not in the dataset {dataset.dataset_id}. Run `finpro load` first.")


def _tell(run_id: str, outcomes: list[Outcome], say: Callable[[str], None]) -> None:
    failures = [outcome for outcome in outcomes if outcome.stops]
    warnings = [outcome for outcome in outcomes if not outcome.holds and not outcome.stops]
    for outcome in warnings:
        say(f"warning: {outcome}")
    held = len(outcomes) - len(failures) - len(warnings)
    say(f"run {run_id}: {held} of {len(outcomes)} expectations hold, {len(warnings)} warn, {len(failures)} fail")
    say(f"data docs: {data_docs() / 'index.html'}")
    if failures:
        listed = "\n".join(f"  {outcome}" for outcome in failures)
        raise ExpectationsFailed(
            f"Run {run_id} does not pass the gate; nothing may be built on these tables:\n{listed}\n"
            "Correct what is wrong at the source, export and load again."
        )
