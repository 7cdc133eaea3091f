#!/bin/sh
# New secrets for docker-compose.yml, as lines for .env: sh conf/docker/secrets.sh >>.env
set -eu
for name in FINPRO_POSTGRES_SUPERUSER_PASSWORD FINPRO_POSTGRES_PASSWORD FINPRO_GRAFANA_PASSWORD FINPRO_AIRFLOW_PASSWORD \
    FINPRO_AIRFLOW_SESSION_KEY FINPRO_AIRFLOW_TOKEN_KEY; do
    echo "$name=$(openssl rand -hex 24)"
done
echo "FINPRO_AIRFLOW_FERNET_KEY=$(openssl rand -base64 32 | tr '+/' '-_')"
