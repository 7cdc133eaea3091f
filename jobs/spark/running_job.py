"""How a running streaming job makes itself known on its machine: metrics over HTTP, and a record of where to find them."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from wsgiref.simple_server import WSGIServer

import psutil
from prometheus_client import CollectorRegistry, ProcessCollector, disable_created_metrics, start_http_server

from conf.settings import Settings, finpro_home
from jobs.local.private_files import private_directory, write_private
from jobs.local.processes import Daemon

# Where Prometheus looks, see conf/monitoring/prometheus.yml.
METRICS_PORTS = {"screen": 9108, "archive": 9109}


@dataclass(frozen=True)
class RunningJob:
    """A job that runs on this machine; `metrics_url` is None where it could not serve its metrics."""

    name: str
    pid: int
    started_at: datetime
    metrics_url: str | None


def find_job(name: str) -> RunningJob | None:
    """The job of this name that runs under this finpro home, or None. What a killed one left behind does not count."""
    process = Daemon(name, finpro_home()).process()
    try:
        record = json.loads(_record(name).read_text(encoding="utf-8"))
        started_at = datetime.fromisoformat(record["started_at"])
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return RunningJob(name, process.pid, started_at, record["metrics_url"]) if process else None


@contextmanager
def made_known(name: str, registry: CollectorRegistry, settings: Settings) -> Iterator[None]:
    """Inside the block this process is the job `name`, and serves its metrics. That it cannot do so stops nothing."""
    server = _serve(name, registry, settings)
    _write_record(name, server)
    try:
        yield
    finally:
        _remove_record(name)
        if server:
            server.shutdown()
            server.server_close()


def _serve(name: str, registry: CollectorRegistry, settings: Settings) -> WSGIServer | None:
    """Serve metrics at the port that is set, else at the job's own, else at any that is free."""
    ProcessCollector(registry=registry)
    disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, which nobody asks for
    wanted = METRICS_PORTS[name] if settings.metrics_port is None else settings.metrics_port
    for port in (wanted, 0):
        try:
            server, _ = start_http_server(port, settings.metrics_host, registry)
        except OSError as error:
            _warn(f"metrics cannot be served at {settings.metrics_host}:{port} ({error.strerror})")
            continue
        if port != wanted:
            _warn(f"metrics are at {_url(server)} instead, where Prometheus does not look: FINPRO_METRICS_PORT sets the port")
        return server
    return None


def _write_record(name: str, server: WSGIServer | None) -> None:
    record = {
        "pid": os.getpid(),
        "create_time": psutil.Process().create_time(),
        "started_at": datetime.now(UTC).isoformat(),
        "metrics_url": _url(server) if server else None,
    }
    try:
        private_directory(_record(name).parent)
        write_private(_record(name), json.dumps(record))
    except OSError as error:
        _warn(f"`finpro status` will not find this job: {error}")


def _remove_record(name: str) -> None:
    found = find_job(name)
    if found and found.pid == os.getpid():  # and not a job of this name that was started meanwhile
        with suppress(OSError):
            _record(name).unlink()


def _record(name: str) -> Path:
    return finpro_home() / "run" / f"{name}.json"


def _url(server: WSGIServer) -> str:
    host, port = server.server_address[:2]
    return f"http://{host!s}:{port}/metrics"


def _warn(message: str) -> None:
    print(f"finpro: warning: {message}", file=sys.stderr)
