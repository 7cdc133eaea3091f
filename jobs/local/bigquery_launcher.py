"""Starts bqemulator with all it needs at hand; run by the Python of its environment, which has none of finpro's packages.

It wants DuckDB's spatial extension, and would download it: the file comes with a package instead.
"""

from pathlib import Path

import duckdb
import duckdb_extension_spatial
from bqemulator.cli import main


def install_spatial() -> None:
    """Copy the extension to where DuckDB looks for it, under HOME."""
    extension = next(Path(duckdb_extension_spatial.__file__).parent.rglob("spatial.duckdb_extension"))
    quoted = str(extension).replace("'", "''")
    with duckdb.connect() as connection:
        connection.execute(f"install '{quoted}'")


if __name__ == "__main__":
    install_spatial()
    main()
