"""What stands between a client and a Postgres on this machine: a network that falls silent, a pooler that knows no options."""

import ctypes
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from urllib.parse import urlsplit

from jobs.local.ports import LOOPBACK

_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
_DROP_ALL = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # a BPF program: keep 0 bytes of each packet
_REFUSAL = b"SFATAL\0VFATAL\0C08P01\0Munsupported startup parameter: options\0\0"  # as PgBouncer says it


class Options(Enum):
    """What becomes of the options that a client starts with: poolers do the last two."""

    PASSED_ON = 0
    REFUSED = 1
    SWALLOWED = 2


class Relay:
    """Passes on what comes to `port`, until it is silent."""

    def __init__(self, server_port: int, options: Options = Options.PASSED_ON) -> None:
        self._server, self._options = (LOOPBACK, server_port), options
        self._listener = socket.create_server((LOOPBACK, 0))
        self.port: int = self._listener.getsockname()[1]
        self._clients: list[socket.socket] = []
        self._flows = threading.Event()
        self._flows.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def dsn(self, dsn: str, **parameters: str) -> str:
        """A DSN of the server that leads here, unencrypted."""
        parts = urlsplit(dsn)
        parameters |= {"sslmode": "disable", "gssencmode": "disable"}
        query = "&".join(f"{name}={value}" for name, value in parameters.items())
        login = parts.netloc.rpartition("@")[0]
        return parts._replace(netloc=f"{login}@{LOOPBACK}:{self.port}", query=query).geturl()

    @contextmanager
    def silence(self) -> Iterator[None]:
        """Inside the block the packets of clients are lost, unacknowledged, and nobody is told: a network that is gone."""
        program = struct.pack("HP", 1, ctypes.addressof(_DROP_ALL))
        ends = [self._listener, *self._clients]
        for end in ends:
            with suppress(OSError):  # of a client that has gone
                end.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
        try:
            with self.frozen():
                yield
        finally:
            for end in ends:
                with suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside the block all is acknowledged, and nothing answered: a server whose processes are stopped."""
        self._flows.clear()
        try:
            yield
        finally:
            self._flows.set()

    def close(self) -> None:
        """Let no more clients come, and end those that are there."""
        for end in (self._listener, *self._clients):
            end.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._clients.append(client)
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError), socket.create_connection(self._server) as server:
            if self._options is not Options.PASSED_ON:
                length = struct.unpack("!I", client.recv(4, socket.MSG_WAITALL))[0]
                start = client.recv(length - 4, socket.MSG_WAITALL)
                if self._options is Options.REFUSED and b"\0options\0" in start:
                    client.sendall(b"E" + struct.pack("!I", len(_REFUSAL) + 4) + _REFUSAL)
                    client.close()
                    return
                start = re.sub(rb"\0options\0[^\0]+", b"", start)
                server.sendall(struct.pack("!I", len(start) + 4) + start)
            threading.Thread(target=self._pass_on, args=(server, client), daemon=True).start()
            self._pass_on(client, server)

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                self._flows.wait()
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
