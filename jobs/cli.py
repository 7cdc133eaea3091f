"""The `finpro` command: what a person starts. Each command imports what it needs when it runs, so that --help is quick."""

import getpass
import shlex
import sys
from collections import Counter
from datetime import datetime
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from conf.errors import FinproError, SettingsError
from jobs.local.ports import bypass_proxies

if TYPE_CHECKING:
    from batch.warehouse.bigquery import LoadedTable

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
notify_app = typer.Typer(no_args_is_help=True, help="Tell the Discord channel of the settings.")
app.add_typer(notify_app, name="notify")
rules_app = typer.Typer(no_args_is_help=True, help="The fraud rules.")
app.add_typer(rules_app, name="rules")
outcomes_app = typer.Typer(no_args_is_help=True, help="What turned out about orders.")
app.add_typer(outcomes_app, name="outcomes")

Master = Annotated[str, typer.Option(help="Spark master URL.", envvar="FINPRO_SPARK_MASTER")]
Memory = Annotated[str, typer.Option(help="Heap of the driver (and of each executor on a cluster).")]
Conf = Annotated[list[str] | None, typer.Option("--conf", help="A Spark property, key=value; repeatable.")]
By = Annotated[str | None, typer.Option(help="Who does it, kept in the record; by default the login.")]
Why = Annotated[str, typer.Option(help="The reason, kept in the record.")]
Notify = Annotated[bool, typer.Option("--notify", help="Tell Discord how it ended; that never fails or delays it.")]


@app.callback()
def finpro(
    debug: Annotated[bool, typer.Option("--debug", help="Show the stack trace of an error.")] = False,
) -> None:
    """An e-commerce data platform: orders stream in, every one is screened for fraud, and every step proves it lost nothing."""


@app.command()
def demo(
    orders: Annotated[int, typer.Option(min=1, help="How many orders.")] = 20_000,
    rate: Annotated[float, typer.Option(min=0, help="Orders a second; 0 is as fast as it goes.")] = 1_000,
    seed: Annotated[int, typer.Option(min=0, help="What the orders are made from.")] = 1,
) -> None:
    """The whole flow on the embedded platform, on real input; fails when any count disagrees."""
    from jobs.demo import demo as run_demo

    run_demo(orders=orders, rate=rate, seed=seed)


@app.command()
def migrate() -> None:
    """Create Postgres tables and Kafka topics that are missing; in emulators, the bucket and the dataset too."""
    from batch.postgres import migrate as migrate_postgres
    from conf.settings import finpro_home, load_settings
    from jobs.local.platform import Platform
    from streaming.kafka import create_topics, orders_kept

    settings = load_settings()
    warn = partial(typer.echo, err=True)
    for name in migrate_postgres(settings.require("postgres_dsn"), on_warning=warn):
        typer.echo(f"applied {name}")
    for name in create_topics(settings):
        typer.echo(f"created topic {name}")
    for wrong in filter(None, orders_kept(settings)):
        warn(f"warning: {wrong}")
    if settings.storage_emulator_host and settings.bigquery_emulator_host:
        emulators = Platform.at(finpro_home())
        emulators.gcs.create_bucket(settings)
        emulators.bigquery.create_datasets(settings)


@app.command()
def up() -> None:
    """Start the embedded Kafka, Postgres, Cloud Storage and BigQuery, and create what finpro needs in them."""
    from jobs.local.platform import up as start

    platform = start()
    for service in platform.services:
        typer.echo(f"{service.daemon.name} runs at {service.address}, its log is {service.daemon.log}")
    for name in platform.outranked():
        typer.echo(f"note: {name} is set elsewhere, and outranks this platform", err=True)


@app.command()
def down() -> None:
    """Stop the embedded platform; its data stay."""
    from jobs.local.platform import down as stop

    stopped = stop()
    typer.echo(f"stopped {', '.join(stopped)}" if stopped else "nothing was running")


@app.command()
def env() -> None:
    """Print how to reach the embedded platform, for a shell: eval "$(finpro env)"."""
    from jobs.local.platform import environment

    for name, value in environment().items():
        typer.echo(f"export {name}={shlex.quote(value)}")


@app.command()
def generate(
    users: Annotated[int, typer.Option(min=0, help="Users 1 to this one.")] = 20_000,
    products: Annotated[int, typer.Option(min=0, help="Products 1 to this one.")] = 1_000,
    seed: Annotated[int, typer.Option(min=0, help="What they are made from; keep it, and larger counts only add.")] = 1,
) -> None:
    """Make users and products and load them into Postgres; the same again changes nothing."""
    from batch.reference_data import generate as generate_reference_data
    from conf.settings import load_settings

    dsn = load_settings().require("postgres_dsn")
    copied: Counter[str] = Counter()

    def show(table: str, rows: int) -> None:
        copied[table] += rows
        typer.echo(f"{table}: {copied[table]:,} rows copied", err=True)

    for loaded in generate_reference_data(dsn, user_count=users, product_count=products, seed=seed, on_rows=show):
        typer.echo(f"{loaded.table}: {loaded.inserted:,} inserted, {loaded.updated:,} updated, {loaded.unchanged:,} unchanged")


@app.command()
def produce(
    orders: Annotated[int, typer.Option(min=0, help="How many orders; 0 is until it is stopped.")] = 20_000,
    rate: Annotated[float, typer.Option(min=0, help="Orders a second; 0 is as fast as it goes.")] = 200.0,
    seed: Annotated[int, typer.Option(min=0, help="Same seed and start, same messages.")] = 1,
    bursts: Annotated[float, typer.Option(min=0, max=1, help="Share of orders that are planted frauds.")] = 0.04,
    broken: Annotated[float, typer.Option(min=0, max=1, help="Messages that break the contract, per order.")] = 0.0,
    duplicates: Annotated[float, typer.Option(min=0, max=1, help="Share of orders that come twice.")] = 0.0,
    start: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%dT%H:%M:%S%z", "%Y-%m-%dT%H:%M:%S.%f%z"], help="First event time.")
    ] = None,
    event_rate: Annotated[float, typer.Option(min=0.001, help="With --rate 0: orders a second of event time.")] = 200.0,
) -> None:
    """Send orders of the users and products in Postgres to Kafka, with planted frauds that carry a label in a header."""
    from conf.settings import load_settings
    from jobs.spark.interruption import stop_on_signal
    from streaming.shop.producer import produce as produce_orders

    settings = load_settings()
    with stop_on_signal() as stop:
        report = produce_orders(
            settings,
            orders=orders,
            rate=rate,
            seed=seed,
            bursts=bursts,
            broken=broken,
            duplicates=duplicates,
            start=start,
            event_rate=event_rate,
            on_progress=lambda progress: typer.echo(str(progress), err=True),
            stop=stop,
        )
    typer.echo(str(report))


@app.command()
def screen(
    available_now: Annotated[bool, typer.Option("--available-now", help="Screen what is there, then end.")] = False,
    trigger: Annotated[str, typer.Option(help='How often a micro-batch starts, such as "1 second".')] = "0 seconds",
    max_offsets_per_trigger: Annotated[int, typer.Option(min=1, help="Most messages in a micro-batch.")] = 150_000,
    starting_offsets: Annotated[
        str, typer.Option(help="earliest, latest, or Spark's JSON of offsets; counts only without a checkpoint.")
    ] = "earliest",
    buckets: Annotated[
        int,
        typer.Option(min=1, help="Tasks that screen side by side; where orders are shuffled, also the parts of all products."),
    ] = 2,
    skip_forgotten: Annotated[
        bool, typer.Option("--skip-forgotten", help="Go on where Kafka has deleted what would come next: it is never screened.")
    ] = False,
    from_bronze: Annotated[
        bool, typer.Option("--from-bronze", help="Rebuild Postgres and the topics from the lakehouse, then end.")
    ] = False,
    master: Master = "local[2,4]",
    memory: Memory = "1g",
    conf: Conf = None,
) -> None:
    """Screen orders for fraud: Kafka `orders` to `processed_orders`, `fraud_alert` and Postgres `raw_orders`."""
    if from_bronze:
        _run("replay", [], master, memory, conf, delta=True)
        return
    arguments = ["--available-now"] if available_now else ["--trigger", trigger]
    arguments += ["--max-offsets-per-trigger", str(max_offsets_per_trigger), "--starting-offsets", starting_offsets]
    arguments += ["--buckets", str(buckets), *(["--skip-forgotten"] if skip_forgotten else [])]
    _run("screen_orders", arguments, master, memory, conf)


@app.command()
def archive(
    available_now: Annotated[bool, typer.Option("--available-now", help="Archive what is there, then end.")] = False,
    trigger: Annotated[str, typer.Option(help='How often a micro-batch starts, such as "1 minute".')] = "10 seconds",
    max_offsets_per_trigger: Annotated[int, typer.Option(min=1, help="Most messages in a micro-batch.")] = 200_000,
    tasks: Annotated[int, typer.Option(min=1, help="Tasks that write a table; the most files a day gets at once.")] = 2,
    skip_forgotten: Annotated[
        bool, typer.Option("--skip-forgotten", help="With a new checkpoint: leave out what Kafka has forgotten.")
    ] = False,
    master: Master = "local[2,4]",
    memory: Memory = "1g",
    conf: Conf = None,
) -> None:
    """Archive orders, verdicts and dead letters: from Kafka into the Delta tables of the lakehouse, each exactly once."""
    arguments = ["--available-now"] if available_now else ["--trigger", trigger]
    arguments += ["--max-offsets-per-trigger", str(max_offsets_per_trigger), "--tasks", str(tasks)]
    arguments += ["--skip-forgotten"] if skip_forgotten else []
    _run("archive_orders", arguments, master, memory, conf, delta=True)


@app.command()
def audit(
    since: Annotated[str | None, typer.Option(help="Event time, an ISO 8601 date or timestamp; by default all.")] = None,
    until: Annotated[str | None, typer.Option(help="Event time, not included; by default all.")] = None,
    repair: Annotated[bool, typer.Option("--repair", help="Announce what is missing; nothing is taken back.")] = False,
    limit: Annotated[int, typer.Option(min=0, help="Most differences to show.")] = 20,
    output: Annotated[
        str | None, typer.Option(help="Write all differences there: a folder of Parquet files, of CSV where it ends in .csv.")
    ] = None,
    master: Master = "local[*,4]",
    memory: Memory = "1g",
    conf: Conf = None,
) -> None:
    """Give every verdict again from the lakehouse, and show each that differs with its cause; fails when one has none."""
    options = {"--since": since, "--until": until, "--output": output}
    arguments = [part for name, value in options.items() if value is not None for part in (name, value)]
    arguments += ["--limit", str(limit), *(["--repair"] if repair else [])]
    _run("audit", arguments, master, memory, conf, delta=True)


@app.command()
def backtest(
    rules: Annotated[Path, typer.Option(help="The candidate: a rules file such as conf/fraud_rules.toml.")],
    since: Annotated[str | None, typer.Option(help="Event time, an ISO 8601 date or timestamp; by default all.")] = None,
    until: Annotated[str | None, typer.Option(help="Event time, not included; by default all.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Where to write the page; by default backtest.html in finpro's home.")
    ] = None,
    examples: Annotated[int, typer.Option(min=0, help="Most orders to show of each rule and kind.")] = 3,
    outcomes_until: Annotated[
        str | None, typer.Option(help="Only what was decided about orders until then counts, ISO 8601; by default all.")
    ] = None,
    master: Master = "local[*,4]",
    memory: Memory = "1g",
    conf: Conf = None,
) -> None:
    """Try rules on the lakehouse's history: what they would hit and change, as a table and as one HTML page."""
    options = {"--rules": rules, "--since": since, "--until": until, "--output": output, "--examples": examples}
    options["--outcomes-until"] = outcomes_until
    arguments = [part for name, value in options.items() if value is not None for part in (name, str(value))]
    _run("backtest", arguments, master, memory, conf, delta=True)


@rules_app.command("test")
def rules_test(
    rules: Annotated[Path | None, typer.Argument(help="A rules file; by default that of the settings.")] = None,
) -> None:
    """Try the examples that stand beside the rules: orders that must be hit, and orders that must not."""
    from conf.settings import load_settings
    from streaming.rules.examples import tried

    typer.echo(tried(rules or load_settings().rules))


@rules_app.command("propose")
def rules_propose(
    rules: Annotated[Path, typer.Argument(help="The proposed rules file.")],
    days: Annotated[int, typer.Option(min=1, help="How many local days of history to try them on, today the last.")] = 28,
    capacity: Annotated[int | None, typer.Option(min=0, help="Alerts that people can look at on a day; for the page.")] = None,
    max_alerts: Annotated[int | None, typer.Option(min=0, help="Fail where any day has more alerts.")] = None,
    min_precision: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Fail where less of all alerts, or of the new ones, are known as frauds."),
    ] = None,
    by: By = None,
    output: Annotated[
        Path | None, typer.Option(help="Where to write the page; by default proposal.html in finpro's home.")
    ] = None,
    master: Master = "local[*,4]",
    memory: Memory = "1g",
    conf: Conf = None,
) -> None:
    """Check rules, try their examples and the last days of history, and write one page: what they would do, and change."""
    limits = {"--capacity": capacity, "--max-alerts": max_alerts, "--min-precision": min_precision}
    options = {"--days": days, "--by": _who(by), "--output": output, **limits}
    arguments = [part for name, value in options.items() if value is not None for part in (name, str(value))]
    _run("rules/propose", [str(rules), *arguments], master, memory, conf, delta=True)


@rules_app.command("promote")
def rules_promote(
    rules: Annotated[Path, typer.Argument(help="A rules file that was proposed, exactly as it stands.")],
    why: Why,
    by: By = None,
    despite: Annotated[
        str | None, typer.Option(help="Although it does not keep a limit: the reason, kept in the record.")
    ] = None,
) -> None:
    """Put proposed rules in force: FINPRO_RULES is replaced at once, and `finpro screen` takes it up."""
    from conf.settings import load_settings
    from streaming.rules.promotion import promote

    settings = load_settings()
    despite = _said("--despite", despite) if despite is not None else None
    version = promote(settings, rules, by=_who(by), why=_said("--why", why), despite=despite)
    typer.echo(f"rules version {version} is in force: {settings.rules}; a running `finpro screen` takes it up")


@rules_app.command("history")
def rules_history() -> None:
    """Every version of the rules that was in force: since when, by whom, and why; also when one was applied to past orders."""
    from conf.settings import load_settings
    from streaming.rules.promotion import known_history, told
    from streaming.rules.proposals import applications, record_of

    settings = load_settings()
    with record_of(settings.require("postgres_dsn")) as cursor:
        applied = applications(cursor)
    typer.echo(told(known_history(settings), applied))


@rules_app.command("diff")
def rules_diff(
    before: Annotated[str, typer.Argument(help="A version of the history, or a rules file.")],
    after: Annotated[str | None, typer.Argument(help="Another one; by default the file in force.")] = None,
) -> None:
    """What differs between two versions of the rules, by rule and field."""
    from conf.rules import load_rules
    from conf.settings import load_settings
    from streaming.rules.differences import differences, in_words
    from streaming.rules.promotion import known_history, of_version_or_file

    settings = load_settings()
    versions = known_history(settings)
    old = of_version_or_file(before, versions)
    new = of_version_or_file(after, versions) if after else load_rules(settings.rules)
    typer.echo(f"rules {old.version} -> {new.version}")
    typer.echo("\n".join(in_words(differences(old, new))) or "they say the same")


@rules_app.command("revert")
def rules_revert(
    why: Why,
    to: Annotated[str | None, typer.Argument(help="A version of the history; by default the one before.")] = None,
    by: By = None,
    version: Annotated[
        str | None, typer.Option(help="The name of the new version; by default that of the rules, with -again behind it.")
    ] = None,
) -> None:
    """Put rules in force again that were so before, under a new version; no proposal is asked for."""
    from conf.settings import load_settings
    from streaming.rules.promotion import revert

    settings = load_settings()
    back, new = revert(settings, to, by=_who(by), why=_said("--why", why), version=version)
    typer.echo(f"rules version {new} is in force, the rules of {back}: {settings.rules}; a running `finpro screen` takes it up")


@rules_app.command("apply")
def rules_apply(
    since: Annotated[str, typer.Option(help="Event time, an ISO 8601 date or timestamp: orders of then and later.")],
    why: Annotated[
        str | None, typer.Option(help="The reason, kept in the record; it has to be given, but for --dry-run.")
    ] = None,
    until: Annotated[str | None, typer.Option(help="Event time, not included; by default all.")] = None,
    max_alerts: Annotated[
        int | None, typer.Option(min=0, help="Fail, and announce nothing, where more orders would get further reasons.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what is new, and announce nothing.")] = False,
    by: By = None,
    master: Master = "local[*,4]",
    memory: Memory = "1g",
    conf: Conf = None,
) -> None:
    """Screen orders of before by the rules in force, and announce what is new; interrupted, the same command goes on."""
    if why is None and not dry_run:
        raise SettingsError("--why is missing: say, in a few words, why rules are applied to orders of before.")
    said = None if why is None else _said("--why", why)
    options = {"--since": since, "--until": until, "--max-alerts": max_alerts, "--by": _who(by), "--why": said}
    arguments = [part for name, value in options.items() if value is not None for part in (name, str(value))]
    _run("rules/apply", [*arguments, *(["--dry-run"] if dry_run else [])], master, memory, conf, delta=True)


@outcomes_app.command("add")
def outcomes_add(
    file: Annotated[
        Path, typer.Argument(help="CSV with a header (.csv) or JSON Lines: order_id, outcome, reviewed_by, decided_at, reason.")
    ],
) -> None:
    """Append what a file says about orders, fraud or genuine: all of it, or nothing where a line is wrong."""
    from batch.outcomes import add_file
    from conf.settings import load_settings

    typer.echo(str(add_file(load_settings().require("postgres_dsn"), file)))


@outcomes_app.command("take")
def outcomes_take(
    skip_forgotten: Annotated[
        bool, typer.Option("--skip-forgotten", help="Go on where Kafka has deleted what was never taken.")
    ] = False,
) -> None:
    """Take what the topic order_outcomes has by now: statements into Postgres, each once; a broken one with its reason."""
    from conf.settings import load_settings
    from streaming.outcomes_topic import take

    typer.echo(str(take(load_settings(), skip_forgotten=skip_forgotten)))


@app.command()
def maintain(
    force: Annotated[
        bool, typer.Option("--force", help="Obey a retention of 0 days, which breaks what others are reading.")
    ] = False,
    master: Master = "local[2,4]",
    memory: Memory = "1g",
    conf: Conf = None,
) -> None:
    """Compact the lakehouse, order it by time, and delete what it has not needed for longer than the retention."""
    _run("maintain_lakehouse", ["--force"] if force else [], master, memory, conf, delta=True)


@app.command()
def forget(
    user: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="Who is to be forgotten; repeatable. Default: all who were, once more, wherever they came back."
        ),
    ] = None,
    request: Annotated[
        str | None, typer.Option(help="What asks for it, such as a ticket's number; kept in the record.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be erased, and erase nothing.")] = False,
    master: Master = "local[2,4]",
    memory: Memory = "1g",
    conf: Conf = None,
) -> None:
    """Forget a person: name, email, phone number and what came with their orders, in every place, for good."""
    arguments = [part for user_id in user or () for part in ("--user", str(user_id))]
    arguments += ["--request", request] if request else []
    _run("forget", [*arguments, *(["--dry-run"] if dry_run else [])], master, memory, conf, delta=True)


@app.command("export")
def export_raw(
    full: Annotated[bool, typer.Option("--full", help="Export every row, not only what changed since the last run.")] = False,
    since: Annotated[
        datetime | None,
        typer.Option(
            formats=["%Y-%m-%dT%H:%M:%S%z", "%Y-%m-%d"], help="Export again what has changed since then (a day: UTC)."
        ),
    ] = None,
    run_id: Annotated[str | None, typer.Option(help="Name of the run; by default the time, such as 20261122T170000Z.")] = None,
    master: Master = "local[*,4]",
    memory: Memory = "512m",
    conf: Conf = None,
) -> None:
    """Export the raw tables: Postgres, one snapshot, to Parquet files in Cloud Storage; a finished run is left as it is."""
    from jobs import export_raw as job
    from jobs.spark.driver import become_driver

    arguments = ["--full"] if full else []
    arguments += ["--since", since.isoformat()] if since else []
    arguments += ["--run-id", run_id] if run_id else []
    job.main(arguments, partial(become_driver, "export_raw", master=master, memory=memory, conf=conf or []))


@app.command()
def load(
    run_id: Annotated[str | None, typer.Option(help="A finished export; by default the newest.")] = None,
) -> None:
    """Load an export, and earlier ones that it builds on, into BigQuery's raw tables; what is loaded already stays."""
    from batch.warehouse.bigquery import load as load_run
    from conf.settings import load_settings

    def show(loaded: "LoadedTable") -> None:
        deleted = f", {loaded.deleted:,} deleted" if loaded.deleted else ""
        typer.echo(f"{loaded.table}: {loaded.rows:,} rows of run {loaded.run_id} merged{deleted}")

    runs = load_run(load_settings(), run_id, on_table=show)
    typer.echo(f"loaded {', '.join(runs)}" if runs else "nothing to load: the raw tables hold this run already")


@app.command()
def reconcile(
    run_id: Annotated[str | None, typer.Option(help="A finished export; by default the newest.")] = None,
    dag_id: Annotated[
        str, typer.Option(help="Who asks, kept in ingestion_monitoring.", envvar="AIRFLOW_CTX_DAG_ID")
    ] = "manual",
    whole: Annotated[
        bool, typer.Option("--whole", help="All of raw_orders, in Postgres too, not only the days that the run changed.")
    ] = False,
    notify: Notify = False,
) -> None:
    """Compare BigQuery's raw tables with the export's snapshot of Postgres; fails when a row or a figure differs."""
    from batch.warehouse.monitoring import Finding
    from batch.warehouse.reconcile import reconcile as reconcile_run
    from batch.warehouse.reconcile import require_consistent
    from conf.settings import load_settings
    from jobs.notify.notices import consistency
    from jobs.notify.notifications import announced

    settings = load_settings()
    with announced(settings, "reconcile", wanted=notify) as tell:
        found = reconcile_run(settings, run_id, dag_id, whole=whole)
        typer.echo(f"{'table':<14}{'Postgres':>14}{'BigQuery':>14}  run {found[0].run_id}")
        for one in found:
            typer.echo(f"{one.table_name:<14}{one.source.rows:>14,}{one.destination.rows:>14,}  {one.status}, {one.compared}")
        tell(consistency([Finding.of(one) for one in found]))
        require_consistent(found)


@app.command()
def transform(
    run_id: Annotated[
        str | None, typer.Option(help="The export that the raw tables must show; by default the newest. It must be Consistent.")
    ] = None,
    full_refresh: Annotated[bool, typer.Option("--full-refresh", help="Build all days of the fact anew.")] = False,
    select: Annotated[list[str] | None, typer.Option(help="What to build, in dbt's words; repeatable. Default: all.")] = None,
    notify: Notify = False,
) -> None:
    """Build and test the marts from the raw tables in BigQuery, with dbt, and write their documentation."""
    from conf.settings import load_settings
    from jobs.notify.notices import command_ended
    from jobs.notify.notifications import announced
    from jobs.transform import docs_page
    from jobs.transform import transform as run_dbt

    settings = load_settings()
    with announced(settings, "transform", wanted=notify) as tell:
        built = run_dbt(settings, run_id=run_id, full_refresh=full_refresh, select=tuple(select or ()), say=typer.echo)
        tell(command_ended("transform", run_id=built))
    typer.echo(f"the models are described in {docs_page()}")


@app.command()
def validate(
    run_id: Annotated[str | None, typer.Option(help="A finished export; by default the newest.")] = None,
    notify: Notify = False,
) -> None:
    """Check the raw tables in BigQuery against what they have to be, and publish data docs; the gate before `transform`."""
    from conf.settings import load_settings
    from jobs.notify.notices import command_ended
    from jobs.notify.notifications import announced
    from jobs.validate import validate as check_tables

    settings = load_settings()
    with announced(settings, "validate", wanted=notify) as tell:
        checked = check_tables(settings, run_id, say=typer.echo)
        tell(command_ended("validate", run_id=checked.run_id))


@notify_app.command("digest")
def notify_digest(
    hours: Annotated[int, typer.Option(min=1, max=48, help="How many full hours, up to the last one.")] = 1,
) -> None:
    """Send orders, frauds and counts by reason of the last full hour: what a scheduler runs once an hour."""
    from conf.settings import load_settings
    from jobs.notify.notices import fraud_digest
    from jobs.notify.notifications import send

    settings = load_settings()
    send(settings, fraud_digest(settings, hours=hours))


@notify_app.command("consistency")
def notify_consistency(
    run_id: Annotated[str | None, typer.Option(help="A reconciled run; by default the newest.")] = None,
) -> None:
    """Send what reconciliation found for each table of a run."""
    from conf.settings import load_settings
    from jobs.notify.notices import run_consistency
    from jobs.notify.notifications import send

    settings = load_settings()
    send(settings, run_consistency(settings, run_id))


@app.command()
def airflow() -> None:
    """Run Airflow with finpro's DAGs on this machine, over the embedded platform, until Ctrl-C."""
    from jobs.airflow.server import run_airflow
    from jobs.spark.interruption import stop_on_signal

    with stop_on_signal() as stop:
        run_airflow(stop=stop, say=typer.echo)


@app.command()
def report(
    output: Annotated[Path | None, typer.Option(help="Where to write it; by default report.html in finpro's home.")] = None,
    locale: Annotated[str, typer.Option(help="How numbers and dates are written, such as en, en_ID or id.")] = "en",
) -> None:
    """Write what the marts say as one HTML page that opens without a network."""
    from conf.settings import load_settings
    from jobs.report import write_report

    typer.echo(f"the report is {write_report(load_settings(), output, locale=locale)}")


@app.command()
def status(
    watch: Annotated[bool, typer.Option("--watch", help="Show it live, until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(min=1, help="With --watch: seconds between two looks.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="For a script: one JSON object.")] = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that a part has to answer.")] = 15,
    textfile: Annotated[
        Path | None, typer.Option(help="Write metrics there, for the collector textfile of Prometheus' node exporter.")
    ] = None,
) -> None:
    """Show the health of the whole platform; exit code 1 when something is down."""
    from conf.settings import load_settings
    from jobs.health import status as platform

    settings = load_settings()
    if watch:
        parts = platform.watch(settings, timeout_seconds=timeout, every_seconds=every)
    else:
        parts = platform.health(settings, timeout_seconds=timeout)
    if textfile:
        from jobs.health.textfile import write_metrics

        write_metrics(textfile, parts)
    if as_json:
        typer.echo(platform.as_json(parts))
    else:
        from rich.console import Console

        Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(platform.as_table(parts))
    raise typer.Exit(int(platform.is_down(parts)))


def _who(by: str | None) -> str:
    """Who a record names."""
    if by is not None:
        return _said("--by", by)
    try:
        return getpass.getuser()
    except (KeyError, OSError) as error:  # as in a container whose user has no name
        raise SettingsError("This login has no name: say with --by who does it.") from error


def _said(option: str, text: str) -> str:
    """What a record keeps of a person's words, which may not be blank."""
    text = text.strip()
    if not text or not text.isprintable():  # what is no text, or another line in the history, is not
        raise SettingsError(f"{option} says nothing that can be kept: write a few words, in one line.")
    return text


def _run(job: str, arguments: list[str], master: str, memory: str, conf: list[str] | None, *, delta: bool = False) -> None:
    """Run `jobs/<job>.py` as the driver of its Spark."""
    from jobs.spark.driver import run_job

    def work() -> None:
        import_module(f"jobs.{job.replace('/', '.')}").main(arguments)

    run_job(job, work, master=master, memory=memory, conf=conf or [], delta=delta)


def run(arguments: list[str]) -> int:
    """Run the command; an error a person can act on is one message and an exit code, not a stack trace."""
    try:
        app(arguments, prog_name="finpro")
    except FinproError as error:
        if "--debug" in arguments:
            raise
        typer.echo(f"finpro: {error}", err=True)
        return error.exit_code
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def main() -> None:
    """The `finpro` command."""
    bypass_proxies()
    sys.exit(run(sys.argv[1:]))
