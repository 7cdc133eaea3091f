#!/bin/sh
# Before Airflow starts: its tables, its pools, and the password of its user `admin`. Doing it again changes nothing.
set -eu
umask 077
printf '{"admin": "%s"}\n' "$FINPRO_AIRFLOW_PASSWORD" >"$AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE"
airflow db migrate
airflow pools import conf/airflow_pools.json
