"""What of the audit needs no Spark: periods, and verdicts on their way to the sinks."""

from datetime import UTC, datetime

import msgspec
import polars as pl
import pytest

from conf.errors import SettingsError
from conf.settings import Settings
from jobs.audit import check
from streaming.contract import ORDER_SCHEMA
from streaming.history.republish import as_verdicts
from streaming.history.unarchived import offsets_json
from streaming.screening.sinks import encode_verdicts
from streaming.screening.verdicts import VERDICT_SCHEMA

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
EVIDENCE = '{"order_ids":["a","b"],"value":2,"limit":2}'


def order(order_id: str, reasons: list[str], shadow_reasons: list[str], *suppressed: str) -> dict[str, object]:
    values: dict[str, object] = {
        name: NOW if dtype.is_temporal() else 1 if dtype.is_integer() else "x" for name, dtype in ORDER_SCHEMA.items()
    }
    parts = [f'"{reason}":{EVIDENCE}' for reason in sorted({*reasons, *shadow_reasons, *suppressed})]
    evidence: dict[str, object] = {"evidence": f"{{{','.join(parts)}}}"}
    found: dict[str, object] = {"reasons": reasons, "shadow_reasons": shadow_reasons, "suppressed_reasons": list(suppressed)}
    found["rules_version"] = "1"
    return values | evidence | found | {"order_id": order_id, "attributes": '{"device_id":"d1"}'}


def test_republished_orders_are_sent_with_the_reasons_of_each_kind_and_the_evidence_that_they_have() -> None:
    orders = pl.DataFrame(
        [
            order("a", ["foreign_country", "repeat_purchase"], ["night_amount"]),
            order("b", [], ["night_quantity"], "foreign_country", "repeat_purchase"),
            order("c", ["night_amount"], [], "repeat_purchase"),
        ],
        infer_schema_length=None,
    )
    verdicts = as_verdicts(orders)
    assert verdicts.schema == VERDICT_SCHEMA
    encoded = encode_verdicts(verdicts.with_columns(screened_at=pl.lit(NOW)), "1")
    (_, fraud, alert), (_, genuine, no_alert), (_, other, other_alert) = encoded.rows()
    said = msgspec.json.decode(fraud)
    assert "suppressed_reasons" not in said
    assert said["attributes"] == {"device_id": "d1"}
    assert (said["status"], said["reasons"]) == ("Fraud", ["foreign_country", "repeat_purchase"])
    assert said["shadow_reasons"] == ["night_amount"]
    assert sorted(msgspec.json.decode(alert)["evidence"]) == ["foreign_country", "repeat_purchase"]
    assert (msgspec.json.decode(genuine)["status"], no_alert) == ("Genuine", None)
    assert msgspec.json.decode(genuine)["shadow_reasons"] == ["night_quantity"]
    assert msgspec.json.decode(genuine)["suppressed_reasons"] == ["foreign_country", "repeat_purchase"]
    assert msgspec.json.decode(other)["suppressed_reasons"] == ["repeat_purchase"]
    assert list(msgspec.json.decode(other_alert)["evidence"]) == ["night_amount"]


def test_offsets_are_written_as_sparks_kafka_source_reads_them() -> None:
    assert offsets_json("orders", {1: 7, 0: 12}) == '{"orders": {"0": 12, "1": 7}}'


@pytest.mark.parametrize(("since", "until"), [("yesterday", None), ("2026-11-02", "2026-11-01")])
def test_a_period_that_makes_no_sense_is_said_before_anything_starts(since: str, until: str | None) -> None:
    with pytest.raises(SettingsError, match="--since"):
        check(Settings(), since, until, repair=False)
