"""A Discord webhook on this machine, which answers as it is told to and remembers what it was sent."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "aWebhook_Token-nobody-may-see"


@dataclass(frozen=True)
class Answer:
    """One answer: after `seconds`, then `seconds_a_byte` for each byte of its body."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: str = '{"id": "1"}'
    seconds: float = 0
    seconds_a_byte: float = 0


class Webhook:
    """The server: answers in turn, the last one for all that follow."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers) or [Answer()]
        self.received: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.done = threading.Event()

    @property
    def texts(self) -> list[str]:
        """Title and text of each message."""
        return [f"{embed['title']}\n{embed['description']}" for message in self.received for embed in message["embeds"]]

    def wait_for(self, messages: int, *, seconds: float = 20) -> None:
        """Wait until so many messages have come."""
        deadline = time.monotonic() + seconds
        while len(self.received) < messages:
            assert time.monotonic() < deadline, f"{len(self.received)} of {messages} messages after {seconds} s"
            time.sleep(0.02)

    @contextmanager
    def serving(self) -> Iterator[str]:
        """Serve for one block; gives the URL."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/api/webhooks/1234/{TOKEN}"
        finally:
            self.done.set()
            server.shutdown()
            server.server_close()
            thread.join()


def _handler(webhook: Webhook) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            webhook.times.append(time.monotonic())
            webhook.received.append(json.loads(body))
            answer = webhook.answers.pop(0) if len(webhook.answers) > 1 else webhook.answers[0]
            webhook.done.wait(answer.seconds)
            try:
                self._answer(answer)
            except OSError:  # the client has given up
                self.close_connection = True

        def _answer(self, answer: Answer) -> None:
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            for byte in answer.body:
                webhook.done.wait(answer.seconds_a_byte)
                self.wfile.write(byte.encode())

        def log_message(self, *_: object) -> None:
            pass

    return Handler
