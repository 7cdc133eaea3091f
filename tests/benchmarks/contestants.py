"""Who runs: finpro, its rival, and the floor below it."""

import sys
from dataclasses import dataclass
from pathlib import Path

from jobs.local.jars import spark_jars
from jobs.spark_submit import environment as spark_environment
from jobs.spark_submit import spark_submit
