"""The pages of the containers: what is served of finpro's home, and what is not."""

import runpy
import threading
from collections.abc import Iterator
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests

from conf.settings import CONF_DIR
from expectations.outcome import data_docs
from jobs.transform import docs_page
from tests.runs.compose import services

PROGRAM: dict[str, Any] = runpy.run_path(str(CONF_DIR / "docker" / "pages.py"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with some pages, and with what is none."""
    home = tmp_path_factory.mktemp("outside") / "home"
    for name in ("report.html", "data_docs/index.html", "data_docs/static/a.css", "lakehouse/bronze", "logs/screen.log"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(name)
    (home.parent / "secret").write_text("secret")
    return home


@pytest.fixture(scope="module")
def url(home: Path) -> Iterator[str]:
    """Where they are served."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(PROGRAM["Pages"], directory=str(home))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("page", ["report.html", "data_docs/index.html", "data_docs/static/a.css", "data_docs/../report.html"])
def test_pages_are_served(url: str, page: str) -> None:
    answer = requests.get(f"{url}/{page}", timeout=5)

    assert (answer.status_code, answer.text) == (200, page.removeprefix("data_docs/../"))


@pytest.mark.parametrize(
    "other",
    [
        *("lakehouse/bronze", "logs/screen.log", "data_docs", "data_docs/", "data_docs/static/", "dbt_docs/index.html"),
        *("data_docs/%2e%2e/logs/screen.log", "%2e%2e/secret", "..%2fsecret", "//secret", "report.html/../lakehouse/bronze"),
    ],
)
def test_nothing_else_is(url: str, other: str) -> None:
    request = requests.Request("GET", url).prepare()
    request.url = f"{url}/{other}"  # as it stands: the library would tidy it up

    assert requests.Session().send(request, timeout=5).status_code == 404


def test_the_first_page_leads_to_those_that_are_there(url: str) -> None:
    page = requests.get(url, timeout=5).text

    assert '<a href="report.html">' in page
    assert "The models and columns: not written yet" in page


def test_the_pages_lie_where_the_commands_write_them(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINPRO_HOME", str(home))
    links = {link for link, _ in PROGRAM["PAGES"].values()}

    assert {str(page.relative_to(home)) for page in (docs_page(), data_docs() / "index.html")} <= links
    assert links == {link for link, _ in PROGRAM["PAGES"].values() if link.split("/")[0] in PROGRAM["PAGES"]}


def test_what_the_first_page_leads_to_is_published() -> None:
    published = {port.rpartition(":")[0] for service in services().values() for port in service.get("ports", [])}

    assert {url.removeprefix("http://") for url in PROGRAM["OTHERS"]} <= published
