"""How a running streaming job makes itself known: metrics over HTTP, and a record of where to find them.

Machines that share a home, such as containers, find each other's jobs by their metrics, if those are not on loopback.
Of several jobs of one name under one home each has a record of its own, `run/screen.json`, `run/screen-2.json` and so on,
which nobody else replaces or removes as long as it runs.
"""

import errno
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from wsgiref.simple_server import WSGIServer

import psutil

from conf.settings import Settings, finpro_home
from jobs.local.private_files import exclusive_lock, private_directory, write_private
from jobs.local.processes import listens, record_of, recorded_process

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry  # by who serves metrics: `finpro status` looks for jobs without it

# Where Prometheus looks, see conf/monitoring/prometheus.yml.
METRICS_PORTS = {"screen": 9108, "archive": 9109}

_ELSEWHERE_SECONDS = 2
_SAME_START_SECONDS = 1.0


@dataclass(frozen=True)
class RunningJob:
    """A job that runs.

    Attributes:
        name: of the job.
        pid: its process.
        started_at: when it made itself known.
        metrics_url: where its metrics are; None where it does not serve them.
        host: the machine, where it is another one.
    """

    name: str
    pid: int
    started_at: datetime
    metrics_url: str | None
    host: str | None = None


def find_job(name: str) -> RunningJob | None:
    """The job of this name that has run for longest under this finpro home, or None."""
    return min(_running(name), key=lambda job: job.started_at, default=None)


@contextmanager
def made_known(name: str, registry: "CollectorRegistry", settings: Settings) -> Iterator[None]:
    """Inside the block this process is the job `name`, and serves its metrics. That it cannot do so stops nothing."""
    server = _serve(name, registry, settings)
    try:
        with _recorded(name, server):
            yield
    finally:
        if server:
            _end(server)


def _running(name: str) -> Iterator[RunningJob]:
    """The jobs of this name under this home. What killed ones left behind does not count."""
    for path in (finpro_home() / "run").glob(f"{name}*.json"):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            started_at, url = datetime.fromisoformat(record["started_at"]), record["metrics_url"]
            elsewhere = record.get("host", _this_host()) != _this_host()
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            continue
        if elsewhere:
            if answering := _answering(record):
                yield RunningJob(name, record["pid"], started_at, answering, record["host"])
        elif process := recorded_process(record):
            # Whatever answers there: it is this job's only if the job itself listens there.
            is_served = url is not None and listens(process, urlsplit(url).port or 0)
            yield RunningJob(name, process.pid, started_at, url if is_served else None)


def _this_host() -> str:
    """What other machines, or containers of one network, know this one by."""
    return socket.gethostname()


def _answering(record: dict[str, Any]) -> str | None:
    """The address of a job's metrics on another machine, if that very process answers there."""
    import requests
    from prometheus_client.parser import text_string_to_metric_families

    port = urlsplit(record.get("metrics_url") or "").port
    url = f"http://{record['host']}:{port}/metrics"
    try:
        text = requests.get(url, timeout=_ELSEWHERE_SECONDS).text if port else ""
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    except (requests.RequestException, ValueError):
        return None
    started = next((sample.value for sample in samples if sample.name == "process_start_time_seconds"), 0.0)
    return url if abs(started - record["create_time"]) <= _SAME_START_SECONDS else None


def _serve(name: str, registry: "CollectorRegistry", settings: Settings) -> WSGIServer | None:
    """Serve metrics at the port that is set, else at the job's own, else at any that is free."""
    from prometheus_client import ProcessCollector, disable_created_metrics, start_http_server

    ProcessCollector(registry=registry)
    disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, which nobody asks for
    host = settings.metrics_host
    wanted = METRICS_PORTS[name] if settings.metrics_port is None else settings.metrics_port
    problem = ""
    for port in (wanted, 0):
        try:
            server, _ = start_http_server(port, host, registry)
        except OSError as error:
            problem = problem or f"metrics cannot be served at {host}:{port} ({_reason(error, port)})"
            continue
        if problem:
            _warn(
                f"{problem}: the metrics are at {_url(server)} instead, where Prometheus does not look;"
                " FINPRO_METRICS_PORT sets the port"
            )
        return server
    _warn(problem)
    return None


def _reason(error: OSError, port: int) -> str:
    return _taken(port) if error.errno == errno.EADDRINUSE else error.strerror or str(error)


def _taken(port: int) -> str:
    """Who has a port of this machine, as far as this user may know."""
    for name in METRICS_PORTS:
        for job in _running(name):
            if job.metrics_url and urlsplit(job.metrics_url).port == port:
                return f"`finpro {name}` of this home has that port: process {job.pid}"
    with suppress(psutil.Error, OSError):
        for one in psutil.net_connections(kind="tcp"):
            if one.status == psutil.CONN_LISTEN and one.laddr and one.laddr.port == port and one.pid:
                return f"another program has that port: {psutil.Process(one.pid).name()}, process {one.pid}"
    return "another program has that port"


def _end(server: WSGIServer) -> None:
    with suppress(OSError):  # wakes the thread that serves: else it would see only within half a second that it is over
        server.socket.shutdown(socket.SHUT_RDWR)
    server.shutdown()
    server.server_close()


@contextmanager
def _recorded(name: str, server: WSGIServer | None) -> Iterator[None]:
    """Inside the block this process has a record of its own among those of its name."""
    job = {"started_at": datetime.now(UTC).isoformat(), "metrics_url": _url(server) if server else None}
    record = json.dumps(record_of(os.getpid()) | job | {"host": _this_host()})
    try:
        path = _write(record, name)
    except OSError as error:
        _warn(f"`finpro status` will not find this job: {error}")
        yield
        return
    try:
        yield
    finally:
        with suppress(OSError):
            if path.read_text(encoding="utf-8") == record:
                path.unlink()


def _write(record: str, name: str) -> Path:
    """Keep a record at the first place that no running job has."""
    folder = private_directory(finpro_home() / "run")
    with exclusive_lock(finpro_home() / "jobs.lock", on_wait=lambda: None):
        places = (folder / f"{name}{suffix}.json" for suffix in chain([""], (f"-{number}" for number in count(2))))
        path = next(place for place in places if not _is_taken(place))
        write_private(path, record)
    return path


def _is_taken(place: Path) -> bool:
    try:
        record = json.loads(place.read_text(encoding="utf-8"))
        if record.get("host", _this_host()) != _this_host():
            return _answering(record) is not None
        return recorded_process(record) is not None
    except (FileNotFoundError, ValueError, KeyError, AttributeError):
        return False


def _url(server: WSGIServer) -> str:
    host, port = server.server_address[:2]
    return f"http://{f'[{host!s}]' if ':' in str(host) else host!s}:{port}/metrics"


def _warn(message: str) -> None:
    print(f"finpro: warning: {message}", file=sys.stderr)
