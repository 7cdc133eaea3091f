"""Cloud Storage and BigQuery: clients of the real services, or of emulators where the settings name them; clear errors.

BigQuery's library is imported by who asks for a client of it: half a second, which the export has no use for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import requests
from google.api_core.exceptions import Forbidden, GoogleAPIError, NotFound
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError
from google.cloud.storage import Bucket
from google.cloud.storage import Client as StorageClient
from google.cloud.storage.retry import DEFAULT_RETRY as STORAGE_RETRY

from conf.errors import GoogleCloudError
from conf.settings import Settings

if TYPE_CHECKING:
    from google.cloud import bigquery

_FIRST_ANSWER_SECONDS = 5


def storage_client(settings: Settings) -> StorageClient:
    """A Cloud Storage client: with application default credentials, or with none for an emulator.

    Raises:
        SettingsError: no project is set.
        GoogleCloudError: there are no credentials.
    """
    with explained(settings):
        return StorageClient(settings.require("gcp_project"), **_reach(settings.storage_emulator_host))


def bigquery_client(settings: Settings) -> "bigquery.Client":
    """A BigQuery client: with application default credentials, or with none for an emulator.

    Its default dataset is not set: every name in a query says its dataset.

    Raises:
        SettingsError: no project is set.
        GoogleCloudError: there are no credentials.
    """
    from google.cloud import bigquery

    with explained(settings):
        project, location = settings.require("gcp_project"), settings.bigquery_location
        return bigquery.Client(project, location=location, **_reach(settings.bigquery_emulator_host))


def open_bucket(settings: Settings) -> Bucket:
    """The bucket of the settings, which is there and may be listed.

    Raises:
        SettingsError: no project or bucket is set.
        GoogleCloudError: it is not there, not ours to list, or Cloud Storage does not answer; says what to do.
    """
    name = settings.require("gcs_bucket")
    client = storage_client(settings)
    with explained(settings):
        # Listing needs no right beyond those on objects; reading the bucket's own metadata would.
        listing = client.list_blobs(name, max_results=1, retry=STORAGE_RETRY.with_timeout(_FIRST_ANSWER_SECONDS))
        next(iter(listing), None)
    return client.bucket(name)


def open_dataset(settings: Settings, client: "bigquery.Client", setting: str = "bigquery_dataset") -> "bigquery.Dataset":
    """The dataset that a setting names, which is there: by default the one of the raw tables.

    Raises:
        GoogleCloudError: it is not there, not ours to read, or BigQuery does not answer; says what to do.
    """
    from google.cloud import bigquery

    with explained(settings):
        retry = bigquery.DEFAULT_RETRY.with_timeout(_FIRST_ANSWER_SECONDS)
        return client.get_dataset(f"{client.project}.{settings.require(setting)}", retry=retry)


@contextmanager
def explained(settings: Settings) -> Iterator[None]:
    """What Google's libraries raise inside the block is raised as a GoogleCloudError that says what to do."""
    try:
        yield
    except DefaultCredentialsError as error:
        raise GoogleCloudError(
            "There are no Google credentials: `gcloud auth application-default login`, or set"
            " GOOGLE_APPLICATION_CREDENTIALS to a key file; `finpro up` starts emulators that need none."
        ) from error
    except GoogleAuthError as error:
        raise GoogleCloudError(f"Google refused the credentials: {_first_line(error)}") from error
    except NotFound as error:
        raise GoogleCloudError(
            f"Not found: {_first_line(error)}. The bucket (FINPRO_GCS_BUCKET) and the datasets (FINPRO_BIGQUERY_DATASET, and"
            f" those of core and marts) are made once, by hand, in the project {settings.gcp_project}, and by `finpro up` in"
            " emulators; tables come with `finpro load` and `finpro transform`."
        ) from error
    except Forbidden as error:
        raise GoogleCloudError(
            f"Not allowed: {_first_line(error)}. finpro needs storage.objectAdmin on the bucket, bigquery.dataEditor on the"
            f" datasets and bigquery.jobUser on the project {settings.gcp_project}."
        ) from error
    except (GoogleAPIError, requests.ConnectionError, requests.Timeout) as error:
        raise GoogleCloudError(f"{_where(settings)}: {_first_line(error)}") from error


def _reach(emulator: str | None) -> dict[str, Any]:
    """The arguments that lead a client to an emulator; none for the real service."""
    if emulator is None:
        return {}
    nobody = AnonymousCredentials()  # type: ignore[no-untyped-call]
    return {"credentials": nobody, "client_options": {"api_endpoint": emulator}}


def _where(settings: Settings) -> str:
    hosts = [host for host in (settings.storage_emulator_host, settings.bigquery_emulator_host) if host]
    return f"The emulators at {' and '.join(hosts)} (`finpro up` starts what has died)" if hosts else "Google Cloud"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
