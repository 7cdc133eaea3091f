#!/bin/sh
# Makes the databases where the folder is new, with the scripts that are mounted, then runs what it is told: as the real image
# does.
set -eu
if [ ! -s "$PGDATA/PG_VERSION" ]; then
    mkdir -p "$PGDATA"
    # shellcheck disable=SC2086  # several arguments
    initdb --pgdata "$PGDATA" --username postgres --pwfile "$POSTGRES_PASSWORD_FILE" $POSTGRES_INITDB_ARGS
    echo "host all all all scram-sha-256" >>"$PGDATA/pg_hba.conf"
    pg_ctl --wait --options "-c listen_addresses='' -c unix_socket_directories=/tmp" start
    for script in /docker-entrypoint-initdb.d/*.sql; do
        PGPASSWORD=$(cat "$POSTGRES_PASSWORD_FILE") psql --host /tmp --username postgres --set ON_ERROR_STOP=1 --file "$script"
    done
    pg_ctl --wait stop
fi
exec "$@"
