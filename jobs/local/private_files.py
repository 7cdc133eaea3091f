"""Files and folders that only their owner may read: where the embedded platform keeps data, passwords and records."""

import fcntl
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def private_directory(path: Path) -> Path:
    """The folder at `path`, made where it is missing with all above it that is, mode 0700."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(mode=0o700, exist_ok=True)
    path.chmod(0o700)
    return path


def write_private(path: Path, text: str, *, mode: int = 0o600) -> None:
    """Replace the file at `path` by `text`: a reader sees the old text or the new one, never half of it."""
    # In another container that shares this folder a process may have the same number.
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as file:
        file.write(text)
    draft.replace(path)


def secret(path: Path) -> str:
    """The password kept at `path`: a random one the first time, the same ever after."""
    if not path.exists():
        private_directory(path.parent)
        write_private(path, secrets.token_urlsafe(24))
    return path.read_text(encoding="utf-8").strip()


@contextmanager
def exclusive_lock(path: Path, *, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock file at `path` for one block; `on_wait` is called once when another process holds it.

    The kernel drops the lock with the process that holds it, so a killed one blocks nobody.
    """
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600)) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
