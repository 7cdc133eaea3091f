"""Connections to Postgres by which rows travel as Arrow: ADBC's own, without its DB-API, which imports pandas and polars."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import adbc_driver_manager
import adbc_driver_postgresql
import pyarrow as pa
from adbc_driver_manager import AdbcConnection, AdbcDatabase, AdbcStatement

from batch.sessions import ARRIVAL, Limits, arrived, dial, trouble
from conf.errors import PostgresError


class ArrowSession(NamedTuple):
    """An open connection (autocommit), in the schema of finpro's tables.

    Attributes:
        database, connection: ADBC's, to be closed in the other order.
        at_begin: see `sessions.Arrival`.
    """

    database: AdbcDatabase
    connection: AdbcConnection
    at_begin: str

    def close(self) -> None:
        """Close both."""
        self.connection.close()
        self.database.close()


def open_arrow_session(dsn: str, *, application_name: str, limits: Limits) -> ArrowSession:
    """Open a connection.

    Raises:
        PostgresError: as `batch.postgres.open_connection`.
    """
    database, connection = dial(dsn, application_name, limits, _connected, adbc_driver_manager.Error)
    try:
        arrival = arrived(dsn, _row(connection, ARRIVAL), limits)
        if arrival.at_once:
            _row(connection, arrival.at_once)
    except adbc_driver_manager.Error as error:
        ArrowSession(database, connection, "").close()
        raise reported(dsn, error) from error
    except BaseException:
        ArrowSession(database, connection, "").close()
        raise
    return ArrowSession(database, connection, arrival.at_begin)


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


def _connected(conninfo: str) -> tuple[AdbcDatabase, AdbcConnection]:
    database = adbc_driver_postgresql.connect(conninfo)
    try:
        return database, AdbcConnection(database)
    except BaseException:
        database.close()
        raise


def _row(connection: AdbcConnection, query: str) -> tuple[Any, ...]:
    with AdbcStatement(connection) as statement:
        statement.set_sql_query(query)
        stream, _rows = statement.execute_query()
        table = pa.RecordBatchReader.from_stream(stream).read_all()
    return tuple(column[0].as_py() for column in table.columns)
