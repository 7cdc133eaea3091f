"""The gate: one Great Expectations checkpoint over the raw tables in BigQuery, and its data docs.

Importing this module takes seconds, because the library does.
"""

from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import great_expectations as gx
from google.cloud import bigquery
from great_expectations.checkpoint import UpdateDataDocsAction
from great_expectations.core.expectation_validation_result import ExpectationSuiteValidationResult, ExpectationValidationResult
from great_expectations.core.run_identifier import RunIdentifier
from great_expectations.data_context import EphemeralDataContext
from great_expectations.data_context.types.base import DataContextConfig, InMemoryStoreBackendDefaults, ProgressBarsConfig
from great_expectations.expectations.expectation_configuration import ExpectationConfiguration
from sqlalchemy import DateTime
from sqlalchemy.ext.compiler import compiles

from expectations.outcome import GateRun, Outcome, write_gate_run
from expectations.suites import GX_SEVERITY, KEYS, LATEST_EVENT, MOST_EXAMPLES, RECENT_ORDERS, recent, suites

_SEVERITIES = {theirs.value: ours for ours, theirs in GX_SEVERITY.items()}
_RESULT_FORMAT = {"result_format": "SUMMARY", "partial_unexpected_count": MOST_EXAMPLES}


@compiles(DateTime, "bigquery")
def _parameter_type(kind: DateTime, *_: Any, **__: Any) -> str:
    """BigQuery's name of a time; its SQLAlchemy dialect names all DATETIME, which BigQuery compares with no TIMESTAMP."""
    return "TIMESTAMP" if kind.timezone else "DATETIME"


class _Keyed(gx.ValidationDefinition):
    """Shows the keys of the rows that break an expectation: a checkpoint's own result format is the same for all tables."""

    def run(  # type: ignore[override]
        self, *, result_format: Any, **keywords: Any
    ) -> ExpectationSuiteValidationResult:
        return super().run(result_format={**result_format, "unexpected_index_column_names": [KEYS[self.name]]}, **keywords)


def run_gate(
    client: bigquery.Client,
    dataset: str,
    *,
    run_id: str,
    changed_orders: str,
    exported_at: datetime,
    latest_event: datetime,
    data_docs: Path,
) -> list[Outcome]:
    """Check the raw tables of a dataset and publish what was found.

    Args:
        client: asks BigQuery, or an emulator of it.
        dataset: name of the dataset, in the client's project.
        run_id: the export that the tables should show: names the run in the data docs.
        changed_orders: a condition in SQL: the rows of raw_orders to check. Those of other days were checked before.
        exported_at: when the export began.
        latest_event: no order may be later.
        data_docs: folder of the HTML pages; they replace those of the run before once they are complete.

    Returns:
        One outcome an expectation, table by table.
    """
    data_docs.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=data_docs.parent, prefix=f"{data_docs.name}-") as temporary:
        site = Path(temporary) / "site"
        outcomes = list(_check(_checkpoint(_context(site), client, dataset, changed_orders, exported_at), run_id, latest_event))
        write_gate_run(site, GateRun(run_id, outcomes))
        if data_docs.exists():
            data_docs.rename(Path(temporary) / "before")
        site.rename(data_docs)
    return outcomes


def _context(site: Path) -> EphemeralDataContext:
    """A context that keeps nothing but the pages it writes, and tells nobody that it is used."""
    stores = InMemoryStoreBackendDefaults()
    stores.data_docs_sites = {
        "finpro": {
            "class_name": "SiteBuilder",
            "show_how_to_buttons": False,
            "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(site)},
            "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
        }
    }
    config = DataContextConfig(
        store_backend_defaults=stores, analytics_enabled=False, progress_bars=ProgressBarsConfig(globally=False)
    )
    return gx.get_context(mode="ephemeral", project_config=config)


def _check(checkpoint: gx.Checkpoint, run_id: str, latest_event: datetime) -> Iterator[Outcome]:
    result = checkpoint.run(expectation_parameters={LATEST_EVENT: latest_event}, run_id=RunIdentifier(run_name=run_id))
    for table in result.run_results.values():
        for checked in table.results:
            yield _outcome(str(table.asset_name), checked)


def _checkpoint(
    context: EphemeralDataContext, client: bigquery.Client, dataset: str, changed_orders: str, exported_at: datetime
) -> gx.Checkpoint:
    source = context.data_sources.add_bigquery(
        "bigquery",
        connection_string=f"bigquery://{client.project}/{dataset}?user_supplied_client=True",
        kwargs={"connect_args": {"client": client}},  # type: ignore[call-arg]
    )
    parts = {"raw_orders": ("raw_orders", changed_orders), RECENT_ORDERS: ("raw_orders", recent(exported_at))}
    validations: list[gx.ValidationDefinition] = []
    for table, expectations in suites(f"{client.project}.{dataset}", exported_at).items():
        name, rows = parts.get(table, (table, "true"))
        # As a query, because the library writes the dataset of a table in small letters, and BigQuery tells them apart.
        asset = source.add_query_asset(table, query=f"select * from `{client.project}.{dataset}.{name}` where {rows}")
        suite = context.suites.add(gx.ExpectationSuite(name=table, expectations=expectations))
        whole = asset.add_batch_definition_whole_table("all rows")
        validations.append(_Keyed(name=table, data=whole, suite=suite))
        context.validation_definitions.add(validations[-1])  # gives back a plain one
    return gx.Checkpoint(
        name="gate",
        validation_definitions=validations,
        actions=[UpdateDataDocsAction(name="data docs")],
        result_format=_RESULT_FORMAT,
    )


def _outcome(table: str, checked: ExpectationValidationResult) -> Outcome:
    config, result = cast("ExpectationConfiguration", checked.expectation_config), checked.result
    unexpected = result.get("unexpected_count", result.get("observed_value"))
    examples = result.get("partial_unexpected_index_list") or []
    return Outcome(
        table=table,
        expected=str(config.description),
        severity=_SEVERITIES[config.severity],
        holds=bool(checked.success),
        unexpected=unexpected,
        examples=tuple(examples),
        error=_error(checked.exception_info),
    )


def _error(raised: Mapping[str, Any] | None) -> str | None:
    """Why an expectation could not be checked; the library keeps one record, or one for each metric that failed."""
    records = [raised, *raised.values()] if raised else []
    return next((r["exception_message"] for r in records if isinstance(r, Mapping) and r.get("raised_exception")), None)
