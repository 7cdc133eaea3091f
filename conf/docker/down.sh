#!/bin/sh
# Stops what up.sh has started, whatever the profiles. Data stay, unless it is asked to delete them: sh conf/docker/down.sh --volumes
set -eu
cd "$(dirname "$0")/../.."
exec docker compose --profile '*' down --remove-orphans "$@"
