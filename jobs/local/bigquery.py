"""The embedded BigQuery: PyPI's bqemulator, in an environment of its own beside finpro's packages."""

import shlex
import signal
import sys
from pathlib import Path

from conf.errors import PlatformError
from conf.settings import CONF_DIR, Settings
from jobs.local.ports import LOOPBACK, claim_ports, remembered_ports
from jobs.local.private_files import private_directory
from jobs.local.processes import Daemon

PROJECT = "finpro-local"
_ENVIRONMENT = Path(sys.prefix) / "bigquery-emulator"
_REQUIREMENTS = CONF_DIR / "requirements" / "bigquery_emulator.txt"
_LAUNCHER = Path(__file__).with_name("bigquery_launcher.py")
_STOP_SECONDS = 30


class BigQueryEmulator:
    """The BigQuery of one platform home; it reads gs:// from the folder of the Cloud Storage beside it."""

    ports = ("bigquery", "bigquery_grpc")

    def __init__(self, home: Path, objects: Path) -> None:
        self.daemon = Daemon("bigquery", home)
        self._folder = home / "bigquery"
        self._objects = objects

    @property
    def address(self) -> str:
        """`host:port` of the server, as of its last start."""
        return f"{LOOPBACK}:{remembered_ports(self.daemon.home)['bigquery']}"

    @property
    def url(self) -> str:
        """What `BIGQUERY_EMULATOR_HOST` has to be."""
        return f"http://{self.address}"

    def start(self) -> None:
        """Start the server; its tables are kept under the home.

        Raises:
            PlatformError: its environment is missing.
        """
        ports = claim_ports(self.daemon.home, self.ports)
        command = [
            *(str(_python()), "-P", str(_LAUNCHER), "start", "--project", PROJECT),
            *("--rest-host", LOOPBACK, "--rest-port", str(ports["bigquery"])),
            *("--grpc-host", LOOPBACK, "--grpc-port", str(ports["bigquery_grpc"])),
            *("--persistent", "--data-dir", str(private_directory(self._folder / "data"))),
        ]
        self.daemon.start(command, environment=self._environment())

    def answers(self) -> bool:
        """Whether this server, and no other on its port, serves requests."""
        return self.daemon.listens_on(remembered_ports(self.daemon.home)["bigquery"])

    def create_datasets(self, settings: Settings) -> None:
        """Make the datasets of the settings where they are missing.

        Raises:
            GoogleCloudError: the server refuses.
        """
        from batch.google_cloud import bigquery_client, explained  # it takes a second: `down` and `env` do without

        with explained(settings):
            client = bigquery_client(settings)
            for dataset in settings.bigquery_datasets:
                client.create_dataset(dataset, exists_ok=True)

    def stop(self) -> bool:
        """End the server; True when it ran."""
        return self.daemon.stop(first=signal.SIGTERM, patience_seconds=_STOP_SECONDS)

    def _environment(self) -> dict[str, str]:
        return {
            "HOME": str(private_directory(self._folder / "home")),  # DuckDB keeps its extensions there
            "BQEMU_GCS_LOCAL_ROOT": str(self._objects),
            "BQEMU_UPLOAD_STAGING_DIR": str(private_directory(self._folder / "uploads")),
            "BQEMU_ENABLE_FORMAT_EXTENSIONS": "false",  # Avro: it would be downloaded
            "BQEMU_TIME_TRAVEL_RETENTION_DAYS": "0",  # copies of tables that an earlier finpro had it make: they go
        }


def _python() -> Path:
    python = _ENVIRONMENT / "bin" / "python"
    if not python.exists():
        environment = shlex.quote(str(_ENVIRONMENT))
        raise PlatformError(
            f"BigQuery's emulator has an environment of its own, which is missing. `make setup` makes it; without make:\n"
            f"  {shlex.quote(sys.executable)} -m venv {environment} && {environment}/bin/pip install --require-hashes"
            f" -r {shlex.quote(str(_REQUIREMENTS))}"
        )
    return python
