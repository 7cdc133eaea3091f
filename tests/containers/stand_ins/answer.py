"""Answers every request with nothing, at the port that PORT names."""

import os
from http.server import BaseHTTPRequestHandler, HTTPServer


class Nothing(BaseHTTPRequestHandler):
    """Says that all is well."""

    def do_GET(self) -> None:
        """Answer."""
        self.send_response(200)
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815


HTTPServer(("", int(os.environ["PORT"])), Nothing).serve_forever()
