"""What is loaded into the warehouse has been through Kafka: these tests need no topics."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from conf.settings import Settings
from jobs.local.platform import Platform
from tests.conftest import own_settings


@pytest.fixture
def settings(platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """`own_settings`, without topics."""
    with own_settings(platform, tmp_path, monkeypatch) as settings:
        yield settings
