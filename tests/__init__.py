"""Tests: `unit` needs no servers, `integration` and `chaos` run the embedded platform, `gcp` a real Google Cloud project."""

import os

# Before Polars is imported: as in Spark's workers. Two processes with two threads each would wait for one another.
os.environ["POLARS_MAX_THREADS"] = "1"
