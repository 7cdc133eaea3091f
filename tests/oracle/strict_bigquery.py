"""A stricter BigQuery before the emulator, which takes what the real one refuses: for the clients of this process.

Every statement is analyzed as it is sent, with the types of its parameters, over the tables as they are at that moment. Limits
on jobs hold always; other refusals (tests.oracle.bigquery_refusals) come when a test asks for them.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import pytest
import requests
from google.auth.credentials import AnonymousCredentials
from google.cloud.bigquery._http import Connection

from tests.oracle.bigquery_refusals import (
    PARTITIONS_PER_JOB,
    SOURCES_PER_JOB,
    Refusal,
    invalid_query,
    too_many_partitions,
    too_many_sources,
)
from tests.oracle.googlesql import GoogleSql, Parameters, Refused

Json = dict[str, Any]
_Columns = Callable[[str], list[Json] | None]  # of a table, by its full name; None when it is not there
_Rows = Callable[[str], Json | None]  # the answer to a query; None when it fails

_TYPES = {"INTEGER": "int64", "FLOAT": "float64", "BOOLEAN": "bool"}  # the API answers with older names
_TABLES = re.compile(
    r"\b(?:from|join|merge|into|using|update|alter table)\s+((?:`[\w.-]+`|[\w-]+)(?:\.(?:`[\w-]+`|[\w-]+))*)(?=[\s);]|$)",
    re.IGNORECASE,
)
_NOT_FOUND = re.compile(r"Table not found: ([^\s;]+)")
_CHANGING = re.compile(r"[0-9a-f]{8,}|\d+")  # what differs between two runs of one test: names of datasets, ids, times
_COLUMN_LIST = re.compile(r"(?:\s|/\*.*?\*/)*create or replace table\s+\S+\s+\(", re.DOTALL)
_MERGE = re.compile(r"\bmerge\s+(?:into\s+)?(?P<table>\S+)\s+(?:as\s+\w+\s+)?using\s+", re.IGNORECASE)
_CREATE_BY_DAY = re.compile(
    r"\bcreate (?:or replace )?table\s+(?P<table>\S+).*?\bpartition by (?:timestamp_trunc|date)\(`?(?P<field>\w+)`?"
    r".*?\bas\s+(?P<query>\(|select|with)",
    re.IGNORECASE | re.DOTALL,
)
_MOST_DECLARED = 40  # tables: those of a test or two
_REAL = "https://bigquery.googleapis.com"
_JOBS = re.compile(r"(?P<service>.*/bigquery/v2)/projects/(?P<project>[^/?]+)/(?:jobs|queries)(?:\?.*)?")


class Declared:
    """The tables that GoogleSQL was told of. To tell it of another one takes longer than to analyze most statements."""

    def __init__(self) -> None:
        self._tables: dict[str, Mapping[str, str]] = {}
        self._sql = GoogleSql({})

    def with_tables(self, tables: Mapping[str, Mapping[str, str]]) -> GoogleSql:
        """An analyzer that knows these tables as they are now."""
        if any(self._tables.get(name) != columns for name, columns in tables.items()):
            others = self._tables if len(self._tables) < _MOST_DECLARED else {}
            self._tables = {**others, **tables}
            self._sql.close()
            self._sql = GoogleSql(self._tables)
        return self._sql


@dataclass
class StrictBigQuery:
    """What stands between this process's clients and the emulator, once `installed`.

    `refused` are the statements that GoogleSQL does not accept, each with what the analyzer says.
    """

    refused: list[str] = field(default_factory=list)
    _jobs: list[Json] | None = None
    _wanted: list[tuple[Refusal, str]] = field(default_factory=list)
    _emulator: str | None = None
    _by_day: dict[str, str] = field(default_factory=dict)  # table → the column that it is partitioned by
    _accepted: set[str] = field(default_factory=set)
    _declared: Declared = field(default_factory=Declared)
    _lock: Lock = field(default_factory=Lock)  # the analyzer is one instance of WebAssembly

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Look at every request for a job that is sent in this block."""
        send: Any = Connection._do_request

        def inspected(
            connection: Connection, method: str, url: str, headers: Any, data: Any, *others: Any, **named: Any
        ) -> Any:
            if self._emulator:
                url = url.replace(_REAL, self._emulator)
            job = _job(method, url, data)
            if job is None:
                return send(connection, method, url, headers, data, *others, **named)

            def rows(query: str) -> Json | None:
                asked = json.dumps({"query": query, "useLegacySql": False})
                answer = send(connection, "POST", f"{job.service}/queries", headers, asked, *others, **named)
                found = dict(answer.json()) if answer.status_code == requests.codes.ok else {}
                return found if found.get("schema", {}).get("fields") else None  # as of a table that is dropped meanwhile

            def partitioned_by(table: str) -> str | None:
                project, dataset, name = table.split(".")
                place = f"{job.service.removesuffix(job.project)}{project}/datasets/{dataset}/tables/{name}"
                found = send(connection, "GET", place, headers, None, *others, **named).json()
                return str(found["timePartitioning"]["field"]) if found.get("timePartitioning", {}).get("field") else None

            if refusal := self._refusal(job, rows, partitioned_by):
                return refusal.answer(method, url, job.body)
            return send(connection, method, url, headers, self._for_the_emulator(job.body), *others, **named)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Connection, "_do_request", inspected)
            yield

    @contextmanager
    def in_place_of_the_real_one(self, emulator: str) -> Iterator[None]:
        """Lead to the emulator whoever talks to the real BigQuery, with a login that nobody looks at."""

        def anybody(*_: Any, **__: Any) -> tuple[AnonymousCredentials, None]:
            return AnonymousCredentials(), None  # type: ignore[no-untyped-call]

        with pytest.MonkeyPatch.context() as patch:
            for place in ("google.auth", "dbt.adapters.bigquery.credentials"):  # who imports it by name has it by then
                patch.setattr(f"{place}.default", anybody)
            patch.setattr(Connection, "get_api_base_url_for_mtls", lambda *_: emulator)  # where files are uploaded
            self._emulator = emulator
            yield
        self._emulator = None

    def _for_the_emulator(self, body: Json) -> str:
        """A job as the emulator takes it: without the columns that CREATE TABLE AS may name before its query."""
        body = deepcopy(body)
        query = body.get("configuration", {}).get("query", {})
        if self._emulator and (found := _COLUMN_LIST.match(query.get("query", ""))):
            columns = _first_operand(query["query"][found.end() - 1 :])
            query["query"] = query["query"].replace(columns, "", 1)
        return json.dumps(body)

    @contextmanager
    def listening(self) -> Iterator[list[Json]]:
        """The configurations of the jobs that are sent in this block."""
        self._jobs = []
        try:
            yield self._jobs
        finally:
            self._jobs = None

    @contextmanager
    def refusing(self, refusal: Refusal, word: str, times: int = 1) -> Iterator[None]:
        """Refuse the first jobs of this block that have the word in their configuration."""
        wanted = [(refusal, word)] * times
        self._wanted += wanted
        try:
            yield
            assert not set(wanted) & set(self._wanted), f"there were not {times} jobs with {word!r} in them"
        finally:
            self._wanted = [one for one in self._wanted if one not in wanted]

    def _refusal(self, job: "_Job", rows: _Rows, partitioned_by: Callable[[str], str | None]) -> Refusal | None:
        """What BigQuery has against a job; None when it would take it."""
        if self._jobs is not None:
            self._jobs.append(job.configuration)
        for wanted in self._wanted:
            if wanted[1] in json.dumps(job.configuration):
                self._wanted.remove(wanted)
                return wanted[0]
        sources = len(job.configuration.get("load", {}).get("sourceUris", []))
        if sources > SOURCES_PER_JOB:
            return too_many_sources(sources)
        query = job.configuration.get("query")
        if not query or query.get("useLegacySql") is True:
            return None
        return self._analyzed(job, query, rows) or self._too_many_days(job, query["query"], rows, partitioned_by)

    def _too_many_days(
        self, job: "_Job", statement: str, rows: _Rows, partitioned_by: Callable[[str], str | None]
    ) -> Refusal | None:
        """What BigQuery says to a MERGE or CREATE TABLE AS that brings too many days into a table partitioned by day."""
        if create := _CREATE_BY_DAY.search(statement):
            field: str | None = create["field"]
            self._by_day[_full_name(create["table"], job.project)] = create["field"]  # which the emulator does not tell of
            source = f"({statement[create.start('query') :].rstrip().removesuffix(';')})"
        elif merge := _MERGE.search(statement):
            table = _full_name(merge["table"], job.project)
            field = self._by_day.get(table) or partitioned_by(table)
            source = _first_operand(statement[merge.end() :])
        else:
            return None
        counted = rows(f"select count(distinct date({field})) as days from {source}") if field else None
        days = int(counted["rows"][0]["f"][0]["v"]) if counted and counted.get("rows") else 0
        return too_many_partitions(days) if days > PARTITIONS_PER_JOB else None

    def _analyzed(self, job: "_Job", query: Json, rows: _Rows) -> Refusal | None:
        def columns(table: str) -> list[Json] | None:
            # The emulator's own description of a table forgets the columns that were added to it.
            found = rows(f"select * from `{table}` where false")
            return list(found["schema"]["fields"]) if found else None

        statement, parameters = query["query"], _parameters(query.get("queryParameters", []))
        seen = _CHANGING.sub("0", f"{statement} {parameters}")
        with self._lock:
            if seen in self._accepted:
                return None
            try:
                analyze(statement, parameters, job.project, columns, self._declared)
            except Refused as refused:
                self.refused.append(f"{refused}\n{statement}")
                return invalid_query(str(refused).removeprefix("[INVALID_ARGUMENT] "))
            self._accepted.add(seen)
        return None


@dataclass(frozen=True)
class _Job:
    """A job that a request asks for."""

    service: str
    project: str
    body: Json

    @property
    def configuration(self) -> Json:
        """Of a query that is sent without being called a job, too."""
        return dict(self.body.get("configuration", {"query": self.body}))


def _job(method: str, url: str, data: Any) -> _Job | None:
    place = _JOBS.fullmatch(url)
    if method != "POST" or place is None:
        return None
    return _Job(f"{place['service']}/projects/{place['project']}", place["project"], json.loads(data))


def _full_name(written: str, project: str) -> str:
    """Project, dataset and name of a table, however a statement of a client of that project writes them."""
    parts = written.replace("`", "").split(".")
    return ".".join(parts if len(parts) > 2 else [project, *parts])


def analyze(statement: str, parameters: Parameters, project: str, columns: _Columns, declared: Declared) -> None:
    """Analyze a statement over those of its tables that are there; one that names another is for the server to refuse.

    Raises:
        Refused: GoogleSQL does not accept the statement; says where and why.
    """
    tables: dict[str, Mapping[str, str]] = {}

    def resolved(statement: str, name: str) -> str | None:
        """The statement with a table's name in one word, under which the table is in `tables`; None when it is not there."""
        path = name.replace("`", "").split(".")
        found = columns(_full_name(name, project)) if len(path) > 1 and "INFORMATION_SCHEMA" not in path else None
        if not found:  # or what BigQuery tells of itself
            return None
        known = f"{path[-2]}__{path[-1]}"
        alike = _CHANGING.sub("0", known)  # the name of other tests' table as well, which is declared already
        known = known if alike in tables else alike
        tables[known] = {column["name"]: _type(column) for column in found}
        return _spellings(path).sub(f"`{known}`", statement)

    for name in set(_TABLES.findall(statement)):  # most are found by where they stand: that saves analyzing for each
        statement = resolved(statement, name) or statement
    while True:
        try:
            declared.with_tables(tables).require_accepted(statement, parameters)
        except Refused as refused:
            missing = _NOT_FOUND.search(str(refused))
            if missing is None:
                raise
            with_it = resolved(statement, missing[1])
            if with_it is None:
                return
            statement = with_it
        else:
            return


def _first_operand(text: str) -> str:
    """The brackets, or else the word, that a text begins with."""
    depth = 0
    for position, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0 and text[0] == "(":
            return text[: position + 1]
    return text.split(maxsplit=1)[0]


def _spellings(path: list[str]) -> re.Pattern[str]:
    """A table's name, however its parts are quoted, together or one by one."""
    return re.compile(r"\.".join(f"`?{re.escape(part)}`?" for part in path) + r"(?![\w`])")


def _type(column: Json) -> str:
    kind = _TYPES.get(column["type"], str(column["type"]).lower())
    return f"array<{kind}>" if column.get("mode") == "REPEATED" else kind


def _parameters(sent: list[Json]) -> Parameters:
    types = [(one.get("name"), _parameter_type(one["parameterType"])) for one in sent]
    if all(name is None for name, _ in types):
        return [kind for _, kind in types]
    return {str(name): kind for name, kind in types}


def _parameter_type(sent: Json) -> str:
    return f"array<{_parameter_type(sent['arrayType'])}>" if sent["type"] == "ARRAY" else str(sent["type"]).lower()
