#!/bin/sh
# Starts docker-compose.yml with orders that flow until down.sh, and as many of its profiles as the memory bears:
# sh conf/docker/up.sh, or with profiles of your own choice: sh conf/docker/up.sh demo monitoring. Again, it changes nothing.
set -eu
cd "$(dirname "$0")/../.."

docker compose version >/dev/null 2>&1 || {
    echo "Docker with Compose is needed, 2.24 or later: https://docs.docker.com/get-started/get-docker/" >&2
    exit 1
}
memory=$(docker info --format '{{.MemTotal}}') || exit 1 # what is wrong with the engine it says itself
memory=$((memory / 1000000000))

if [ $# = 0 ]; then
    set -- demo
    [ $memory -lt 7 ] || set -- "$@" monitoring
    [ $memory -lt 11 ] || set -- "$@" warehouse airflow
fi
COMPOSE_PROFILES=$(echo "$*" | tr ' ' ',')
export COMPOSE_PROFILES
echo "The engine has $memory GB of memory: profiles $COMPOSE_PROFILES."

touch .env
chmod 600 .env
sh conf/docker/secrets.sh >>.env
chmod -R a+rX conf/docker conf/monitoring # mounted, and read by the users of the images

echo "Building images (ten minutes or more the first time) …"
docker compose build
echo "Starting (some minutes) …"
docker compose up --detach --wait --wait-timeout 900

case ",$COMPOSE_PROFILES," in *,warehouse,*)
    echo "Writing the first report (two minutes or more; Airflow brings the warehouse up to date every hour) …"
    docker compose run --rm --entrypoint sh finpro conf/docker/report.sh ||
        echo "The report could not be written: sh conf/docker/up.sh tries again." >&2
    ;;
esac

echo
echo "Open http://127.0.0.1:8000: the pages, and the addresses of all else."
echo "Users and passwords: admin, FINPRO_AIRFLOW_PASSWORD and FINPRO_GRAFANA_PASSWORD in .env."
echo "sh conf/docker/down.sh stops it."
