"""Connections to Postgres by which rows travel as Arrow: ADBC's own, without its DB-API.

That imports pandas, which takes a Python worker a third of its start.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import adbc_driver_manager
import adbc_driver_postgresql
import pyarrow as pa
from adbc_driver_manager import AdbcConnection, AdbcDatabase, AdbcStatement, AdbcStatusCode, StatementOptions

from batch.sessions import ARRIVAL, Limits, arrived, dial, trouble
from conf.errors import PostgresError


class ArrowSession(NamedTuple):
    """An open connection (autocommit), in the schema of finpro's tables.

    Attributes:
        connection: ADBC's.
        at_begin: see `sessions.Arrival`.
    """

    connection: AdbcConnection
    at_begin: str

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()


class ArrowCursor:
    """Statements on a connection, one after the other. What Postgres refuses is raised as ADBC's own error."""

    def __init__(self, connection: AdbcConnection) -> None:
        self._connection = connection

    def execute(self, query: str, values: Sequence[str] = ()) -> pa.Table:
        """Run a query; `values` are its parameters, `$1` and so on, as texts."""
        with AdbcStatement(self._connection) as statement:
            statement.set_sql_query(query)
            if values:
                statement.prepare()
                names = [str(place) for place in range(len(values))]
                statement.bind(pa.record_batch([pa.array([value]) for value in values], names=names))
            stream, _rows = statement.execute_query()
            try:
                return pa.RecordBatchReader.from_stream(stream).read_all()
            except OSError as error:  # what ADBC reports between batches, as Arrow passes it on
                raise adbc_driver_manager.OperationalError(str(error), status_code=AdbcStatusCode.IO) from error
            except pa.ArrowException as error:
                raise adbc_driver_manager.DatabaseError(str(error), status_code=AdbcStatusCode.INTERNAL) from error

    def rows(self, query: str, values: Sequence[str] = ()) -> list[tuple[Any, ...]]:
        """The rows of a query, as Python's values."""
        return list(zip(*(column.to_pylist() for column in self.execute(query, values).columns), strict=True))

    def execute_each(self, command: str, values: pa.RecordBatch) -> None:
        """Run a command once for each row of `values`, whose columns are its parameters."""
        with AdbcStatement(self._connection) as statement:
            statement.set_sql_query(command)
            statement.prepare()
            statement.bind(values)
            statement.execute_update()

    def copy(self, table: str, rows: pa.Table, *, temporary: bool = False) -> None:
        """Append rows to a table, columns by name."""
        with AdbcStatement(self._connection) as statement:
            statement.set_options(
                **{
                    StatementOptions.INGEST_TARGET_TABLE.value: table,
                    StatementOptions.INGEST_MODE.value: "adbc.ingest.mode.append",
                    StatementOptions.INGEST_TEMPORARY.value: str(temporary).lower(),
                }
            )
            statement.bind_stream(rows)
            statement.execute_update()


def open_arrow_session(dsn: str, *, application_name: str, limits: Limits) -> ArrowSession:
    """Open a connection.

    Raises:
        PostgresError: as `batch.postgres.open_connection`.
    """
    connection = dial(dsn, application_name, limits, _connected, adbc_driver_manager.Error)
    try:
        cursor = ArrowCursor(connection)
        arrival = arrived(dsn, next(iter(cursor.rows(ARRIVAL)), ()), limits)
        if arrival.at_once:
            cursor.execute(arrival.at_once)
    except adbc_driver_manager.Error as error:
        connection.close()
        raise reported(dsn, error) from error
    except BaseException:
        connection.close()
        raise
    return ArrowSession(connection, arrival.at_begin)


@contextmanager
def arrow_session(dsn: str, *, application_name: str, limits: Limits) -> Iterator[ArrowSession]:
    """An open connection for one block.

    Raises:
        PostgresError: as `batch.postgres.open_connection`.
    """
    session = open_arrow_session(dsn, application_name=application_name, limits=limits)
    try:
        yield session
    finally:
        session.close()


def reported(dsn: str, error: adbc_driver_manager.Error) -> PostgresError:
    """What ADBC reports, as an error of this family that says where it was and what to do."""
    is_away = isinstance(error, adbc_driver_manager.OperationalError)
    return trouble(dsn, str(error), error.sqlstate, is_away=is_away)


def _connected(conninfo: str) -> AdbcConnection:
    return AdbcConnection(_database(conninfo))


@lru_cache(maxsize=4)
def _database(conninfo: str) -> AdbcDatabase:
    """What ADBC knows of a database: it holds no connection, and to ask for all types there takes it 40 ms of the processor."""
    database: AdbcDatabase = adbc_driver_postgresql.connect(conninfo)
    return database
