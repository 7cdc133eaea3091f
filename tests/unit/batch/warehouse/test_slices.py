"""How a table is cut for the export, as far as that goes without a Postgres."""

from typing import Any, cast

import pytest

from batch.warehouse.export import _all_rows


class OfSize:
    """A cursor whose tables all have one size."""

    def __init__(self, gigabytes: float) -> None:
        self._row = (int(gigabytes * 2**30), 8192)

    def execute(self, *_: Any) -> None: ...

    def fetchone(self) -> tuple[int, int]:
        return self._row


@pytest.mark.parametrize(("gigabytes", "slices"), [(0, 1), (0.0625, 1), (1, 16), (100, 1_600), (700, 9_000), (20_000, 9_000)])
def test_a_table_of_any_size_makes_no_more_files_than_bigquery_loads_in_one_job(gigabytes: float, slices: int) -> None:
    conditions = _all_rows(cast("Any", OfSize(gigabytes)), "raw_orders")
    assert 0.95 * slices <= len(conditions) <= slices
    assert conditions[0].startswith("ctid >= '(0,0)'")
    assert "<" not in conditions[-1]
