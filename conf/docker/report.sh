#!/bin/sh
# From Postgres to the report, a step after the other; what Airflow does every hour, and the page at the end:
# docker compose run --rm --entrypoint sh finpro conf/docker/report.sh
set -eu
for step in export load reconcile validate transform report; do
    echo "== $step"
    finpro "$step"
done
