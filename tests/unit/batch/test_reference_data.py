"""Users and products as they are made: nothing here needs a database."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import polars as pl
import pytest
from faker import Faker

from batch.reference_data import products, users

Make = Callable[[int, int], Iterator[pl.DataFrame]]

both_tables = pytest.mark.parametrize("make", [users, products])


def made(make: Make, count: int, seed: int = 7) -> pl.DataFrame:
    return pl.concat(make(count, seed))


@both_tables
def test_one_seed_makes_the_same_rows_again(make: Make) -> None:
    assert made(make, 2_000).equals(made(make, 2_000))


@both_tables
def test_another_seed_makes_other_rows(make: Make) -> None:
    assert not made(make, 50, seed=7).equals(made(make, 50, seed=8))


@both_tables
@pytest.mark.parametrize("fewer", [1, 49_999, 50_000, 50_001])
def test_a_larger_count_keeps_every_row_and_adds_the_next_ids(make: Make, fewer: int) -> None:
    more = made(make, 60_000)
    assert made(make, fewer).equals(more.head(fewer))
    assert more[more.columns[0]].to_list() == list(range(1, 60_001))


@both_tables
def test_none_are_made_when_none_are_wanted(make: Make) -> None:
    assert list(make(0, 7)) == []


@pytest.mark.parametrize(("make", "key"), [(users, "email"), (products, "product_name")])
def test_natural_keys_are_unique(make: Make, key: str) -> None:
    assert made(make, 120_000)[key].is_unique().all()


def test_users_have_indonesian_names_that_faker_knows() -> None:
    fake = Faker("id_ID")
    known = {fake.first_name() for _ in range(20_000)}
    first_names = made(users, 1_000)["name"].str.split(" ").list.first()
    assert set(first_names) <= known
    assert first_names.n_unique() > 300


def test_mail_to_a_user_reaches_nobody() -> None:
    assert made(users, 1_000)["email"].str.contains(r"^[a-z0-9.]+@example\.(com|net|org)$").all()


def test_a_price_is_whole_rupiah_and_above_its_cost() -> None:
    made_products = made(products, 50_000)
    assert made_products.schema["price"] == made_products.schema["cost"] == pl.Int64
    assert made_products.select((pl.col("cost") > 0) & (pl.col("cost") < pl.col("price"))).to_series().all()


def test_a_sub_category_belongs_to_one_category_and_every_category_is_sold() -> None:
    kinds = made(products, 50_000).select("category", "sub_category").unique()
    assert kinds["sub_category"].is_unique().all()
    assert kinds["category"].n_unique() == 9


@both_tables
def test_everything_was_created_before_this_code(make: Make) -> None:
    assert made(make, 50_000)["created_date"].max() < datetime(2026, 1, 1, tzinfo=UTC)  # type: ignore[operator]
