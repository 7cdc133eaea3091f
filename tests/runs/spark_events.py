"""Spark's event log of a job that a test starts: what the history server would show of it."""

import json
from collections import Counter
from pathlib import Path


def event_log(folder: Path) -> list[str]:
    """Options for a job that is to write its event log, as plain text, into a new folder."""
    folder.mkdir()
    properties = {
        "spark.eventLog.enabled": "true",
        "spark.eventLog.dir": f"file://{folder}",
        "spark.eventLog.compress": "false",
    }
    return [part for name, value in properties.items() for part in ("--conf", f"{name}={value}")]


def tasks_by_executor(folder: Path) -> Counter[str]:
    """How many tasks succeeded on each executor."""
    events = [json.loads(line) for path in folder.rglob("events*") for line in path.read_text().splitlines()]
    ended = [event for event in events if event["Event"] == "SparkListenerTaskEnd"]
    return Counter(event["Task Info"]["Executor ID"] for event in ended if event["Task End Reason"]["Reason"] == "Success")
