"""A Spark standalone cluster as separate processes on this machine: a master, and workers that know nothing of finpro."""

import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import psutil
import pyspark
import requests

from jobs.local.java import spark_java_home
from jobs.local.ports import LOOPBACK, claim_ports
from jobs.local.private_files import private_directory
from jobs.local.processes import Daemon

_SPARK_HOME = Path(pyspark.__file__).parent
_WORKERS = 2


class SparkCluster:
    """A master and two workers of one core each, in `home`; each worker's executors run in a folder of their own."""

    def __init__(self, home: Path) -> None:
        self.home = private_directory(home)
        self.ports = claim_ports(home, ("spark_master", "spark_master_ui"))
        self._master = Daemon("spark-master", home)
        self._workers = [Daemon(f"spark-worker-{number}", home) for number in range(_WORKERS)]

    @property
    def url(self) -> str:
        """What `--master` is told."""
        return f"spark://{LOOPBACK}:{self.ports['spark_master']}"

    def start(self) -> None:
        """Start what does not run, and wait until the master knows its workers."""
        if self._master.process() is None:
            ports = ("--port", str(self.ports["spark_master"]), "--webui-port", str(self.ports["spark_master_ui"]))
            self._start(self._master, "org.apache.spark.deploy.master.Master", *ports)
            self._master.wait_until(lambda: self._master.listens_on(self.ports["spark_master_ui"]), seconds=60)
        for number, worker in enumerate(self._workers):
            if worker.process() is None:
                options = (
                    "--cores",
                    "1",
                    "--memory",
                    "1g",
                    "--webui-port",
                    "0",
                    "--work-dir",
                    str(self.home / f"work-{number}"),
                )
                self._start(worker, "org.apache.spark.deploy.worker.Worker", *options, self.url)
        self._master.wait_until(lambda: len(self._alive()) == _WORKERS, seconds=60)

    def kill_worker(self) -> None:
        """SIGKILL a worker that runs an executor, and all that it has started."""
        process = self._workers[0].process()
        assert process is not None
        executors = process.children(recursive=True)
        assert executors, "no executor runs there"
        for one in [process, *executors]:
            one.kill()
        psutil.wait_procs([process, *executors], timeout=10)

    def stop(self) -> None:
        """End all of it."""
        for daemon in [*self._workers, self._master]:
            daemon.stop(first=signal.SIGTERM, patience_seconds=20)

    def _start(self, daemon: Daemon, main_class: str, *arguments: str) -> None:
        environment = {
            "JAVA_HOME": str(spark_java_home()),
            "SPARK_HOME": str(_SPARK_HOME),
            "SPARK_LOCAL_IP": LOOPBACK,
            "SPARK_DAEMON_MEMORY": "256m",
            "NO_PROXY": LOOPBACK,
        }
        command = [str(_SPARK_HOME / "bin" / "spark-class"), main_class, "--host", LOOPBACK, *arguments]
        daemon.start(command, environment=environment)

    def _alive(self) -> list[Any]:
        # The port is open before the page is there: until then the master answers with another one, with nothing, or not found.
        answer = requests.get(f"http://{LOOPBACK}:{self.ports['spark_master_ui']}/json/", timeout=10)
        workers = answer.json()["workers"] if answer.ok and answer.content.startswith(b"{") else []
        return [worker for worker in workers if worker["state"] == "ALIVE"]


def python_without_finpro(folder: Path) -> Path:
    """A Python with all that finpro depends on and nothing of finpro itself, as on a cluster's machines."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    # A folder named in such a file is searched for packages, but not for further files like it: one of them names the checkout.
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    assert subprocess.run([python, "-c", "import polars"], cwd=folder, env=alone).returncode == 0
    assert subprocess.run([python, "-c", "import streaming"], cwd=folder, env=alone, stderr=subprocess.DEVNULL).returncode == 1
    return python
