"""BigQuery's own SQL analyzer (GoogleSQL), over tables that exist as declarations only: it checks names, types and syntax."""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from wasmtime import Config
from zetasql.api import Analyzer, CatalogBuilder, TableBuilder, TypeFactory
from zetasql.core import wasm_client
from zetasql.core.exceptions import ServerError as Refused
from zetasql.core.local_service import ZetaSqlLocalService
from zetasql.types import (
    AnalyzeRequest,
    AnalyzerOptions,
    LanguageOptions,
    ParameterMode,
    ProductMode,
    SimpleTable,
    Type,
    TypeKind,
    ZetaSQLBuiltinFunctionOptions,
)

__all__ = ["GoogleSql", "Parameters", "Refused"]

Columns = Mapping[str, str]  # name → type as BigQuery writes it, in order
Parameters = Mapping[str, str] | Sequence[str]  # their types: of named ones by their name, of others in order

_KINDS = {
    "bignumeric": TypeKind.TYPE_BIGNUMERIC,
    "bool": TypeKind.TYPE_BOOL,
    "bytes": TypeKind.TYPE_BYTES,
    "date": TypeKind.TYPE_DATE,
    "datetime": TypeKind.TYPE_DATETIME,
    "float64": TypeKind.TYPE_DOUBLE,
    "int64": TypeKind.TYPE_INT64,
    "json": TypeKind.TYPE_JSON,
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
    """Analyzes statements on these tables. `close` it where there will be many of them."""

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
        """The columns of a query's result and their types, as `check` reads it.

        Raises:
            Refused: GoogleSQL does not accept the query; says where and why.
        """
        statement = self.check(query)
        return {column.name: _name(column.column.type) for column in statement.output_column_list}

    def check(self, statement: str, parameters: Parameters = ()) -> Any:
        """A statement of any kind, resolved; what dbt writes before the name of a table is left out: project and dataset.

        Raises:
            Refused: GoogleSQL does not accept it; says where and why.
        """
        return self.resolve(_THREE_PART_NAME.sub(r"\1", statement), parameters)

    def resolve(self, statement: str, parameters: Parameters = ()) -> Any:
        """A statement of any kind, resolved as it stands.

        Raises:
            Refused: GoogleSQL does not accept it; says where and why.
        """
        return Analyzer.analyze_statement_static(statement, self._options_for(parameters), self._catalog)

    def require_accepted(self, statement: str, parameters: Parameters = ()) -> None:
        """Check a statement of any kind as it stands; to read what it is resolved to would take longer than to find it.

        Raises:
            Refused: GoogleSQL does not accept it; says where and why.
        """
        request = AnalyzeRequest(
            sql_statement=statement, options=self._options_for(parameters), registered_catalog_id=self._registered
        ).to_proto()
        ZetaSqlLocalService.get_instance().wasm_client.call_grpc_func("ZetaSqlLocalService_Analyze", request)

    @cached_property
    def _registered(self) -> int:
        """The analyzer's number for the tables: to tell it of them and of its own functions takes longer than to analyze."""
        return int(ZetaSqlLocalService.get_instance().register_catalog(simple_catalog=self._catalog).registered_id)

    def close(self) -> None:
        """Have the analyzer forget the tables."""
        if "_registered" in vars(self):
            ZetaSqlLocalService.get_instance().unregister_catalog(registered_id=self._registered)
            del self._registered

    def _options_for(self, parameters: Parameters) -> AnalyzerOptions:
        return replace(self._options, **_declared(parameters))


def _declared(parameters: Parameters) -> dict[str, Any]:
    """The analyzer's options for named or positional parameters."""
    if not isinstance(parameters, Mapping):
        mode = ParameterMode.PARAMETER_POSITIONAL if parameters else ParameterMode.PARAMETER_NAMED
        return {"positional_query_parameters": [_type(kind) for kind in parameters], "parameter_mode": mode}
    named = [AnalyzerOptions.QueryParameter(name=name, type=_type(kind)) for name, kind in parameters.items()]
    return {"query_parameters": named}


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
