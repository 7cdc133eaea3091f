"""What the real BigQuery answers when it refuses: status, reason and words as its documentation and public reports have them.

Each is answered to the request that asks for a job, or, where it is found out later, is the result of the job.
"""

import json
from dataclasses import dataclass
from typing import Any

import requests

Json = dict[str, Any]

SOURCES_PER_JOB = 10_000
PARTITIONS_PER_JOB = 4_000


@dataclass(frozen=True)
class Refusal:
    """An error of BigQuery; `of_the_job` when the job is taken and ends with it."""

    status: int
    reason: str
    message: str
    of_the_job: bool = False

    @property
    def error(self) -> Json:
        """The error as the API writes it into a list of errors and into a job."""
        return {"reason": self.reason, "message": self.message, "location": "q", "locationType": "parameter"}

    def answer(self, method: str, url: str, asked: Json) -> requests.Response:
        """The answer to a request for a job."""
        if not self.of_the_job:
            error = {**self.error, "domain": "global"}
            return answered(
                method, url, self.status, {"error": {"code": self.status, "message": self.message, "errors": [error]}}
            )
        status = {"state": "DONE", "errorResult": self.error, "errors": [self.error]}
        return answered(method, url, 200, {**asked, "status": status, "statistics": {}})


def answered(method: str, url: str, status: int, body: Json) -> requests.Response:
    """An answer of the API, as the client's connection gets it."""
    answer = requests.Response()
    answer.status_code = status
    answer.headers["Content-Type"] = "application/json"
    answer.request = requests.Request(method, url).prepare()
    answer._content = json.dumps(body).encode()
    return answer


def invalid_query(message: str) -> Refusal:
    """A statement that is not GoogleSQL over these tables."""
    return Refusal(400, "invalidQuery", message)


def too_many_sources(sources: int) -> Refusal:
    """A load of more files than one job takes."""
    return Refusal(400, "invalid", f"Too many sources provided: {sources}. Limit is {SOURCES_PER_JOB}.")


def too_many_partitions(partitions: int) -> Refusal:
    """A statement that changes more partitions of a table than one job may."""
    message = (
        f"Too many partitions produced by query, allowed {PARTITIONS_PER_JOB}, query produces at least {partitions} partitions"
    )
    return Refusal(400, "invalidQuery", message, of_the_job=True)


ACCESS_DENIED = Refusal(
    403, "accessDenied", "Access Denied: Dataset p:d: Permission bigquery.tables.create denied on dataset p:d"
)
BACKEND_ERROR = Refusal(503, "backendError", "Error encountered during execution. Retrying may solve the problem.")
BILLING_NOT_ENABLED = Refusal(
    403,
    "billingNotEnabled",
    "Billing has not been enabled for this project. Enable billing at https://console.cloud.google.com/billing. DML queries are"
    " not allowed in the free tier. Set up a billing account to remove this restriction.",
)
BYTES_BILLED = Refusal(
    500,
    "bytesBilledLimitExceeded",
    "Query exceeded limit for bytes billed: 163595928. 164626432 or higher required.",
    of_the_job=True,
)
CONCURRENT_UPDATE = Refusal(
    400, "invalidQuery", "Could not serialize access to table p:d.raw_orders due to concurrent update", of_the_job=True
)
DUPLICATE = Refusal(409, "duplicate", "Already Exists: Job p:EU.finpro_run_raw_orders_1")
JOB_INTERNAL_ERROR = Refusal(
    400, "jobInternalError", "The job encountered an internal error during execution.", of_the_job=True
)
JOB_RATE_LIMIT = Refusal(
    400, "jobRateLimitExceeded", "Exceeded rate limits: too many table update operations for this table.", of_the_job=True
)
OUTSTANDING_DML = Refusal(
    400,
    "resourcesExceeded",
    "Resources exceeded during query execution: Too many DML statements outstanding against table p:d.raw_orders, limit is 20",
    of_the_job=True,
)
OVERFLOW = Refusal(400, "invalidQuery", "int64 overflow: 4611686018427387904 + 4611686018427387904", of_the_job=True)
PARTITIONS_OF_A_JOB = too_many_partitions(4_001)
# Its words are a guess, which tests/gcp holds against the real ones: no report of it was found.
PARTITIONS_OF_A_TABLE = Refusal(
    400, "invalid", "Too many partitions: the table p:d.raw_orders would have 10001 partitions, allowed 10000", of_the_job=True
)
PARTITION_CHANGES = Refusal(
    403,
    "quotaExceeded",
    "Quota exceeded: Your table exceeded quota for Number of partition modifications to a column partitioned table",
    of_the_job=True,
)
QUOTA_EXCEEDED = Refusal(
    403,
    "quotaExceeded",
    "Custom quota exceeded: Your usage exceeded the custom quota for QueryUsagePerDay, which is set by your administrator.",
)
RATE_LIMIT = Refusal(403, "rateLimitExceeded", "Exceeded rate limits: too many api requests per user per method for this user.")
