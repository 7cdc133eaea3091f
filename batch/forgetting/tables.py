"""BigQuery: pseudonyms in every table of the three datasets that says who a user is, the history of users among them.

Of their orders the declared fields go.

Which tables these are is asked, not known: dimensions, marts, history in all its states, rows that broke a test, staging.
"""

from collections.abc import Collection, Iterator

from google.api_core.exceptions import NotFound
from google.cloud.bigquery import ArrayQueryParameter, QueryJobConfig, ScalarQueryParameter, Table

from batch.bigquery import Client
from batch.forgotten import ATTRIBUTES, PERSONAL
from batch.google_cloud import bigquery_client, explained, open_dataset
from conf.settings import DATASETS, Settings


def forget_in_tables(settings: Settings, users: Collection[int], *, dry_run: bool) -> dict[str, int]:
    """Put pseudonyms in the place of what BigQuery's tables hold of these users: `dataset.table` → rows that held somebody.

    Raises:
        SettingsError: no project is set.
        GoogleCloudError: a dataset is missing, BigQuery refuses or does not answer.
    """
    client, found = bigquery_client(settings, "forget"), dict[str, int]()
    with explained(settings):
        for table, columns in _tables(settings, client):
            rows = _forget_in(client, f"{table.project}.{table.dataset_id}.{table.table_id}", columns, users, dry_run=dry_run)
            if rows:
                found[f"{table.dataset_id}.{table.table_id}"] = rows
    return found


def _tables(settings: Settings, client: Client) -> Iterator[tuple[Table, list[str]]]:
    """The tables that have a user's number beside something personal, and which columns those are."""
    for setting in DATASETS:
        for listed in client.list_tables(open_dataset(settings, client, setting)):
            if listed.table_type != "TABLE":  # a view shows what is in tables
                continue
            try:
                table = client.get_table(listed.reference)
            except NotFound:  # staging that was dropped meanwhile
                continue
            names = {field.name for field in table.schema}
            if "user_id" in names and (personal := [column for column in (*PERSONAL, ATTRIBUTES) if column in names]):
                yield table, personal


def _forget_in(client: Client, table: str, columns: list[str], users: Collection[int], *, dry_run: bool) -> int:
    """The number of rows of a table that held somebody."""
    named = [column for column in columns if column != ATTRIBUTES]
    texts = {column: f"concat(@{column}_before, cast(user_id as string), @{column}_after)" for column in named}
    held_by = [f"`{column}` != {text}" for column, text in texts.items()]  # what is null says nothing
    is_held = " or ".join([*held_by, *(f"`{column}` is not null" for column in columns if column == ATTRIBUTES)])
    where = f"user_id in unnest(@users) and ({is_held})"
    config = QueryJobConfig(
        use_query_cache=False,
        query_parameters=[
            ArrayQueryParameter("users", "INT64", sorted(users)),
            *(
                ScalarQueryParameter(f"{column}_{side}", "STRING", getattr(PERSONAL[column], side))
                for column in named
                for side in ("before", "after")
            ),
        ],
    )
    (row,) = client.query(f"select count(*) as held from `{table}` where {where}", job_config=config).result()
    held = int(row["held"])
    if held and not dry_run:
        changes = [f"`{column}` = if(`{column}` is null, null, {text})" for column, text in texts.items()]
        changes += [f"`{column}` = null" for column in columns if column == ATTRIBUTES]
        client.query(f"update `{table}` set {', '.join(changes)} where {where}", job_config=config).result()
    return held
