#!/bin/sh
# Secrets for docker-compose.yml, as lines for .env: sh conf/docker/secrets.sh >>.env. Those that are in .env already are left
# out: Postgres keeps the passwords that it was made with.
set -eu

missing() {
    [ ! -e .env ] || ! grep -q "^$1=." .env
}

for name in FINPRO_POSTGRES_SUPERUSER_PASSWORD FINPRO_POSTGRES_PASSWORD FINPRO_GRAFANA_PASSWORD FINPRO_AIRFLOW_PASSWORD \
    FINPRO_AIRFLOW_SESSION_KEY FINPRO_AIRFLOW_TOKEN_KEY; do
    ! missing "$name" || echo "$name=$(head -c 24 /dev/urandom | od -An -v -tx1 | tr -d ' \n')"
done
! missing FINPRO_AIRFLOW_FERNET_KEY || echo "FINPRO_AIRFLOW_FERNET_KEY=$(head -c 32 /dev/urandom | base64 | tr '+/' '-_')"
