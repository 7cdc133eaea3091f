"""The health check of containers that serve HTTP: `python answers.py URL [PART]` ends well when the URL answers well.

With a part, the answer is a JSON object that says of it `"status": "healthy"`, as Airflow's does of each of its parts.
It runs with nothing but Python: in the image of BigQuery's emulator there is no finpro.
"""

import json
import sys
import urllib.request

url, *parts = sys.argv[1:]
with urllib.request.urlopen(url, timeout=4) as answer:  # noqa: S310  # the URL stands in docker-compose.yml
    body = answer.read()
sys.exit(any(json.loads(body)[part]["status"] != "healthy" for part in parts))
