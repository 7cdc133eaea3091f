"""`python -m tests.benchmarks`: finpro, its rival and the floor, in turns on one broker and one Postgres."""

import json
import os
import platform
import signal
import sys
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer
