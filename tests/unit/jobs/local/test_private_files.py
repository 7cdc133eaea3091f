"""Files that several write at once."""

import os
import threading
from pathlib import Path

import pytest

from jobs.local.private_files import write_private


def test_two_containers_whose_processes_have_one_number_write_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 7)
    failed: list[Exception] = []

    def write() -> None:
        try:
            for _ in range(200):
                write_private(tmp_path / "java", "#!/bin/sh\n")
        except OSError as error:
            failed.append(error)

    writers = [threading.Thread(target=write) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()

    assert failed == []
    assert [path.name for path in tmp_path.iterdir()] == ["java"]
