"""The embedded Kafka: one KRaft broker, started from its jars."""

import os
import shutil
import signal
import uuid
from base64 import urlsafe_b64encode
from pathlib import Path
from typing import Any, ClassVar

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from conf.settings import CONF_DIR
from jobs.local.jars import kafka_broker_classpath
from jobs.local.java import java_home
from jobs.local.ports import LOOPBACK, accepts_connections, claim_ports, remembered_ports
from jobs.local.private_files import private_directory, write_private
from jobs.local.processes import Daemon, run_once

_CONF = CONF_DIR / "local"
_STOP_SECONDS = 30


class KafkaBroker:
    """The broker of one platform home."""

    ports = ("kafka", "kafka_controller")
    java_options: ClassVar = _CONF / "kafka-java.options"

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
            PlatformError: no Java, no jars, or the data folder cannot be made.
        """
        ports = claim_ports(self.daemon.home, self.ports)
        if not self._data.exists():
            self._format(ports)
        self._write_properties(ports, self._data)
        self.daemon.start(self._java("kafka.Kafka", str(self._properties)))

    def answers(self) -> bool:
        """Whether this broker, and no other on its port, serves requests."""
        if not accepts_connections(remembered_ports(self.daemon.home)["kafka"]):
            return False
        client = AdminClient(self._client() | {"log_level": 0})
        try:
            return bool(client.list_topics(timeout=5).cluster_id == self._cluster_id())
        except KafkaException:
            return False

    def _client(self) -> dict[str, Any]:
        """The configuration of a client that asks whether it answers."""
        return {"bootstrap.servers": self.address}

    def stop(self) -> bool:
        """End the broker; True when it ran."""
        return self.daemon.stop(first=signal.SIGTERM, patience_seconds=_STOP_SECONDS)

    def _write_properties(self, ports: dict[str, int], data: Path) -> None:
        broker, controller = (f"{LOOPBACK}:{ports[name]}" for name in self.ports)
        ours = [
            *self._listeners(broker, controller),
            # A quorum named by address, not one kept in the metadata: the port may be another one next time.
            f"controller.quorum.voters=1@{controller}",
            # Relative to the home, where the broker runs: the whole path may hold commas, which separate folders here.
            f"log.dirs={data.relative_to(self.daemon.home)}",
        ]
        settings = (_CONF / "kafka.properties").read_text(encoding="utf-8")
        write_private(self._properties, settings + "\n# Written by `finpro up`\n" + "\n".join(ours) + "\n")

    def _listeners(self, broker: str, controller: str) -> list[str]:
        """The properties that say where it listens, and who may connect."""
        return [f"listeners=PLAINTEXT://{broker},CONTROLLER://{controller}", f"advertised.listeners=PLAINTEXT://{broker}"]

    def _format(self, ports: dict[str, int]) -> None:
        """Make the data folder under another name first: what is called `data` is complete."""
        draft = self._data.with_name("data.new")
        shutil.rmtree(draft, ignore_errors=True)
        private_directory(draft)
        self._write_properties(ports, draft)
        cluster = urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        tool = ("kafka.tools.StorageTool", "format", f"--cluster-id={cluster}", f"--config={self._properties}")
        run_once(self._java(*tool), cwd=self.daemon.home, failure=f"Kafka's data folder {self._data} cannot be made")
        draft.replace(self._data)

    def _cluster_id(self) -> str:
        lines = (self._data / "meta.properties").read_text(encoding="utf-8").splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)["cluster.id"]

    def _java(self, *arguments: str) -> list[str]:
        return [
            str(java_home() / "bin" / "java"),
            f"@{self.java_options}",
            f"-Dlog4j2.configurationFile={_CONF / 'kafka-log4j2.properties'}",
            "-cp",
            os.pathsep.join(map(str, kafka_broker_classpath())),
            *arguments,
        ]
