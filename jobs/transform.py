"""`finpro transform`: dbt over the loaded raw tables, with finpro's settings, and the pages that describe the models."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from batch.bigquery import Usage
from batch.google_cloud import bigquery_client, explained, open_dataset
from batch.refusals import advice_on
from batch.warehouse.manifest import check_run_id
from batch.warehouse.steps import record
from batch.warehouse.tables import Warehouse
from conf.errors import TransformError
from conf.rules import load_rules
from conf.settings import Settings, finpro_home, project_root, variable
from jobs.local.private_files import exclusive_lock, private_directory

PROJECT = project_root() / "dbt"
_SOURCES = frozenset({"raw_users", "raw_products", "raw_orders", "ingestion_monitoring"})
_PROFILE_SETTINGS = (
    "gcp_project",
    "bigquery_dataset",
    "bigquery_location",
    "bigquery_max_bytes_billed",
    "bigquery_emulator_host",
)
_MOST_SHOWN = 20  # failures in a message

Say = Callable[[str], None]


def docs_page() -> Path:
    """The page that describes every model and column: one file, made by `transform`."""
    return finpro_home() / "dbt_docs" / "index.html"


def transform(settings: Settings, *, run_id: str | None, full_refresh: bool, select: tuple[str, ...], say: Say) -> None:
    """Build dimensions, fact, marts and snapshots from the raw tables, test them, and write their documentation.

    Args:
        settings: say where the warehouse is, and whose time zone decides what a day is.
        run_id: the export that must have been found Consistent; None is the newest of each table.
        full_refresh: build the fact anew instead of merging what changed.
        select: dbt's selection of what to build; nothing is everything, and its documentation.
        say: hears of every model as it is built, and of every warning.

    Raises:
        FinproError: a setting, the rules, the run's name or the way to BigQuery is amiss.
        TransformError: the raw tables are not there, a model cannot be built, or a test fails; names each with its count.
    """
    _require_project()
    _require_sources(settings)
    known = {"time_zone": load_rules(settings.rules).time_zone, "run_id": check_run_id(run_id) if run_id else None}
    variables = ["--vars", json.dumps(known)]
    home = private_directory(finpro_home() / "dbt")
    with exclusive_lock(home / "lock", on_wait=lambda: say("another transform is at work: waiting …")), _environment(settings):
        build = ["build", "--exclude-resource-type", "unit_test", *variables]
        build += ["--full-refresh"] if full_refresh else []
        build += ["--select", *select] if select else []
        results = _run_dbt(build, home, say)
        if not results:
            raise TransformError(f"Nothing in the dbt project is selected by: {' '.join(select)}")
        if run_id:
            record(settings, run_id, "transform", _usage(results))
        _raise_for_failures(results, home, settings.gcp_project)
        say(_summary(results))
        if not select:
            _write_docs(settings, home, variables)


def overtaken_by(settings: Settings, run_id: str) -> str | None:
    """The run whose load has begun since that of `run_id`, if one has: the raw tables are not what was validated."""
    newest = Warehouse.open(settings, "transform", run_id).newest_run()
    return newest.run_id if newest and newest.run_id != run_id else None


def _require_project() -> None:
    if not (PROJECT / "dbt_project.yml").exists():
        raise TransformError(f"There is no dbt project at {PROJECT}: run finpro in its checkout.")


def _require_sources(settings: Settings) -> None:
    client = bigquery_client(settings, "transform")
    dataset = open_dataset(settings, client)
    with explained(settings):
        missing = sorted(_SOURCES - {table.table_id for table in client.list_tables(dataset)})
    if missing:
        raise TransformError(
            f"{settings.gcp_project}.{settings.bigquery_dataset} has no {', '.join(missing)}:"
            " run `finpro export`, `finpro load` and `finpro reconcile` first."
        )


@contextmanager
def _environment(settings: Settings) -> Iterator[None]:
    """The variables that dbt/profiles.yml reads, and no others by these names, for one block."""
    values = {variable(name): settings.get(name) for name in _PROFILE_SETTINGS}
    before = {name: os.environ.get(name) for name in values}
    _set_variables(values)
    try:
        yield
    finally:
        _set_variables(before)


def _set_variables(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _run_dbt(arguments: list[str], home: Path, say: Say) -> list[Any]:
    """Run one dbt command in this process; returns dbt's result of each node, failed ones among them.

    Raises:
        TransformError: dbt could not begin; with what it said.
    """
    from dbt.cli.main import dbtRunner  # takes seconds

    def hear(event: Any) -> None:
        if event.info.name in ("LogModelResult", "LogSnapshotResult"):
            say(f"{event.data.node_info.node_name}: {event.data.status}")

    places = {
        "--project-dir": PROJECT,
        "--profiles-dir": PROJECT,
        "--target-path": home / "target",
        "--log-path": home / "logs",
    }
    options = [str(part) for place in places.items() for part in place]
    quietly = ["--log-level", "none", "--log-level-file", "debug", "--no-version-check", "--no-send-anonymous-usage-stats"]
    outcome = dbtRunner(callbacks=[hear]).invoke([*quietly, *arguments, *options])
    results = list(getattr(outcome.result, "results", None) or [])
    if not outcome.success and not results:
        raise TransformError(f"dbt {arguments[0]}: {outcome.exception}\nIts log is {home / 'logs' / 'dbt.log'}.")
    return results


def _raise_for_failures(results: list[Any], home: Path, project: str | None) -> None:
    failed = [result for result in results if result.status in ("error", "fail", "runtime error")]
    if not failed:
        return
    skipped = sum(result.status == "skipped" for result in results)
    lines = [f"  {_failure(result)}" for result in failed[:_MOST_SHOWN]]
    advice = sorted({known for one in failed if (known := advice_on(str(one.message), project))})
    if len(failed) > _MOST_SHOWN:
        lines.append(f"  … and {len(failed) - _MOST_SHOWN} more")
    raise TransformError(
        f"{len(failed)} of {len(results)} steps of dbt failed, {skipped} were skipped for it:\n"
        + "\n".join([*lines, *advice])
        + f"\nWhat was run is under {home / 'target' / 'run'}, dbt's log is {home / 'logs' / 'dbt.log'}."
    )


def _failure(result: Any) -> str:
    if result.status == "fail":
        return f"{result.node.name}: {result.failures:,} rows break it ({result.node.original_file_path})"
    return f"{result.node.name}: {' '.join(str(result.message).split())} ({result.node.original_file_path})"


def _usage(results: list[Any]) -> Usage:
    """What the statements of dbt's nodes have read; what dbt asks besides is not among its results."""
    answers = [result.adapter_response for result in results if result.adapter_response]
    processed, billed = (sum(answer.get(name) or 0 for answer in answers) for name in ("bytes_processed", "bytes_billed"))
    return Usage(len(answers), processed, billed)


def _summary(results: list[Any]) -> str:
    warned = [result for result in results if result.status == "warn"]
    lines = [f"warning: {result.node.name}: {result.failures:,} rows break it" for result in warned]
    tests = [result for result in results if result.node.resource_type == "test"]
    built = [result for result in results if result.node.resource_type in ("model", "snapshot")]
    lines.append(f"{len(built)} models and snapshots built; {len(tests) - len(warned)} of {len(tests)} tests passed")
    return "\n".join(lines)


def _write_docs(settings: Settings, home: Path, variables: list[str]) -> None:
    """Write the documentation; with the variables of the build, whose parsing of the project holds for it then."""
    # The emulator has no catalogue of columns to ask for; what the project declares is there all the same.
    catalog = ["--empty-catalog"] if settings.bigquery_emulator_host else []
    _run_dbt(["docs", "generate", "--static", "--no-compile", *variables, *catalog], home, lambda line: None)
    shutil.copyfile(home / "target" / "static_index.html", private_directory(docs_page().parent) / docs_page().name)
