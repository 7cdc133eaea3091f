"""Which process of a run takes which tests: those without Java fill the time in which the others wait."""

import os
from typing import TYPE_CHECKING

import pytest
from xdist.scheduler import LoadFileScheduling

if TYPE_CHECKING:
    from xdist.workermanage import WorkerController

_WITHOUT_JAVA = "tests/unit/"
_BESIDE_JAVA = 10  # as `nice` counts


def has_own_process(processes: int) -> bool:
    """Whether the tests without Java have a process of their own among so many: each other one runs a platform and a Spark."""
    return processes > 2


def _is_last(process: str, processes: int) -> bool:
    return process == f"gw{processes - 1}"


def give_way(worker: dict[str, object]) -> None:
    """Let this process have what the others leave of the processors, if it is the one for tests without Java.

    Args:
        worker: what pytest-xdist tells a process of itself (`workerinput`).
    """
    processes = int(str(worker["workercount"]))
    if has_own_process(processes) and _is_last(str(worker["workerid"]), processes):
        os.nice(_BESIDE_JAVA)


class JavaBeside(LoadFileScheduling):  # type: ignore[misc]
    """File by file, in order; the last process takes tests without Java only, and the others take these last of all."""

    def _reschedule(self, node: "WorkerController") -> None:
        if self._is_without_java(node) and not node.shutting_down and self._next_without_java() is None:
            node.shutdown()
            return
        super()._reschedule(node)

    def _assign_work_unit(self, node: "WorkerController") -> None:
        if self._is_without_java(node) and (scope := self._next_without_java()):
            self.workqueue.move_to_end(scope, last=False)
        super()._assign_work_unit(node)

    def _is_without_java(self, node: "WorkerController") -> bool:
        return _is_last(node.gateway.id, self.numnodes)

    def _next_without_java(self) -> str | None:
        return next((scope for scope in self.workqueue if scope.startswith(_WITHOUT_JAVA)), None)


def scheduler(config: pytest.Config, log: object) -> JavaBeside | None:
    """pytest-xdist's scheduler for a run, None for its usual one."""
    is_by_file = config.getoption("dist") == "loadfile"
    return JavaBeside(config, log) if is_by_file and has_own_process(config.getoption("numprocesses") or 0) else None
