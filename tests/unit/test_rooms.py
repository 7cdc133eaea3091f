"""The folders show the flow: each room imports from rooms below it only, none is crowded, and each says what lives there."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

MOST_FILES = 14
# From the ground up. A room may import from itself and from those before it; docs/development.md draws them.
ROOMS = (
    "conf",
    "batch",
    "batch/warehouse",
    "batch/forgetting",
    "batch/report",
    "expectations",
    "streaming",
    "streaming/lakehouse",
    "streaming/rules",
    "streaming/screening",
    "streaming/shop",
    "streaming/history",
    "jobs/local",
    "jobs/spark",
    "jobs/notify",
    "jobs/health",
    "jobs/airflow",
    "jobs/steps",
    "jobs",
    "jobs/rules",
    "jobs/dags",
)
# What a higher folder may not reach into, although it stands above it.
CLOSED = {
    ("expectations", "batch"),
    ("streaming", "expectations"),
    ("streaming/screening", "streaming/lakehouse"),
    ("streaming/shop", "streaming/screening"),
    ("streaming/history", "streaming/shop"),
}
# With an underscore, and yet public.
PUBLIC = {"_asdict", "_fields", "_replace", "__name__"}
MODULES = {
    ".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for room in ROOMS for path in Path(room).glob("*.py")
}


def room(module: str) -> str:
    return str(MODULES[module].parent)


def imports(module: str) -> Iterator[str]:
    """The modules of ours that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield from (name for name in [inner if inner in MODULES else node.module] if name in MODULES)


def test_every_module_lives_in_a_room_that_the_drawing_knows() -> None:
    tops = {place.split("/")[0] for place in ROOMS}
    assert {str(path.parent) for top in tops for path in Path(top).rglob("*.py")} - {"conf/docker"} == set(ROOMS)


@pytest.mark.parametrize("place", ROOMS)
def test_a_room_imports_from_rooms_below_it_only(place: str) -> None:
    below = ROOMS[: ROOMS.index(place) + 1]
    for module in (module for module in MODULES if room(module) == place):
        for imported in imports(module):
            assert room(imported) in below, f"{module} imports {imported}, which stands above it"
            assert (place, room(imported)) not in CLOSED, f"{module} imports {imported}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    arrows = {module: set(imports(module)) - {module} for module in MODULES}
    left = dict(arrows)
    while done := [module for module, needs in left.items() if not needs & left.keys()]:
        for module in done:
            del left[module]
    assert left == {}


SPARK = re.compile(r"^\s*(from|import) (pyspark|py4j|delta)\b", re.MULTILINE)


def private_parts(module: str) -> Iterator[str]:
    """What a module reaches for that Spark or another module has marked as its own, as `object._name`."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    reached = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.attr for node in reached if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")}
    yield from (node.attr for node in reached if node.attr.startswith("_") and node.attr not in own | PUBLIC)


def test_one_module_reaches_into_spark_and_all_others_use_its_public_api() -> None:
    assert set(private_parts("streaming.jvm")) >= {"_jvm", "_jsc", "_gateway", "_jsparkSession"}
    users = {module for module, path in MODULES.items() if SPARK.search(path.read_text(encoding="utf-8"))}
    reaching = {module: set(private_parts(module)) for module in users - {"streaming.jvm"}}
    assert {module: names for module, names in reaching.items() if names} == {}


@pytest.mark.parametrize("place", ROOMS)
def test_a_room_says_what_lives_there(place: str) -> None:
    assert ast.get_docstring(ast.parse(Path(place, "__init__.py").read_text(encoding="utf-8")))


def test_no_folder_is_crowded() -> None:
    files: dict[str, int] = defaultdict(int)
    for top in (*{place.split("/")[0] for place in ROOMS}, "tests"):
        for path in Path(top).rglob("*.py"):
            files[str(path.parent)] += 1
    assert {folder: count for folder, count in files.items() if count > MOST_FILES} == {}
