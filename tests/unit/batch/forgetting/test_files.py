"""Exported files without a person: pseudonyms in their rows, everything else as it was."""

import io

import pyarrow as pa
import pyarrow.parquet as pq

from batch.forgetting.files import without_names
from batch.forgotten import PERSONAL

USERS = pa.table(
    {
        "user_id": pa.array([1, 2, 3], pa.int64()),
        "name": ["a", "b", "c"],
        "email": ["a@b", "b@b", "c@b"],
        "phone_number": ["1", "2", "3"],
        "source": ["web", "ios", "web"],
    }
)


def test_only_the_persons_columns_of_their_rows_change_and_the_same_again_finds_nothing() -> None:
    forgotten, found = without_names(USERS, [2, 9])
    assert found == 1
    assert forgotten.schema == USERS.schema
    assert forgotten.slice(0, 1) == USERS.slice(0, 1)
    assert forgotten.slice(2) == USERS.slice(2)
    (row,) = forgotten.slice(1, 1).to_pylist()
    assert row == {"user_id": 2, "source": "ios"} | {column: pseudonym.of(2) for column, pseudonym in PERSONAL.items()}
    assert without_names(forgotten, [2, 9]) == (forgotten, 0)
    content = io.BytesIO()
    pq.write_table(forgotten, content)
    assert without_names(pq.read_table(content), [2]) == (forgotten, 0)


def test_a_row_that_has_one_of_the_three_left_is_found() -> None:
    for column in PERSONAL:
        forgotten, _ = without_names(USERS, [2])
        place = forgotten.column_names.index(column)
        half = forgotten.set_column(place, column, USERS[column])
        assert without_names(half, [2]) == (forgotten, 1)


def test_files_of_deletions_have_no_names_and_stay() -> None:
    deletions = USERS.select(["user_id"])
    assert without_names(deletions, [2]) == (deletions, 0)
