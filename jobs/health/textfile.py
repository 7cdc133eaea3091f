"""The platform's health as metrics, in a file that Prometheus' node exporter reads (its collector `textfile`)."""

import time
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

from jobs.health.findings import State
from jobs.health.status import Health


class HealthMetrics:
    """The gauges of a registry. A part that is off has no series."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.seen = Gauge("finpro_status_timestamp_seconds", "When the platform was last looked at.", registry=registry)
        self.down = Gauge("finpro_part_down", "1 where a part needs a person.", ["part"], registry=registry)
        self.ended = Gauge("finpro_run_timestamp_seconds", "When a part's last run ended.", ["part"], registry=registry)

    def set(self, parts: Iterable[Health]) -> None:
        """Show what was seen just now."""
        self.seen.set(time.time())
        for part in parts:
            if part.state is not State.OFF:
                self.down.labels(part.part).set(part.state is State.DOWN)
            if part.at:
                self.ended.labels(part.part).set(part.at.timestamp())


def write_metrics(path: Path, parts: Iterable[Health]) -> None:
    """Write the file; one that was there is replaced as a whole."""
    registry = CollectorRegistry()
    HealthMetrics(registry).set(parts)
    write_to_textfile(str(path), registry)
