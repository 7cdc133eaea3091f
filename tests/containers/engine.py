"""Docker Compose on a copy of this checkout, as a project of its own: nothing of another one is touched but its ports."""

import json
import os
import shutil
import subprocess
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dotenv import dotenv_values

from conf.settings import project_root
from tests.runs.compose import services

ROOT = project_root()
STAND_INS = Path(__file__).parent / "stand_ins"
PROJECT = "finpro-test"
_PULL_SECONDS = 300
_STAND_IN = "finpro.stand-in"


def why_not() -> str | None:
    """Why containers cannot be run here; None where they can."""
    if shutil.which("docker") is None:
        return "there is no docker here"
    for what, command in {
        "engine that answers": ["docker", "info"],
        "Docker Compose": ["docker", "compose", "version"],
    }.items():
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            return f"there is no {what}: {done.stderr.strip().splitlines()[-1]}"
    return None


def stand_ins() -> list[str]:
    """Have an image for each service that is not built here: the real one, or what stands for it. Returns those that do."""
    base = next(line.partition("=")[2] for line in _dockerfile() if line.startswith("ARG PYTHON="))
    stood_in: list[str] = []
    if not _real(base) and not _is_here(base):
        subprocess.run(["sh", str(STAND_INS / "python.sh"), base], check=True, stdout=subprocess.DEVNULL)
    stood_in += [] if _real(base) else [base]
    for target, service in services().items():
        image = service["image"]
        if image.startswith("finpro") or _real(image):
            continue
        if not _is_here("finpro:0.1.0"):
            build = ["docker", "buildx", "build", "--file", "conf/docker/Dockerfile", "--target", "finpro"]
            subprocess.run([*build, "--tag", "finpro:0.1.0", "."], check=True, cwd=ROOT)
        build = ["docker", "buildx", "build", "--target", target, "--tag", image, "--label", f"{_STAND_IN}=true", "."]
        subprocess.run(build, check=True, cwd=STAND_INS)
        stood_in.append(image)
    return stood_in


def _dockerfile() -> list[str]:
    return (ROOT / "conf" / "docker" / "Dockerfile").read_text().splitlines()


def _real(image: str) -> bool:
    """Whether the image itself is here, or can be had."""
    if _is_here(image):
        return _STAND_IN not in (json.loads(_docker("image", "inspect", image))[0]["Config"]["Labels"] or {})
    try:
        return subprocess.run(["docker", "pull", "--quiet", image], capture_output=True, timeout=_PULL_SECONDS).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _is_here(image: str) -> bool:
    return subprocess.run(["docker", "image", "inspect", image], capture_output=True).returncode == 0


class Containers:
    """The project, from a checkout that was made with umask 077."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.peaks: dict[str, float] = defaultdict(float)
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith(("FINPRO_", "COMPOSE_"))}
        self._environment["COMPOSE_PROJECT_NAME"] = PROJECT
        kept = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        files = subprocess.run(kept, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        for name in filter(lambda name: name and (ROOT / name).is_file(), files):
            target = folder / name
            for parent in reversed(target.relative_to(folder).parents[:-1]):
                (folder / parent).mkdir(mode=0o700, exist_ok=True)
            shutil.copyfile(ROOT / name, target)
            target.chmod(0o600)

    @property
    def secrets(self) -> dict[str, str]:
        """What is in `.env` by now, by name."""
        return {name: value for name, value in dotenv_values(self.folder / ".env").items() if value}

    def sh(self, script: str, *arguments: str, seconds: float = 1500) -> str:
        """Run a script of conf/docker to its end; returns what it said. Where it fails, the ends of all logs are shown."""
        try:
            return self._run(["sh", f"conf/docker/{script}", *arguments], seconds)
        except AssertionError:
            print(self.compose("logs", "--no-color", "--tail", "30", check=False))
            raise

    def compose(self, *arguments: str, seconds: float = 900, check: bool = True, profiles: str = "*") -> str:
        """Run `docker compose` with all profiles; returns its output."""
        return self._run(["docker", "compose", "--profile", profiles, *arguments], seconds, check=check)

    def finpro(self, *arguments: str, seconds: float = 600, check: bool = True) -> str:
        """A command in a container of its own, as the page says; returns all that it said."""
        return self._run(["docker", "compose", "run", "--rm", "--no-TTY", "finpro", *arguments], seconds, check=check)

    def _run(self, command: list[str], seconds: float, *, check: bool = True) -> str:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
        assert not check or done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-6000:]}"
        return done.stdout

    def docker(self, *arguments: str, seconds: float = 120) -> str:
        """Run `docker` in the checkout; returns its output."""
        return self._run(["docker", *arguments], seconds)

    def query(self, sql: str) -> str:
        """One value of finpro's database."""
        dsn = f"postgresql://finpro:{self.secrets['FINPRO_POSTGRES_PASSWORD']}@127.0.0.1:5432/finpro"
        return self.compose(
            "exec", "--no-TTY", "postgres", "psql", dsn, "--tuples-only", "--no-align", "--command", sql
        ).strip()

    def containers(self) -> dict[str, dict[str, Any]]:
        """What `docker inspect` shows of each service's container."""
        ids = self.compose("ps", "--all", "--quiet").split()
        shown = json.loads(_docker("inspect", *ids)) if ids else []
        return {one["Config"]["Labels"]["com.docker.compose.service"]: one for one in shown}

    def named(self, kind: str) -> list[str]:
        """Volumes or networks of the project."""
        project = ["--filter", f"label=com.docker.compose.project={PROJECT}"]
        return sorted(_docker(kind, "ls", *project, "--format", "{{.Name}}").split())

    def kill(self, service: str) -> None:
        """SIGKILL to the first process of a container, from outside: the engine takes it for a crash."""
        pid = self.containers()[service]["State"]["Pid"]
        _docker(
            "run", "--rm", "--cap-add", "KILL", "--pid", "host", "--user", "0", "finpro:0.1.0", "sh", "-c", f"kill -9 {pid}"
        )

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside the block all containers' memory is looked at: the most of each is in `peaks`, as a share of its limit."""
        ended = threading.Event()

        def look() -> None:
            while not ended.wait(5):
                for line in _docker("stats", "--no-stream", "--format", "{{json .}}").splitlines():
                    one = json.loads(line)
                    if not one["Name"].startswith(f"{PROJECT}-"):
                        continue  # of somebody else, or one that has just ended and has no name any more
                    service = one["Name"].removeprefix(f"{PROJECT}-").rpartition("-")[0]
                    self.peaks[service] = max(self.peaks[service], float(one["MemPerc"].rstrip("%")) / 100)

        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()


def _docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"docker {' '.join(arguments)} ended with {done.returncode}: {done.stderr}"
    return done.stdout
