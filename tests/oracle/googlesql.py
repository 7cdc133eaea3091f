"""BigQuery's own SQL analyzer (GoogleSQL), over tables that exist as declarations only: it checks names, types and syntax."""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wasmtime import Config
from zetasql.api import Analyzer, CatalogBuilder, TableBuilder, TypeFactory
from zetasql.core import wasm_client
from zetasql.core.exceptions import ServerError as Refused
from zetasql.types import (
    AnalyzerOptions,
    LanguageOptions,
    ProductMode,
    SimpleTable,
    Type,
    TypeKind,
    ZetaSQLBuiltinFunctionOptions,
)

__all__ = ["GoogleSql", "Refused"]

Columns = Mapping[str, str]  # name → type as BigQuery writes it, in order

_KINDS = {
    "bool": TypeKind.TYPE_BOOL,
    "date": TypeKind.TYPE_DATE,
    "float64": TypeKind.TYPE_DOUBLE,
    "int64": TypeKind.TYPE_INT64,
    "numeric": TypeKind.TYPE_NUMERIC,
    "string": TypeKind.TYPE_STRING,
    "timestamp": TypeKind.TYPE_TIMESTAMP,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}
_THREE_PART_NAME = re.compile(r"`[^`]+`\.`[^`]+`\.(`[^`]+`)")


def _compiled_once() -> Config:
    """Keeps what the analyzer's WebAssembly is compiled to with the environment: a quarter of a minute otherwise, each time."""
    folder = Path(sys.prefix, "googlesql")
    folder.mkdir(exist_ok=True)
    file = folder / "cache.toml"
    if not file.exists():
        file.write_text(f"[cache]\ndirectory = '{folder}'\n")
    config = Config()
    config.cache = str(file)
    return config


wasm_client.Config = _compiled_once


class GoogleSql:
    """Analyzes statements on these tables."""

    def __init__(self, tables: Mapping[str, Columns]) -> None:
        language = LanguageOptions.maximum_features()
        language.product_mode = ProductMode.PRODUCT_EXTERNAL  # the types that BigQuery has, by the names they have there
        language.reserved_keywords = ["QUALIFY"]
        self._options = AnalyzerOptions(language_options=language)
        catalog = CatalogBuilder("warehouse").with_builtin_functions(ZetaSQLBuiltinFunctionOptions(language_options=language))
        for name, columns in tables.items():
            catalog.add_table(_table(name, columns))
        self._catalog = catalog.build()

    def columns(self, query: str) -> dict[str, str]:
        """The columns of a query's result and their types; names of tables may say their project and dataset.

        Raises:
            Refused: GoogleSQL does not accept the query; says where and why.
        """
        statement = self.check(query)
        return {column.name: _name(column.column.type) for column in statement.output_column_list}

    def check(self, statement: str) -> Any:
        """A statement of any kind, resolved.

        Raises:
            Refused: GoogleSQL does not accept it; says where and why.
        """
        return Analyzer.analyze_statement_static(_THREE_PART_NAME.sub(r"\1", statement), self._options, self._catalog)


def _table(name: str, columns: Columns) -> SimpleTable:
    table = TableBuilder(name)
    for column, kind in columns.items():
        table.add_column(column, _type(kind))
    return table.build()


def _type(name: str) -> Type:
    if name.startswith("array<"):
        return TypeFactory.create_array_type(_type(name.removeprefix("array<").removesuffix(">")))
    return TypeFactory.create_simple_type(_KINDS[name])


def _name(kind: Type) -> str:
    if kind.type_kind == TypeKind.TYPE_ARRAY:
        return f"array<{_name(kind.array_type.element_type)}>"
    return _NAMES.get(kind.type_kind, str(kind.type_kind))
