"""`finpro validate`: the gate between the raw tables in BigQuery and everything that is built on them."""

from collections.abc import Callable
from datetime import UTC, datetime

from google.cloud import bigquery

from batch.google_cloud import bigquery_client, explained, open_bucket, open_dataset
from batch.report.builds import Builds
from batch.warehouse.days import ranges, within
from batch.warehouse.manifest import TABLES, read_manifest
from batch.warehouse.steps import counted
from batch.warehouse.tables import Warehouse
from conf.errors import ExpectationsFailed
from conf.rules import load_rules
from conf.settings import Settings
from expectations.outcome import GateRun, Outcome, data_docs


def validate(settings: Settings, run_id: str | None, *, say: Callable[[str], None]) -> GateRun:
    """Check the raw tables that show an export run (without a run id: the newest), say what does not hold, publish data docs.

    Of the orders those are checked whose day has changed since everything was built from orders that passed.

    Raises:
        ExpectationsFailed: an expectation of the severity `fail` does not hold; nothing may be built on these tables.
        FinproError: there is no such run, or BigQuery does not answer or refuses.
    """
    manifest = read_manifest(open_bucket(settings), run_id)
    client = bigquery_client(settings, "validate", manifest.run_id)
    _check_tables(settings, client)
    rules = load_rules(settings.rules)
    from expectations.gate import run_gate  # takes seconds: after everything that can be wrong before

    with explained(settings), counted(settings, manifest.run_id, "validate", client):
        outcomes = run_gate(
            client,
            settings.bigquery_dataset,
            run_id=manifest.run_id,
            changed_orders=_changed_orders(settings, manifest.run_id, rules.time_zone),
            exported_at=manifest.started_at,
            latest_event=datetime.now(UTC) + rules.max_future_skew,
            data_docs=data_docs(),
        )
        if client.refusal is not None:  # of which the library says only that an expectation could not be checked
            raise client.refusal
    _tell(manifest.run_id, outcomes, say)
    return GateRun(manifest.run_id, outcomes)


def _changed_orders(settings: Settings, run_id: str, time_zone: str) -> str:
    warehouse = Warehouse.open(settings, "validate", run_id)
    run = warehouse.newest_run()
    builds = Builds(warehouse, f"{warehouse.client.project}.{settings.bigquery_core_dataset}")
    days = builds.changed_days(run, time_zone) if run and run.complete else None
    return "true" if days is None else within("created_date", "timestamp", ranges(days, most=None))


def _check_tables(settings: Settings, client: bigquery.Client) -> None:
    dataset = open_dataset(settings, client)
    with explained(settings):
        missing = sorted(set(TABLES) - {table.table_id for table in client.list_tables(dataset)})
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
