"""The one exception family: every message a person may see says what happened and what to do about it."""


class FinproError(Exception):
    """Something a person can act on. The command line prints it without a stack trace and exits with `exit_code`."""

    exit_code = 1


class SettingsError(FinproError):
    """A setting is missing or unreadable."""

    exit_code = 2


class RulesError(FinproError):
    """The fraud rules file is missing or breaks its schema."""

    exit_code = 2


class KafkaError(FinproError):
    """Kafka is unreachable, refuses, or lacks a topic."""

    exit_code = 3


class PostgresError(FinproError):
    """Postgres is unreachable, refuses, or lacks a table."""

    exit_code = 4


class PostgresUnavailable(PostgresError):
    """Postgres does not answer now: worth another try."""


class PlatformError(FinproError):
    """The embedded platform could not be started or stopped."""

    exit_code = 5


class StreamingError(FinproError):
    """A streaming query failed for a reason that none of the others names."""

    exit_code = 7


class MicroBatchReplay(StreamingError):
    """A micro-batch has to be read and screened once more, from its checkpoint: the query starts again by itself."""


class ReconciliationError(FinproError):
    """Two counts that must agree do not."""

    exit_code = 6
