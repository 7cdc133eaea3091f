"""BigQuery jobs under names of their own: whoever asks for the same job again gets that job, not a second one."""

import itertools
from collections.abc import Callable
from typing import cast

from google.api_core.exceptions import Conflict, GoogleAPICallError, NotFound
from google.cloud import bigquery

from conf.errors import LoadError

Job = bigquery.LoadJob | bigquery.QueryJob


def run_once(
    client: bigquery.Client, location: str, name: str, submit: Callable[[str], Job], *, counts: Callable[[], bool]
) -> Job:
    """See to it that a job has run, whoever started it, and return it when it is done.

    The ids are `<name>_1`, `<name>_2`, …: a job that runs is waited for; after one that failed, or whose result is no
    longer there, the next is submitted. `submit` starts a job under the id it is given; `counts` tells whether a job that
    had succeeded before still counts.

    Raises:
        LoadError: the job that this call submitted failed.
        GoogleAPICallError: BigQuery refuses or does not answer.
    """
    job_ids = (f"{name}_{attempt}" for attempt in itertools.count(1))
    while True:
        job_id = next(job_ids)
        earlier = _find(client, location, job_id)
        if earlier is None:
            try:
                job = submit(job_id)
            except Conflict:  # another process was faster by a moment
                earlier = _get(client, location, job_id)
            else:
                return _done(job)
        was_running = earlier.state != "DONE"
        if _succeeded(earlier) and (was_running or counts()):
            return earlier


def _find(client: bigquery.Client, location: str, job_id: str) -> Job | None:
    try:
        return _get(client, location, job_id)
    except NotFound:
        return None


def _get(client: bigquery.Client, location: str, job_id: str) -> Job:
    return cast("Job", client.get_job(job_id, location=location))


def _done(job: Job) -> Job:
    try:
        job.result()
    except GoogleAPICallError as error:
        if job.error_result is None:
            raise
        raise LoadError(f"BigQuery job {job.job_id} failed: {job.error_result.get('message', error)}") from error
    return job


def _succeeded(job: Job) -> bool:
    """Wait for a job of another process; whether it went well."""
    try:
        job.result()
    except GoogleAPICallError:
        if job.error_result is None:
            raise
    return job.error_result is None
