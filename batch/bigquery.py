"""The client that all of finpro's statements go through: its jobs have labels and a limit of bytes, and are counted.

Importing this takes half a second, because the library does.
"""

import os
import re
from dataclasses import dataclass
from typing import Any

from google.api_core.exceptions import Forbidden, GoogleAPICallError
from google.api_core.retry import Retry
from google.cloud import bigquery

from batch.refusals import refusal_of, worth_another_try

# A statement that failed is sent again where that can help: after a second or less, then after longer and longer.
_JOB_RETRY = Retry(predicate=worth_another_try, timeout=600)


@dataclass(frozen=True)
class Usage:
    """What the statements of a step have read, in bytes; `billed` is what Google charges for."""

    jobs: int
    processed: int
    billed: int


class Client(bigquery.Client):
    """Sends each job with the labels `dag`, `run` and `step`, and no query that would be charged for more than so many bytes.

    `dag` is the DAG that Airflow runs this process for, or `manual`. `refusal` is the last error of `query_and_wait` that is
    BigQuery's own and not the statement's, for who calls it through a library that keeps errors to itself.
    """

    refusal: GoogleAPICallError | None = None

    def __init__(self, project: str, *, step: str, run_id: str | None, max_bytes_billed: int | None, **reach: Any) -> None:
        labels = job_labels(os.environ.get("AIRFLOW_CTX_DAG_ID", "manual"), step, run_id)
        limit = {} if max_bytes_billed is None else {"maximum_bytes_billed": max_bytes_billed}
        super().__init__(
            project,
            default_query_job_config=bigquery.QueryJobConfig(labels=labels, **limit),
            default_load_job_config=bigquery.LoadJobConfig(labels=labels),
            **reach,
        )
        self._queries: list[bigquery.QueryJob] = []

    def query(self, query: str, *arguments: Any, **keywords: Any) -> bigquery.QueryJob:
        """Start a statement; one without a job id of its own is sent again where another try can help, for ten minutes."""
        if keywords.get("job_id") is None:
            keywords.setdefault("job_retry", _JOB_RETRY)
        job = super().query(query, *arguments, **keywords)
        self._queries.append(job)
        return job

    def query_and_wait(self, query: str, *, page_size: int | None = None, **keywords: Any) -> Any:
        """The rows of a statement: through `query`, so that it is counted."""
        try:
            return self.query(query, **keywords).result(page_size=page_size)
        except GoogleAPICallError as error:
            if isinstance(error, Forbidden) or refusal_of(error):
                self.refusal = error
            raise

    def usage(self) -> Usage:
        """What this client's statements have read by now; those that have not ended count nothing."""
        processed = sum(job.total_bytes_processed or 0 for job in self._queries)
        billed = sum(job.total_bytes_billed or 0 for job in self._queries)
        return Usage(len(self._queries), processed, billed)


def job_labels(dag_id: str, step: str, run_id: str | None) -> dict[str, str]:
    """The labels of a job: 63 characters of `a-z0-9_-` each, which is what BigQuery takes."""
    wanted = {"dag": dag_id, "run": run_id or "", "step": step}
    return {name: re.sub("[^a-z0-9_-]", "_", value.lower())[:63] for name, value in wanted.items()}
