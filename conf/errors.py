"""The one exception family: every message a person may see says what happened and what to do about it."""

import os
import re


def up_command() -> str:
    """What starts the services of which a message speaks: `finpro up`, or what FINPRO_UP says, as in containers."""
    return os.environ.get("FINPRO_UP", "").strip() or "finpro up"


class FinproError(Exception):
    """Something a person can act on. The command line prints it without a stack trace and exits with `exit_code`."""

    exit_code = 1


def raised_elsewhere(text: str) -> FinproError | None:
    """The error of this family that a stack trace of Spark's tells of: from a worker it comes through the JVM, as text."""
    match = re.search(r"conf\.errors\.(\w+): (.*?)(?:\n\s*at |\n\n|\n SQLSTATE|\Z)", text, re.DOTALL)
    kind = globals().get(match[1]) if match else None
    return kind(match[2].strip()) if match and isinstance(kind, type) and issubclass(kind, FinproError) else None


class SettingsError(FinproError):
    """A setting is missing or unreadable."""

    exit_code = 2


class RulesError(FinproError):
    """The fraud rules file is missing or breaks its schema."""

    exit_code = 2


class KafkaError(FinproError):
    """Kafka is unreachable, refuses, or lacks a topic."""

    exit_code = 3


class KafkaRefused(KafkaError):
    """Kafka refuses this login what it tries: another try does not help."""


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


class TopicNotKeyed(StreamingError):
    """An order lies in another partition than the others of its product: orders have to be shuffled."""


class ReconciliationError(FinproError):
    """Two counts that must agree do not."""

    exit_code = 6


class ExportError(FinproError):
    """A run of the export cannot be made, found or read."""

    exit_code = 9


class GoogleCloudError(FinproError):
    """Cloud Storage or BigQuery is unreachable, refuses, or lacks a bucket or dataset."""

    exit_code = 8


class GoogleCloudRefused(GoogleCloudError):
    """Cloud Storage or BigQuery refuses, and will until a person has done something: another try does not help."""


class LakehouseError(FinproError):
    """The lakehouse cannot be reached, read or written, or is not what it was."""

    exit_code = 15


class FileMissing(LakehouseError):
    """There is no such file."""


class FileDamaged(LakehouseError):
    """A file that was written whole is not whole any more."""


class VerdictsUnexplained(FinproError):
    """The audit found differences that nothing known accounts for."""

    exit_code = 1


class LoadError(FinproError):
    """A run cannot be loaded into BigQuery, or a job of its load failed."""

    exit_code = 10


class SchemaChanged(LoadError):
    """A column that BigQuery has was removed or retyped in Postgres: a person must decide."""

    exit_code = 11


class TransformError(FinproError):
    """dbt cannot build a model, or a test of what it built fails."""

    exit_code = 13


class DataTestsFailed(TransformError):
    """What dbt has built breaks a test: to build it again from the same rows would break it again."""


class Overtaken(TransformError):
    """A newer run has been loaded, or is being loaded: the raw tables are not those of the run that was to be built on."""


class ExpectationsFailed(FinproError):
    """The raw tables in BigQuery are not what they have to be: nothing may be built on them."""

    exit_code = 12


class NotificationError(FinproError):
    """A notification did not get through: of no consequence for what it tells of."""

    exit_code = 16


class ForgetError(FinproError):
    """A person cannot be forgotten, or not everywhere yet."""

    exit_code = 17


class LimitsBroken(FinproError):
    """Rules that were proposed, or were to be applied to orders of before, do not keep the limits that were given."""

    exit_code = 19


class PromotionRefused(FinproError):
    """Rules cannot be put in force: they were not proposed as they stand, or others were put in force meanwhile."""

    exit_code = 20


class ApplicationRefused(FinproError):
    """Rules cannot be applied to orders of before: not these, not now, or not while another application is unfinished."""

    exit_code = 21


class OutcomesError(FinproError):
    """Statements about orders cannot be taken: a file of them, or the topic."""

    exit_code = 18


class ReportError(FinproError):
    """The report cannot be written: the marts are not there, or hold nothing."""

    exit_code = 14
