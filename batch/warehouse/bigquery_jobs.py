"""BigQuery jobs under names of their own: whoever asks for the same job again gets that job, not a second one."""

import itertools
import time
from collections.abc import Callable
from typing import cast

from google.api_core.exceptions import Conflict, GoogleAPICallError, NotFound
from google.api_core.retry import Retry, if_exception_type
from google.cloud import bigquery

from batch.refusals import refusal_of, worth_another_try
from conf.errors import LoadError

Job = bigquery.LoadJob | bigquery.QueryJob

_PAUSES = (1, 4, 15, 60, 120)  # seconds before a job that failed for no fault of its own is submitted again
# For a moment, a job that another process has just submitted can be in the way and not yet be found.
_UNTIL_FOUND = Retry(predicate=if_exception_type(NotFound), timeout=30)


def run_once(
    client: bigquery.Client, location: str, name: str, submit: Callable[[str], Job], *, counts: Callable[[], bool]
) -> Job:
    """See to it that a job has run, whoever started it, and return it when it is done.

    The ids are `<name>_1`, `<name>_2`, …: a job that runs is waited for; after one that failed, or whose result is no
    longer there, the next is submitted. `submit` starts a job under the id it is given; `counts` tells whether a job that
    had succeeded before still counts. A job of this call that fails where another try can help gets some, for minutes.

    Raises:
        LoadError: the job that this call submitted failed, for a reason of its own.
        GoogleAPICallError: BigQuery refuses or does not answer; see batch.google_cloud.explained.
    """
    job_ids = (f"{name}_{attempt}" for attempt in itertools.count(1))
    pauses = iter(_PAUSES)
    while True:
        job_id = next(job_ids)
        earlier = _find(client, location, job_id)
        if earlier is None:
            try:
                job = submit(job_id)
            except Conflict:  # another process was faster by a moment
                earlier = _UNTIL_FOUND(_get)(client, location, job_id)
            else:
                failure = _failure(job)
                pause = next(pauses, None) if failure and worth_another_try(failure) else None
                if failure is None:
                    return job
                if pause is None:
                    raise _explained(job, failure) from failure
                time.sleep(pause)
                continue
        was_running = earlier.state != "DONE"
        if _failure(earlier) is None and (was_running or counts()):
            return earlier


def _find(client: bigquery.Client, location: str, job_id: str) -> Job | None:
    try:
        return _get(client, location, job_id)
    except NotFound:
        return None


def _get(client: bigquery.Client, location: str, job_id: str) -> Job:
    return cast("Job", client.get_job(job_id, location=location))


def _failure(job: Job) -> GoogleAPICallError | None:
    """Wait for a job; what it ended with, None when it went well."""
    try:
        job.result()
    except GoogleAPICallError as error:
        if job.error_result is None:
            raise
        return error
    return None


def _explained(job: Job, failure: GoogleAPICallError) -> Exception:
    """What is known by name is explained where all of BigQuery's errors are."""
    if refusal_of(failure) is not None:
        return failure
    assert job.error_result is not None  # noqa: S101  the job has ended, and not well
    return LoadError(f"BigQuery job {job.job_id} failed: {job.error_result.get('message', failure)}")
