"""The `finpro` command: what a person starts. Each command imports what it needs when it runs, so that --help is quick."""

import sys
from typing import Annotated

import typer

from conf.errors import FinproError
from conf.settings import load_settings

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback()
def finpro(
    debug: Annotated[bool, typer.Option("--debug", help="Show the stack trace of an error.")] = False,
) -> None:
    """An e-commerce data platform: orders stream in, every one is screened for fraud, and every step proves it lost nothing."""


@app.command()
def migrate() -> None:
    """Create Postgres tables and Kafka topics that are missing."""
    from batch.postgres import migrate as migrate_postgres
    from streaming.kafka import create_topics

    settings = load_settings()
    for name in migrate_postgres(settings.require("postgres_dsn")):
        typer.echo(f"applied {name}")
    for name in create_topics(settings):
        typer.echo(f"created topic {name}")


def main() -> None:
    """Run the command; an error a person can act on is one message and an exit code, not a stack trace."""
    try:
        app()
    except FinproError as error:
        if "--debug" in sys.argv:
            raise
        typer.echo(f"finpro: {error}", err=True)
        sys.exit(error.exit_code)
