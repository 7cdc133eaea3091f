"""What BigQuery refuses, by name, and what to do about each: its errors have a reason, and say the rest in words only."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.api_core.exceptions import GoogleAPICallError, RetryError


@dataclass(frozen=True)
class Refusal:
    """A kind of error of BigQuery's.

    It is known by one of its `reasons`, which are the API's, or by `words`, a pattern of its message. `another_try`: the same
    again may go well in a moment. `for_a_person`: it will not before somebody has done something.
    """

    advice: str
    reasons: frozenset[str] = frozenset()
    words: str = r"(?!)"  # which fits nothing
    another_try: bool = False
    for_a_person: bool = True

    def fits(self, reason: str, message: str) -> bool:
        """Whether an error is of this kind."""
        return reason in self.reasons or re.search(self.words, message, re.IGNORECASE) is not None


_REASON_OF_STATUS = {429: "rateLimitExceeded", 500: "internalError", 502: "badGateway", 503: "backendError"}  # from a proxy

# The first that fits counts. Reasons: https://cloud.google.com/bigquery/docs/error-messages
REFUSALS = {
    "billing": Refusal(
        "The project has no billing account, and BigQuery's sandbox changes no rows and deletes tables after 60 days:"
        " `gcloud billing projects link {project} --billing-account=ACCOUNT`.",
        reasons=frozenset({"billingNotEnabled"}),
        words=r"billing has not been enabled|not allowed in the free tier",
    ),
    "bytes billed": Refusal(
        "The statement would read more than FINPRO_BIGQUERY_MAX_BYTES_BILLED allows; nothing was read or charged. Find out why"
        " it reads so much (its job is in BigQuery's history, with finpro's labels), or raise the setting.",
        reasons=frozenset({"bytesBilledLimitExceeded"}),
        words=r"exceeded limit for bytes billed",
    ),
    "concurrent changes": Refusal(
        "Something else changes the same table at the same time. finpro tried for a while: find out what it is (BigQuery's job"
        " history), then start the same again.",
        words=r"could not serialize access|aborted due to concurrent update|too many DML statements outstanding",
        another_try=True,
        for_a_person=False,
    ),
    "rate": Refusal(
        "BigQuery was asked too much in too short a time, and still after some tries: start the same again in some minutes.",
        reasons=frozenset({"rateLimitExceeded", "jobRateLimitExceeded"}),
        words=r"exceeded rate limits",
        another_try=True,
        for_a_person=False,
    ),
    "quota": Refusal(
        "A quota is used up; no right is missing. Start the same again when it is free again: daily quotas are at midnight in"
        " California, others within minutes. Which quotas project {project} has, and how to ask for more:"
        " https://console.cloud.google.com/iam-admin/quotas.",
        reasons=frozenset({"quotaExceeded"}),
        words=r"quota exceeded",
        for_a_person=False,
    ),
    "partitions of a job": Refusal(
        "One job may change 4,000 days of a table at most: bring orders of fewer days at once, or have those with an impossible"
        " created_date corrected.",
        words=r"too many partitions produced|allowed 4,?000",
    ),
    "partitions of a table": Refusal(
        "A table holds 10,000 days at most: orders with an impossible created_date have to be corrected, or old days deleted.",
        words=r"(too many|number of) partitions|partitions.*10,?000",
    ),
    "sources": Refusal(
        "One load job takes 10,000 files at most: export more often, so that a run has fewer.",
        words=r"too many sources provided",
    ),
    "overflow": Refusal(
        "A number is beyond 64 bits, or a sum of some is: look for orders with an impossible amount or quantity"
        " (`select order_id, amount_numeric, quantity from raw_orders order by greatest(amount_numeric, quantity) desc limit"
        " 10`) and have them corrected.",
        words=r"(int64|integer|numeric|sum).{0,40}overflow|overflow.{0,40}(int64|sum)",
    ),
    "resources": Refusal(
        "The statement is more than BigQuery does at once: select less, or ask for more slots.",
        reasons=frozenset({"resourcesExceeded", "responseTooLarge", "billingTierLimitExceeded"}),
        words=r"resources exceeded",
    ),
    "a fault of BigQuery": Refusal(
        "BigQuery has a fault of its own, and still had after some tries: start the same again later"
        " (Google's own: https://status.cloud.google.com).",
        reasons=frozenset({"backendError", "internalError", "jobBackendError", "jobInternalError", "badGateway"}),
        another_try=True,
        for_a_person=False,
    ),
}


def refusal_of(error: BaseException | None) -> Refusal | None:
    """The kind of an error; None when it is none of these, or not one of the API's."""
    if isinstance(error, RetryError):
        return refusal_of(error.cause)
    if not isinstance(error, GoogleAPICallError):
        return None
    first: Mapping[str, Any] = error.errors[0] if error.errors and isinstance(error.errors[0], Mapping) else {}
    return _kind(str(first.get("reason") or _REASON_OF_STATUS.get(error.code or 0, "")), str(error.message))


def worth_another_try(error: BaseException) -> bool:
    """Whether the same job may go well in a moment: nothing is wrong with it."""
    kind = refusal_of(error)
    return kind is not None and kind.another_try


def advice_on(message: str, project: str | None) -> str | None:
    """What to do about an error of which only BigQuery's words are left; None when they are not known."""
    kind = _kind("", message)
    return None if kind is None else kind.advice.format(project=project)


def _kind(reason: str, message: str) -> Refusal | None:
    return next((kind for kind in REFUSALS.values() if kind.fits(reason, message)), None)
