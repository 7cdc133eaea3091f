"""How a streaming job is found on its machine: beside others of its name, and beside strangers on its port."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from wsgiref.simple_server import WSGIServer

import pytest
from prometheus_client import CollectorRegistry, Gauge

from conf.settings import Settings
from jobs.health import checks
from jobs.local.ports import is_free
from jobs.spark import running_job
from jobs.spark.running_job import METRICS_PORTS, find_job, made_known

# Another program, whose endpoint speaks of a query that has been silent since 1970.
STRANGER = """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"finpro_query_heartbeat_timestamp_seconds 0.0\\n")
    def log_message(self, *_):
        pass
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""
# A job in a process of its own, until its input ends.
JOB = """
import sys
from prometheus_client import CollectorRegistry
from conf.settings import Settings
from jobs.spark.running_job import made_known
with made_known(sys.argv[1], CollectorRegistry(), Settings(metrics_port=int(sys.argv[2]))):
    print("runs", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FINPRO_HOME", str(tmp_path))
    monkeypatch.delenv("FINPRO_METRICS_PORT", raising=False)
    return tmp_path


@contextmanager
def program(source: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A Python program that runs beside this one, and the first line that it says."""
    command = [sys.executable, "-c", source, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def end(process: subprocess.Popen[str]) -> None:
    assert process.stdin
    process.stdin.close()
    process.wait(timeout=30)


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """Another program on the usual port of `screen`: its process and the port."""
    with program(STRANGER) as (process, port):
        monkeypatch.setitem(METRICS_PORTS, "screen", int(port))
        yield process.pid, int(port)


@pytest.fixture
def job_of_this_process() -> Iterator[Callable[..., None]]:
    """Makes this process a job, until the test ends."""
    with ExitStack() as stack:
        yield lambda name, **settings: stack.enter_context(made_known(name, CollectorRegistry(), Settings(**settings)))


def port_of(name: str) -> int:
    job = find_job(name)
    assert job
    assert job.metrics_url
    return int(job.metrics_url.rsplit(":", 1)[1].removesuffix("/metrics"))


def test_a_port_that_another_program_has_is_said_in_one_line(
    stranger: tuple[int, int], job_of_this_process: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    pid, port = stranger

    job_of_this_process("screen")

    (line,) = capsys.readouterr().err.splitlines()
    assert f"metrics cannot be served at 127.0.0.1:{port} (another program has that port: python" in line
    assert f"process {pid})" in line
    assert f"the metrics are at http://127.0.0.1:{port_of('screen')}/metrics instead" in line
    assert "FINPRO_METRICS_PORT" in line


def test_a_port_that_a_job_of_this_home_has_is_said_with_its_name(
    job_of_this_process: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with program(JOB, "archive", "0") as (process, _):
        taken = port_of("archive")
        job_of_this_process("screen", metrics_port=taken)

    (line,) = capsys.readouterr().err.splitlines()
    assert f":{taken} (`finpro archive` of this home has that port: process {process.pid})" in line


def test_an_address_that_this_machine_lacks_is_said_in_one_line(
    job_of_this_process: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    job_of_this_process("screen", metrics_host="192.0.2.1")

    assert len(capsys.readouterr().err.splitlines()) == 1


def test_status_asks_the_job_itself_and_not_who_has_its_usual_port(stranger: tuple[int, int]) -> None:
    registry = CollectorRegistry()
    Gauge("finpro_query_input_rows_per_second", "", registry=registry).set(812)

    with made_known("screen", registry, Settings()):
        job = find_job("screen")
        assert job
        measured = checks._measured(job)

    assert measured
    assert measured.rows_per_second == 812
    assert measured.silent.days == 0


def test_an_address_where_another_program_answers_by_now_is_no_address_of_the_job(
    home: Path, stranger: tuple[int, int], job_of_this_process: Callable[..., None]
) -> None:
    job_of_this_process("screen", metrics_port=0)
    record = home / "run" / "screen.json"
    url = f"http://127.0.0.1:{stranger[1]}/metrics"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"metrics_url": url}))

    job = find_job("screen")

    assert job
    assert job.metrics_url is None


def test_a_second_job_of_a_name_neither_hides_the_first_nor_takes_its_record_along(
    home: Path, job_of_this_process: Callable[..., None]
) -> None:
    job_of_this_process("screen", metrics_port=0)
    first = find_job("screen")

    with program(JOB, "screen", "0") as (second, _):
        assert find_job("screen") == first
        assert len(list((home / "run").glob("screen*.json"))) == 2
        end(second)

    assert find_job("screen") == first
    assert [path.name for path in (home / "run").iterdir()] == ["screen.json"]


def test_a_second_job_is_found_once_the_first_has_ended(home: Path) -> None:
    with program(JOB, "screen", "0") as (first, _), program(JOB, "screen", "0") as (second, _):
        end(first)

        job = find_job("screen")
        assert job
        assert job.pid == second.pid
        end(second)

    assert list((home / "run").iterdir()) == []


def test_what_a_killed_job_left_behind_gives_way_to_the_next(home: Path, job_of_this_process: Callable[..., None]) -> None:
    with program(JOB, "screen", "0") as (killed, _):
        killed.kill()
    assert find_job("screen") is None

    job_of_this_process("screen", metrics_port=0)

    assert find_job("screen")
    assert [path.name for path in (home / "run").iterdir()] == ["screen.json"]


def test_the_port_is_free_again_when_the_job_has_ended() -> None:
    with made_known("screen", CollectorRegistry(), Settings(metrics_port=0)):
        port = port_of("screen")

    assert is_free(port)


def test_an_address_of_ip_6_is_written_as_one() -> None:
    server = cast(WSGIServer, SimpleNamespace(server_address=("::1", 9108, 0, 0)))

    assert running_job._url(server) == "http://[::1]:9108/metrics"


@pytest.fixture
def elsewhere(home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a job's record one of another machine, which answers at this one's loopback."""

    def move(name: str) -> None:
        path = home / "run" / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"host": "127.0.0.1"}))
        monkeypatch.setattr(running_job, "_this_host", lambda: "here")

    return move


def test_a_job_of_another_machine_is_found_as_long_as_it_answers(home: Path, elsewhere: Callable[[str], None]) -> None:
    with program(JOB, "screen", "0") as (process, _):
        elsewhere("screen")
        job = find_job("screen")
        assert job
        assert (job.pid, job.host) == (process.pid, "127.0.0.1")
        assert job.metrics_url
        process.kill()
        process.wait()
        assert find_job("screen") is None


def test_who_else_answers_there_by_now_is_not_taken_for_it(
    home: Path, elsewhere: Callable[[str], None], stranger: tuple[int, int]
) -> None:
    with program(JOB, "screen", "0") as (process, _):
        elsewhere("screen")
        path = home / "run" / "screen.json"
        record = json.loads(path.read_text())
        for wrong in ({"metrics_url": f"http://127.0.0.1:{stranger[1]}/metrics"}, {"create_time": record["create_time"] - 9}):
            path.write_text(json.dumps(record | wrong))
            assert find_job("screen") is None
        end(process)


def test_a_second_job_leaves_the_record_of_one_on_another_machine_alone(
    home: Path, elsewhere: Callable[[str], None], job_of_this_process: Callable[..., None]
) -> None:
    with program(JOB, "screen", "0") as (process, _):
        elsewhere("screen")
        before = (home / "run" / "screen.json").read_text()
        job_of_this_process("screen", metrics_port=0)
        assert (home / "run" / "screen.json").read_text() == before
        end(process)
