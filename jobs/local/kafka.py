"""The embedded Kafka: one KRaft broker, started from its jars."""

import os
import signal
import subprocess
import uuid
from base64 import urlsafe_b64encode
from pathlib import Path

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from conf.errors import PlatformError
from conf.settings import CONF_DIR
from jobs.local.jars import kafka_broker_classpath
from jobs.local.java import java_home
from jobs.local.ports import LOOPBACK, accepts_connections, claim_ports, remembered_ports
from jobs.local.private_files import private_directory, write_private
from jobs.local.processes import Daemon, child_environment

_CONF = CONF_DIR / "local"
_STOP_SECONDS = 30


class KafkaBroker:
    """The broker of one platform home."""

    ports = ("kafka", "kafka_controller")

    def __init__(self, home: Path) -> None:
        self.daemon = Daemon("kafka", home)
        self._data = home / "kafka" / "data"
        self._properties = home / "kafka" / "server.properties"

    @property
    def address(self) -> str:
        """`host:port` of the broker, as of its last start."""
        return f"{LOOPBACK}:{remembered_ports(self.daemon.home)['kafka']}"

    def start(self) -> None:
        """Start the broker; its data folder is formatted the first time.

        Raises:
            PlatformError: no Java, no jars, or the data folder cannot be formatted.
        """
        private_directory(self._data)
        self._write_properties(claim_ports(self.daemon.home, self.ports))
        if not self._meta().get("cluster.id"):
            self._format()
        self.daemon.start(self._java("kafka.Kafka", str(self._properties)))

    def answers(self) -> bool:
        """Whether this broker, and no other on its port, serves requests."""
        if not accepts_connections(remembered_ports(self.daemon.home)["kafka"]):
            return False
        client = AdminClient({"bootstrap.servers": self.address, "log_level": 0})
        try:
            return bool(client.list_topics(timeout=5).cluster_id == self._meta()["cluster.id"])
        except KafkaException:
            return False

    def stop(self) -> bool:
        """End the broker; True when it ran."""
        return self.daemon.stop(first=signal.SIGTERM, patience_seconds=_STOP_SECONDS)

    def _write_properties(self, ports: dict[str, int]) -> None:
        addresses = {name: f"{LOOPBACK}:{port}" for name, port in ports.items()}
        ours = [
            f"listeners=PLAINTEXT://{addresses['kafka']},CONTROLLER://{addresses['kafka_controller']}",
            f"advertised.listeners=PLAINTEXT://{addresses['kafka']}",
            # A quorum named by address, not one kept in the metadata: the port may be another one next time.
            f"controller.quorum.voters=1@{addresses['kafka_controller']}",
            f"log.dirs={_property_value(self._data)}",
        ]
        settings = (_CONF / "kafka.properties").read_text(encoding="utf-8")
        write_private(self._properties, settings + "\n# Written by `finpro up`\n" + "\n".join(ours) + "\n")

    def _format(self) -> None:
        cluster = urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        command = self._java(
            "kafka.tools.StorageTool", "format", f"--cluster-id={cluster}", f"--config={self._properties}", "--ignore-formatted"
        )
        done = subprocess.run(command, capture_output=True, text=True, env=child_environment(), umask=0o077)
        if done.returncode != 0:
            raise PlatformError(f"Kafka's data folder {self._data} cannot be formatted:\n{(done.stdout + done.stderr).strip()}")

    def _meta(self) -> dict[str, str]:
        try:
            lines = (self._data / "meta.properties").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return {}
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def _java(self, *arguments: str) -> list[str]:
        return [
            str(java_home() / "bin" / "java"),
            f"@{_CONF / 'kafka-java.options'}",
            f"-Dlog4j2.configurationFile={_CONF / 'kafka-log4j2.properties'}",
            "-cp",
            os.pathsep.join(map(str, kafka_broker_classpath())),
            *arguments,
        ]


def _property_value(path: Path) -> str:
    return str(path).replace("\\", "\\\\")
