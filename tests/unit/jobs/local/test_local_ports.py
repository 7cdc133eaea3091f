"""What stays on this machine is reached without the proxies that lead out of it."""

import pytest
from requests.utils import should_bypass_proxies

from jobs.local.ports import LOOPBACK, bypass_proxies


@pytest.mark.parametrize("spelling", ["no_proxy", "NO_PROXY"])
def test_loopback_joins_the_hosts_that_need_no_proxy(spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv(spelling, "intranet.example")

    bypass_proxies()

    bypassed = {
        host: should_bypass_proxies(f"http://{host}/", no_proxy=None) for host in (LOOPBACK, "intranet.example", "a.example")
    }
    assert bypassed == {LOOPBACK: True, "intranet.example": True, "a.example": False}
