"""`finpro transform`: dbt over the loaded raw tables, with finpro's settings, and the pages that describe the models."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from google.cloud.bigquery import ScalarQueryParameter

from batch.bigquery import Usage
from batch.google_cloud import bigquery_client, explained, open_dataset
from batch.refusals import advice_on
from batch.report.builds import REPLACED_BY_DAY, Builds, DataTest
from batch.warehouse.days import ranges
from batch.warehouse.manifest import TABLES, check_run_id
from batch.warehouse.reconcile import MONITORING
from batch.warehouse.steps import record
from batch.warehouse.tables import LoadedRun, Warehouse
from conf.errors import DataTestsFailed, Overtaken, ReconciliationError, TransformError
from conf.rules import load_rules
from conf.settings import DATASETS, Settings, finpro_home, project_root, variable
from jobs.local.private_files import exclusive_lock, private_directory

PROJECT = project_root() / "dbt"
_SOURCES = frozenset({*TABLES, MONITORING})
_PROFILE_SETTINGS = (
    *("gcp_project", *DATASETS),
    *("bigquery_location", "bigquery_max_bytes_billed", "bigquery_emulator_host"),
)
_UP_TO_THE_DAYS = tuple(f"+{model}" for model in REPLACED_BY_DAY)  # and all that these are made of
MOST_DAYS = 2_000  # of a build: a job of BigQuery changes 4,000 partitions at most
_MOST_SHOWN = 20  # failures in a message
_MOST_EXAMPLES = 5  # rows of a failure

Say = Callable[[str], None]


def docs_page() -> Path:
    """The page that describes every model and column: one file, made by `transform`."""
    return finpro_home() / "dbt_docs" / "index.html"


class Part(NamedTuple):
    """One build of dbt's: of the orders of these days, or of all, where `days` is None.

    `anew` makes the tables anew that are otherwise changed day by day; after the `last` one all is up to date.
    """

    days: list[date] | None
    anew: bool
    last: bool

    def environment(self, run: LoadedRun) -> dict[str, str | None]:
        """The variables that tell dbt's project of it, and of the run: after other `--vars` dbt parses the project anew."""
        days = None if self.days is None else [(str(first), str(last)) for first, last in ranges(self.days, most=None)]
        return {"FINPRO_RUN_ID": run.run_id, "FINPRO_CHANGED_DAYS": json.dumps(days)}


def in_parts(days: list[date], *, every_day: bool) -> list[Part]:
    """The builds that bring days up to date, none with more days than a job of BigQuery may change.

    Where these are all days there are, the first build makes the tables anew: other days vanish from them.
    """
    chunks = [days[first : first + MOST_DAYS] for first in range(0, len(days), MOST_DAYS)] or [[]]
    if every_day and len(chunks) == 1:
        return [Part(None, anew=True, last=True)]
    return [
        Part(chunk, anew=every_day and number == 1, last=number == len(chunks)) for number, chunk in enumerate(chunks, start=1)
    ]


def transform(settings: Settings, *, run_id: str | None, full_refresh: bool, select: tuple[str, ...], say: Say) -> str:
    """Build dimensions, fact, marts and snapshots from the raw tables, test them, and write their documentation.

    Of the fact, and of what the marts by day are made of, only the days are built that have changed since everything was built.

    Args:
        settings: say where the warehouse is, and whose time zone decides what a day is.
        run_id: the export that the raw tables must show; None is whichever was loaded last. It must be Consistent.
        full_refresh: build all days anew.
        select: dbt's selection of what to build; nothing is everything, and its documentation.
        say: hears of every model as it is built, and of every warning.

    Returns:
        The run that was built on.

    Raises:
        FinproError: a setting, the rules, the run's name or the way to BigQuery is amiss.
        ReconciliationError: the run is Inconsistent, or was never compared; nothing was built.
        Overtaken: a newer run is loaded, or being loaded; nothing was built.
        DataTestsFailed: a test fails; names each with its rows.
        TransformError: the raw tables are not there, or a model cannot be built; names each.
    """
    _require_project()
    _require_datasets(settings)
    rules = load_rules(settings.rules)
    time_zone = rules.time_zone
    home = private_directory(finpro_home() / "dbt")
    with exclusive_lock(home / "lock", on_wait=lambda: say("another transform is at work: waiting …")), _profile(settings):
        with explained(settings):
            warehouse = Warehouse.open(settings, "transform", run_id)
            run = _run_to_build(warehouse, run_id)
            builds = Builds.open(warehouse, f"{warehouse.client.project}.{settings.bigquery_core_dataset}")
            days = None if full_refresh else builds.changed_days(run, time_zone)
            parts = in_parts(builds.every_day() if days is None else days, every_day=days is None)
            if parts[0].anew:
                builds.begin(run, time_zone)
        variables = ["--vars", json.dumps({"time_zone": time_zone, "declared_fields": rules.fields})]
        for part in parts:
            chosen = select if part.last else ()
            if len(parts) > 1 and (select or not part.last):  # each part is of the days that no other brings
                chosen = (*chosen, *_UP_TO_THE_DAYS)
            with _environment(part.environment(run)):
                results = _build(part, chosen, variables, home, say)
            record(settings, run.run_id, "transform", _usage(results))
            with explained(settings):
                builds.record_tests(run, [_data_test(result) for result in results if _is_test(result)])
                _raise_for_failures(warehouse, results, home, settings.gcp_project)
        with explained(settings):
            say(_summary(warehouse, results))
        if not select:
            with explained(settings):
                builds.complete(run, time_zone)
            with _environment(parts[-1].environment(run)):
                _write_docs(settings, home, variables)
    return run.run_id


def _require_project() -> None:
    if not (PROJECT / "dbt_project.yml").exists():
        raise TransformError(f"There is no dbt project at {PROJECT}: run finpro in its checkout.")


def _require_datasets(settings: Settings) -> None:
    client = bigquery_client(settings, "transform")
    dataset = open_dataset(settings, client)
    with explained(settings):
        missing = sorted(_SOURCES - {table.table_id for table in client.list_tables(dataset)})
    if missing:
        raise TransformError(
            f"{settings.gcp_project}.{settings.bigquery_dataset} has no {', '.join(missing)}:"
            " run `finpro export`, `finpro load` and `finpro reconcile` first."
        )
    for setting in ("bigquery_core_dataset", "bigquery_marts_dataset"):
        open_dataset(settings, client, setting)


def _run_to_build(warehouse: Warehouse, run_id: str | None) -> LoadedRun:
    """The run that the raw tables hold: the one that is wanted, whole, and Consistent."""
    run = warehouse.newest_run()
    if run is None:
        raise TransformError("No run has been loaded: `finpro load` first.")
    if run_id and check_run_id(run_id) != run.run_id:
        raise Overtaken(
            f"The raw tables do not show run {run_id}: run {run.run_id} was loaded last, or is being loaded."
            f" `finpro transform --run-id {run.run_id}` builds on that."
        )
    if not run.complete:
        raise Overtaken(f"Run {run.run_id} is being loaded, or its load has died: `finpro load` finishes it.")
    found = warehouse.rows(
        f"select table_name, status from `{warehouse.table(MONITORING)}` where run_id = @run_id",
        [ScalarQueryParameter("run_id", "STRING", run.run_id)],
    )
    status = dict.fromkeys(TABLES, "never compared") | {row["table_name"]: row["status"] for row in found}
    if wrong := [f"{table} {status[table]}" for table in TABLES if status[table] != "Consistent"]:
        raise ReconciliationError(
            f"Nothing is built on run {run.run_id}, and the marts stay as they are: {', '.join(wrong)}."
            f" `finpro reconcile --run-id {run.run_id}` compares, and names every figure that differs."
        )
    return run


def _profile(settings: Settings) -> AbstractContextManager[None]:
    """The variables that dbt/profiles.yml reads, and no others by these names, for one block."""
    return _environment({variable(name): settings.get(name) for name in _PROFILE_SETTINGS})


@contextmanager
def _environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """These variables of the environment, or none by these names, for one block."""
    before = {name: os.environ.get(name) for name in values}
    _set_variables(values)
    try:
        yield
    finally:
        _set_variables(before)


def _set_variables(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _build(part: Part, select: tuple[str, ...], variables: list[str], home: Path, say: Say) -> list[Any]:
    command = ["build", "--exclude-resource-type", "unit_test", *variables]
    command += ["--full-refresh"] if part.anew else []
    command += [] if part.last else ["--indirect-selection", "cautious"]  # tests of other tables come with the last part
    command += ["--select", *select] if select else []
    results = _run_dbt(command, home, say)
    if not results:
        raise TransformError(f"Nothing in the dbt project is selected by: {' '.join(select)}")
    return results


def _run_dbt(arguments: list[str], home: Path, say: Say) -> list[Any]:
    """Run one dbt command in this process; returns dbt's result of each node, failed ones among them.

    Raises:
        TransformError: dbt could not begin; with what it said.
    """
    from dbt.cli.main import dbtRunner  # takes seconds
    from dbt_common.behavior_flags import BehaviorFlagRendered

    # For its log dbt would look up in the whole stack, among all modules, who has made each flag of an adapter: in a process of
    # many modules that takes longer than all models.
    BehaviorFlagRendered._default_source = staticmethod(lambda: "an adapter")  # type: ignore[method-assign]

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


def _raise_for_failures(warehouse: Warehouse, results: list[Any], home: Path, project: str | None) -> None:
    failed = [result for result in results if result.status in ("error", "fail", "runtime error")]
    if not failed:
        return
    skipped = sum(result.status == "skipped" for result in results)
    lines = [f"  {_failure(warehouse, result)}" for result in failed[:_MOST_SHOWN]]
    advice = sorted({known for one in failed if (known := advice_on(str(one.message), project))})
    if len(failed) > _MOST_SHOWN:
        lines.append(f"  … and {len(failed) - _MOST_SHOWN} more")
    kind = DataTestsFailed if all(result.status == "fail" for result in failed) else TransformError
    raise kind(
        f"{len(failed)} of {len(results)} steps of dbt failed, {skipped} were skipped for it:\n"
        + "\n".join([*lines, *advice])
        + f"\nWhat was run is under {home / 'target' / 'run'}, dbt's log is {home / 'logs' / 'dbt.log'}."
    )


def _is_test(result: Any) -> bool:
    return bool(result.node.resource_type == "test")


def _data_test(result: Any) -> DataTest:
    return DataTest(result.node.name, str(result.status), result.failures)


def _failure(warehouse: Warehouse, result: Any) -> str:
    if result.status == "fail":
        return f"{_broken(warehouse, result)} ({result.node.original_file_path})"
    return f"{result.node.name}: {' '.join(str(result.message).split())} ({result.node.original_file_path})"


def _usage(results: list[Any]) -> Usage:
    """What the statements of dbt's nodes have read; what dbt asks besides is not among its results."""
    answers = [result.adapter_response for result in results if result.adapter_response]
    processed, billed = (sum(answer.get(name) or 0 for answer in answers) for name in ("bytes_processed", "bytes_billed"))
    return Usage(len(answers), processed, billed)


def _broken(warehouse: Warehouse, result: Any) -> str:
    """A test that rows break: its name, how many rows, some of them, and the table that keeps them."""
    kept = f"{result.node.schema}.{result.node.alias}"
    found = warehouse.rows(f"select * from `{warehouse.client.project}.{kept}` limit {_MOST_EXAMPLES}")
    examples = [", ".join(f"{name} {value}" for name, value in row.items()) for row in found]
    shown = "; ".join(examples + (["…"] if result.failures > len(examples) else []))
    or_more = " or more" if result.failures == result.node.config.limit else ""
    return f"{result.node.name}: {result.failures:,}{or_more} rows break it: {shown} (all in {kept})"


def _summary(warehouse: Warehouse, results: list[Any]) -> str:
    warned = [result for result in results if result.status == "warn"]
    lines = [f"warning: {_broken(warehouse, result)}" for result in warned]
    tests = [result for result in results if _is_test(result)]
    built = [result for result in results if result.node.resource_type in ("model", "snapshot")]
    lines.append(f"{len(built)} models and snapshots built; {len(tests) - len(warned)} of {len(tests)} tests passed")
    return "\n".join(lines)


def _write_docs(settings: Settings, home: Path, variables: list[str]) -> None:
    """Write the documentation; with the variables of the build, whose parsing of the project holds for it then."""
    # The emulator has no catalogue of columns to ask for; what the project declares is there all the same.
    catalog = ["--empty-catalog"] if settings.bigquery_emulator_host else []
    _run_dbt(["docs", "generate", "--static", "--no-compile", *variables, *catalog], home, lambda line: None)
    shutil.copyfile(home / "target" / "static_index.html", private_directory(docs_page().parent) / docs_page().name)
