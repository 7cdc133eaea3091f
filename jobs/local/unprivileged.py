"""A way for root to run Postgres, which refuses to be root.

The platform's folder and the binaries may lie below a folder that only root can enter, so another user id is not
enough: it could not reach them. Two ways need no file to move, and between them cover virtual machines, containers
and sandboxes:

- a user namespace, in which root's files are seen as those of an ordinary user (containers often forbid it);
- another user id that keeps one right of root's, to pass by file permissions (a sandbox that knows one user id only
  forbids that).
"""

import os
import pwd
import shutil
from dataclasses import dataclass
from pathlib import Path

from conf.errors import PlatformError
from jobs.local.processes import run_once

_ACCOUNT = "nobody"


@dataclass(frozen=True)
class Unprivileged:
    """How to run a program as not-root: what to put before its command, and who must own its files."""

    prefix: tuple[str, ...]
    owner: int

    @classmethod
    def find(cls, folder: Path, program: list[str]) -> "Unprivileged":
        """The way that works here: the plain one when this is not root.

        Args:
            folder: where its files will be: a file is written there, to try.
            program: a command that succeeds for who can reach what it is made of.

        Raises:
            PlatformError: this is root, and nothing works.
        """
        if os.geteuid() != 0:
            return cls((), os.geteuid())
        for way in ways_for_root():
            if way._works(folder, program):
                return way
        raise PlatformError(
            f"Postgres refuses to run as root, and this machine lets root become {_ACCOUNT} neither in a user namespace"
            " (unshare) nor with CAP_DAC_OVERRIDE (setpriv): run finpro as an ordinary user."
        )

    def command(self, command: list[str]) -> list[str]:
        """`command`, run that way; the process keeps its pid."""
        return [*self.prefix, *command]

    def own(self, folder: Path) -> None:
        """Give a folder and all in it to the user that the program needs to be their owner."""
        if folder.stat().st_uid == self.owner:
            return
        for path in [*folder.rglob("*"), folder]:  # the folder last: its owner says whether all of it is done
            os.chown(path, self.owner, -1, follow_symlinks=False)

    def _works(self, folder: Path, program: list[str]) -> bool:
        probe = folder / "probe"
        probe.mkdir(mode=0o700, exist_ok=True)
        try:
            os.chown(probe, self.owner, -1)
            run_once(self.command(["sh", "-c", 'test "$(id -u)" -ne 0 && : > file']), cwd=probe, failure="cannot write")
            run_once(self.command(program), cwd=probe, failure="cannot run")
        except (OSError, PlatformError):
            return False
        finally:
            shutil.rmtree(probe)
        return True


def ways_for_root() -> list[Unprivileged]:
    """The ways to try, best first: the namespace leaves every file root's."""
    try:
        account = pwd.getpwnam(_ACCOUNT)
    except KeyError:
        return []
    uid, gid, right = str(account.pw_uid), str(account.pw_gid), "-all,+dac_override"
    return [
        Unprivileged(("unshare", "--user", f"--map-user={uid}", f"--map-group={gid}"), 0),
        Unprivileged(
            (
                *("setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups"),
                *(f"--inh-caps={right}", f"--ambient-caps={right}", f"--bounding-set={right}", "--no-new-privs"),
                "--securebits=+no_setuid_fixup",  # access(2), by which Postgres looks for itself, minds the right only then
            ),
            account.pw_uid,
        ),
    ]
