"""Serves the pages that finpro writes for people, and of its home nothing else: `python pages.py HOME PORT`.

The first page leads to them, and to what else of docker-compose.yml can be opened. The report is there after `finpro report`,
data docs after `finpro validate`, the models' pages after `finpro transform`, the backtest after `finpro backtest`.
"""

import sys
from functools import partial
from html import escape
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

# What is served, and what it is called: the first part of a path.
PAGES = {
    "report.html": ("report.html", "The report"),
    "data_docs": ("data_docs/index.html", "Data docs: what the gate checked"),
    "dbt_docs": ("dbt_docs/index.html", "The models and columns"),
    "backtest.html": ("backtest.html", "The last backtest"),
}
OTHERS = {
    "http://127.0.0.1:4040": "Spark, screening",
    "http://127.0.0.1:4041": "Spark, archiving",
    "http://127.0.0.1:18080": "Spark, what was run (profile monitoring or cluster)",
    "http://127.0.0.1:8080": "Airflow (profile airflow)",
    "http://127.0.0.1:3000": "Grafana (profile monitoring)",
    "http://127.0.0.1:8082": "Kafka's topics (profile monitoring)",
    "http://127.0.0.1:9090": "Prometheus (profile monitoring)",
    "http://127.0.0.1:8090": "Spark's cluster (profile cluster)",
}


class Pages(SimpleHTTPRequestHandler):
    """Answers with files of the folder, if they are among the pages."""

    def send_head(self) -> BytesIO | BinaryIO | None:
        """What GET and HEAD have in common."""
        home, path = Path(self.directory), Path(self.translate_path(self.path))
        inside = path.relative_to(home).parts
        if not inside:
            return self._first_page(home)
        if inside[0] not in PAGES or path.is_dir():
            self.send_error(HTTPStatus.NOT_FOUND)
            return None
        return super().send_head()

    def _first_page(self, home: Path) -> BytesIO:
        written = [
            f'<li><a href="{link}">{escape(title)}</a></li>'
            if (home / link).exists()
            else f"<li>{escape(title)}: not written yet</li>"
            for link, title in PAGES.values()
        ]
        others = [f'<li><a href="{url}">{escape(title)}</a></li>' for url, title in OTHERS.items()]
        page = (
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>finpro</title>'
            f"<h1>finpro</h1><ul>{''.join(written)}</ul><h2>Beside it</h2><ul>{''.join(others)}</ul></html>"
        ).encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        return BytesIO(page)

    def log_message(self, *_: object) -> None:
        """Say nothing: health checks would fill the log."""


if __name__ == "__main__":
    folder, port = sys.argv[1:]
    # All addresses of its container, which publishes it on loopback.
    ThreadingHTTPServer(("0.0.0.0", int(port)), partial(Pages, directory=folder)).serve_forever()  # noqa: S104
