"""What `make` has set up."""

from importlib.util import cache_from_source, find_spec
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "name", ["pyspark.worker", "pandas", "polars", "great_expectations", "airflow", "streaming.screening.pipeline"]
)
def test_modules_are_compiled_before_their_first_import(name: str) -> None:
    spec = find_spec(name)

    assert spec is not None
    assert spec.origin is not None
    assert Path(cache_from_source(spec.origin)).is_file(), "make setup has not compiled it"
