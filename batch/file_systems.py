"""Files wherever a setting says they are, a local path or gs://, without Spark."""

from datetime import timedelta
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from conf.errors import SettingsError
from conf.settings import Settings

_PATIENCE = timedelta(seconds=5)


def file_system(location: str, settings: Settings) -> tuple[fs.FileSystem, str]:
    """The file system of a location, and the location's path in it.

    Raises:
        SettingsError: of this kind of location only Spark knows how to read.
    """
    emulator = settings.storage_emulator_host
    if location.startswith("gs://") and emulator:
        host = urlsplit(emulator)
        reach = {"anonymous": True, "scheme": host.scheme, "endpoint_override": host.netloc, "retry_time_limit": _PATIENCE}
        return fs.GcsFileSystem(**reach), location.removeprefix("gs://").rstrip("/")
    if "://" not in location:
        return fs.LocalFileSystem(), location
    try:
        system, path = fs.FileSystem.from_uri(location)
    except (pa.ArrowInvalid, OSError) as error:
        raise SettingsError(f"{location} cannot be read without Spark: {error}") from error
    return system, path
