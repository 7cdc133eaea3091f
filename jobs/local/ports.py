"""Loopback ports: the same ones from run to run, as long as nobody else takes them meanwhile."""

import json
import os
import socket
from pathlib import Path

from jobs.local.private_files import private_directory, write_private

LOOPBACK = "127.0.0.1"


def claim_ports(home: Path, names: tuple[str, ...]) -> dict[str, int]:
    """A free port for each name: the one it had, or a new one where that is taken. Remembered under `home`."""
    file = private_directory(home / "run") / "ports.json"
    remembered = remembered_ports(home)
    claimed = {name: remembered[name] for name in names if name in remembered and is_free(remembered[name])}
    for name in names:
        if name not in claimed:
            claimed[name] = _new_port(taken={*remembered.values(), *claimed.values()})
    write_private(file, json.dumps(remembered | claimed))
    return claimed


def remembered_ports(home: Path) -> dict[str, int]:
    """The ports of the last run by name; empty before the first."""
    try:
        ports: dict[str, int] = json.loads((home / "run" / "ports.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return ports


def is_free(port: int) -> bool:
    """Whether a server could listen on this port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: a closing connection is no obstacle
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def accepts_connections(port: int) -> bool:
    """Whether something listens on this port now."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((LOOPBACK, port)) == 0


def bypass_proxies() -> None:
    """Have HTTP clients of this process and its children reach this machine directly, whatever proxy the rest goes through."""
    excepted = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if LOOPBACK not in excepted.split(","):
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, [excepted, LOOPBACK]))


def _new_port(taken: set[int]) -> int:
    while True:
        with socket.socket() as probe:
            probe.bind((LOOPBACK, 0))
            port: int = probe.getsockname()[1]
        if port not in taken:
            return port
