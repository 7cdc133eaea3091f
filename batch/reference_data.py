"""Users and products: composed from a seed, the same for each id whatever the count, and loaded in bulk."""

import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

import numpy as np
import polars as pl
from faker import Faker
from psycopg2.errors import UniqueViolation
from psycopg2.extensions import cursor as Cursor

from batch.frames import copy_frame
from batch.postgres import connect, explained
from batch.sessions import BULK
from conf.errors import PostgresError

_BLOCK = 50_000  # ids that share one random stream: a whole block is always drawn, so the count changes nothing in it
_POOL = 2_000  # distinct names asked of Faker: it has fewer, so this is "all of them" in an order given by the seed
_FIRST_DAY = datetime(2023, 1, 1, tzinfo=UTC)
_DAYS = 3 * 365


class _SubCategory(NamedTuple):
    category: str
    name: str
    items: tuple[str, ...]
    cheapest: int  # rupiah
    dearest: int  # rupiah


_CATALOGUE = (
    _SubCategory("Electronics", "Phones & Tablets", ("Smartphone", "Tablet", "Feature Phone"), 350_000, 22_000_000),
    _SubCategory("Electronics", "Computers", ("Laptop", "Monitor", "Mini PC", "Printer"), 900_000, 25_000_000),
    _SubCategory("Electronics", "Audio", ("Earbuds", "Bluetooth Speaker", "Headphones", "Soundbar"), 75_000, 4_500_000),
    _SubCategory("Electronics", "Accessories", ("Power Bank", "USB-C Cable", "Mouse", "Keyboard"), 15_000, 850_000),
    _SubCategory("Fashion", "Batik", ("Kemeja Batik", "Dress Batik", "Kain Batik", "Outer Batik"), 85_000, 1_500_000),
    _SubCategory("Fashion", "Muslim Wear", ("Gamis", "Hijab", "Koko", "Mukena"), 35_000, 750_000),
    _SubCategory("Fashion", "Shoes & Bags", ("Sneakers", "Sandals", "Backpack", "Tote Bag"), 45_000, 1_900_000),
    _SubCategory("Home & Living", "Kitchen", ("Rice Cooker", "Blender", "Wajan", "Knife Set", "Kettle"), 25_000, 1_750_000),
    _SubCategory("Home & Living", "Furniture", ("Desk", "Office Chair", "Bookshelf", "Rattan Chair"), 250_000, 6_500_000),
    _SubCategory("Home & Living", "Bedding", ("Bed Sheet", "Pillow", "Blanket", "Bed Cover"), 40_000, 900_000),
    _SubCategory("Groceries", "Coffee & Tea", ("Kopi Gayo", "Kopi Toraja", "Teh Melati", "Wedang Jahe"), 12_000, 240_000),
    _SubCategory("Groceries", "Snacks", ("Keripik Singkong", "Rengginang", "Dodol", "Bakpia"), 8_000, 95_000),
    _SubCategory("Groceries", "Staples", ("Beras 5 kg", "Minyak Goreng 2 L", "Gula Aren", "Sambal"), 14_000, 130_000),
    _SubCategory("Beauty", "Skincare", ("Serum", "Sunscreen", "Facial Wash", "Moisturizer"), 18_000, 650_000),
    _SubCategory("Beauty", "Make-up", ("Lip Tint", "Cushion", "Mascara", "Eyeliner"), 22_000, 420_000),
    _SubCategory("Health", "Supplements", ("Vitamin C", "Madu Hutan", "Jamu Kunyit", "Protein Powder"), 15_000, 780_000),
    _SubCategory("Mother & Baby", "Baby Care", ("Diapers", "Baby Lotion", "Stroller", "Baby Bottle"), 20_000, 2_800_000),
    _SubCategory("Mother & Baby", "Toys", ("Building Blocks", "Puzzle", "Toy Car", "Doll"), 15_000, 600_000),
    _SubCategory("Sports", "Outdoor", ("Tent", "Sleeping Bag", "Carrier", "Headlamp"), 45_000, 2_200_000),
    _SubCategory("Sports", "Cycling & Fitness", ("Folding Bike", "Helmet", "Yoga Mat", "Dumbbell"), 35_000, 7_500_000),
    _SubCategory("Automotive", "Motorcycle", ("Helm", "Tyre", "Engine Oil", "Jas Hujan"), 30_000, 1_600_000),
)


@dataclass(frozen=True)
class ReferenceTable:
    """A raw table that `finpro generate` fills: its name, its id, and the column that is its natural key.

    Ids in the table `forgotten` are left as they are.
    """

    name: str
    key: str
    natural_key: str
    forgotten: str | None = None


USERS = ReferenceTable("raw_users", "user_id", "email", forgotten="forgotten_users")
PRODUCTS = ReferenceTable("raw_products", "product_id", "product_name")


@dataclass(frozen=True)
class Loaded:
    """How many rows a load found new, changed, and as they were already."""

    table: str
    inserted: int
    updated: int
    unchanged: int


def generate(
    dsn: str, *, user_count: int, product_count: int, seed: int, on_rows: Callable[[str, int], None] = lambda table, rows: None
) -> list[Loaded]:
    """Make users and products 1 to their counts and load them, in one transaction.

    The same again changes no row; larger counts add the new rows only; smaller ones remove nothing. Who is forgotten stays
    so. `on_rows` hears of each table and number of rows copied to it.

    Raises:
        PostgresError: Postgres cannot be reached or lacks the tables, or holds rows that another seed made.
    """
    work = [(USERS, users(user_count, seed)), (PRODUCTS, products(product_count, seed))]
    with (
        explained(dsn),
        connect(dsn, application_name="finpro generate", limits=BULK) as connection,
        connection.cursor() as cursor,
    ):
        return [load(cursor, table, _observed(frames, table, on_rows)) for table, frames in work]


def load(cursor: Cursor, table: ReferenceTable, frames: Iterable[pl.DataFrame]) -> Loaded:
    """Upsert frames into a reference table: one COPY into a temporary table, then one UPDATE and one INSERT.

    A row is the same row when its id and its natural key both agree. Rows that are equal already are not touched: they
    keep their `change_xid`. Two plain statements under a lock take half the time of INSERT … ON CONFLICT, which
    inserts every new row speculatively; readers go on meanwhile.

    Raises:
        PostgresError: an id stands there with another natural key, or a natural key with another id.
    """
    staging = f"staged_{table.name}"
    # A table that was just emptied looks tiny to the planner: a nested loop over what the INSERT itself fills is quadratic.
    cursor.execute("set local enable_nestloop = off; set local work_mem = '128MB'")
    cursor.execute(f"lock table {table.name} in share row exclusive mode")
    columns, copied = _stage(cursor, table, staging, frames)
    if not copied:
        return Loaded(table.name, 0, 0, 0)
    cursor.execute(_update_changed(table, staging, columns))
    updated = cursor.rowcount
    try:
        cursor.execute(_insert_new(table, staging, columns))
    except UniqueViolation as error:
        raise PostgresError(_contradiction(table, str(error.diag.message_detail))) from error
    return Loaded(table.name, cursor.rowcount, updated, copied - updated - cursor.rowcount)


def _stage(cursor: Cursor, table: ReferenceTable, staging: str, frames: Iterable[pl.DataFrame]) -> tuple[list[str], int]:
    """Copy the frames to a temporary table; returns their columns and the number of rows."""
    columns: list[str] = []
    copied = 0
    for frame in frames:
        if not columns:
            columns = frame.columns
            cursor.execute(
                f"create temp table {staging} on commit drop as select {', '.join(columns)} from {table.name} with no data"
            )
        copy_frame(cursor, staging, frame)
        copied += len(frame)
    if copied:
        cursor.execute(f"analyze {staging}")
    return columns, copied


def _update_changed(table: ReferenceTable, staging: str, columns: list[str]) -> str:
    attributes = [column for column in columns if column not in (table.key, table.natural_key)]
    return f"""
        update {table.name} as stored
        set {", ".join(f"{column} = staged.{column}" for column in attributes)}, ingested_at = default, change_xid = default
        from {staging} as staged
        where {_same_row(table)}
          and ({", ".join(f"stored.{column}" for column in attributes)})
              is distinct from ({", ".join(f"staged.{column}" for column in attributes)})"""


def _insert_new(table: ReferenceTable, staging: str, columns: list[str]) -> str:
    return f"""
        insert into {table.name} ({", ".join(columns)})
        select {", ".join(columns)} from {staging} as staged
        where not exists (select from {table.name} as stored where {_same_row(table)})
          and {_is_wanted(table)}"""


def _is_wanted(table: ReferenceTable) -> str:
    """Somebody who is forgotten has another email by now, and is not to come a second time."""
    if table.forgotten is None:
        return "true"
    return f"not exists (select from {table.forgotten} as forgotten where forgotten.{table.key} = staged.{table.key})"


def _same_row(table: ReferenceTable) -> str:
    return f"stored.{table.key} = staged.{table.key} and stored.{table.natural_key} = staged.{table.natural_key}"


def _contradiction(table: ReferenceTable, detail: str) -> str:
    return (
        f"{table.name} holds other rows under these keys already ({detail.strip()}): {table.key} and {table.natural_key} must"
        " both agree. Was it filled with another seed? Use that seed, or empty the table; nothing was changed."
    )


def _observed(
    frames: Iterable[pl.DataFrame], table: ReferenceTable, on_rows: Callable[[str, int], None]
) -> Iterator[pl.DataFrame]:
    for frame in frames:
        yield frame
        on_rows(table.name, len(frame))


def users(count: int, seed: int) -> Iterator[pl.DataFrame]:
    """Users 1 to `count`, in frames of up to 50,000 rows with the columns that `raw_users` loads.

    User k depends on `seed` and k only. An e-mail carries its user's id, so it is unique; its domain is a reserved
    example domain, so nobody real gets mail.
    """
    fake = _faker(seed)
    first_names, last_names = (_pool(draw, _POOL) for draw in (fake.first_name, fake.last_name))
    domains = _pool(fake.safe_domain_name, 3)

    def compose(rng: np.random.Generator, ids: pl.Series) -> pl.DataFrame:
        first, last = _draw(rng, first_names), _draw(rng, last_names)
        return pl.DataFrame({"user_id": ids, "first": first, "last": last, "domain": _draw(rng, domains)}).select(
            "user_id",
            name=pl.format("{} {}", "first", "last"),
            email=pl.format("{}.{}.{}@{}", _slug("first"), _slug("last"), "user_id", "domain"),
            phone_number=_phone_numbers(rng),
            created_date=_moments(rng),
            source=_draw(rng, pl.Series(["android", "ios", "web"])),
        )

    return _blocks("users", count, seed, compose)


def products(count: int, seed: int) -> Iterator[pl.DataFrame]:
    """Products 1 to `count`, in frames of up to 50,000 rows with the columns that `raw_products` loads.

    Product k depends on `seed` and k only. Prices and costs are whole rupiah, cost below price; a name ends in its
    product's model number, so it is unique.
    """
    brands = _pool(_faker(seed).last_name, _POOL)
    catalogue = pl.DataFrame(_CATALOGUE, schema=["category", "sub_category", "items", "cheapest", "dearest"], orient="row")

    def compose(rng: np.random.Generator, ids: pl.Series) -> pl.DataFrame:
        chosen = catalogue[rng.integers(len(catalogue), size=_BLOCK)]
        price = _prices(rng, chosen["cheapest"].to_numpy(), chosen["dearest"].to_numpy())
        item = pl.col("items").list.get(pl.Series(rng.integers(1 << 30, size=_BLOCK)) % pl.col("items").list.len())
        return chosen.with_columns(product_id=ids, brand=_draw(rng, brands)).select(
            "product_id",
            product_name=pl.format("{} {} {}-{}", "brand", item, pl.col("brand").str.head(2).str.to_uppercase(), "product_id"),
            category="category",
            sub_category="sub_category",
            currency=pl.lit("IDR"),
            price=price,
            cost=_to_hundreds(price * rng.uniform(0.55, 0.9, size=_BLOCK)),
            created_date=_moments(rng),
            source=_draw(rng, pl.Series(["seller_center", "partner_feed", "own_brand"])),
        )

    return _blocks("products", count, seed, compose)


def _blocks(
    table: str, count: int, seed: int, compose: Callable[[np.random.Generator, pl.Series], pl.DataFrame]
) -> Iterator[pl.DataFrame]:
    """Rows 1 to `count`: each block of ids from a random stream of its own, named by table, seed and block."""
    for block in range(-(-count // _BLOCK)):
        rng = np.random.default_rng([seed, zlib.crc32(table.encode()), block])
        ids = pl.Series(np.arange(block * _BLOCK + 1, (block + 1) * _BLOCK + 1))
        yield compose(rng, ids).head(count - block * _BLOCK)


def _faker(seed: int) -> Faker:
    fake = Faker("id_ID")
    fake.seed_instance(seed)
    return fake


def _pool(draw: Callable[[], str], size: int) -> pl.Series:
    """What Faker gives in `5 * size` draws, each once, at most `size`, in the order drawn."""
    return pl.Series(list(dict.fromkeys(draw() for _ in range(5 * size)))[:size])


def _draw(rng: np.random.Generator, pool: pl.Series) -> pl.Series:
    return pool.gather(rng.integers(len(pool), size=_BLOCK))


def _slug(column: str) -> pl.Expr:
    return pl.col(column).str.to_lowercase().str.replace_all(r"[^a-z0-9]+", "")


def _phone_numbers(rng: np.random.Generator) -> pl.Series:
    """Indonesian mobile numbers: +62 8xx-xxxx-xxxx."""
    parts = pl.DataFrame(
        {"a": rng.integers(11, 100, _BLOCK), "b": rng.integers(10_000, size=_BLOCK), "c": rng.integers(10_000, size=_BLOCK)}
    )
    four_digits = [pl.col(part).cast(pl.String).str.zfill(4) for part in ("b", "c")]
    return parts.select(pl.format("+62 8{}-{}-{}", "a", *four_digits)).to_series()


def _moments(rng: np.random.Generator) -> pl.Series:
    """Whole seconds in the three years from 2023: in the past whenever this runs, so that no order comes before them."""
    seconds = int(_FIRST_DAY.timestamp()) + rng.integers(_DAYS * 86_400, size=_BLOCK)
    return pl.Series(seconds * 1_000_000).cast(pl.Datetime("us", "UTC"))


def _prices(rng: np.random.Generator, cheapest: np.ndarray, dearest: np.ndarray) -> np.ndarray:
    """Prices between two bounds, as many between 10,000 and 20,000 as between 100,000 and 200,000."""
    return _to_hundreds(np.exp(rng.uniform(np.log(cheapest), np.log(dearest))))


def _to_hundreds(rupiah: np.ndarray) -> np.ndarray:
    return (rupiah // 100).astype(np.int64) * 100
