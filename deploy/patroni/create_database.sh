#!/bin/sh
# Run by Patroni once, on the first primary, with a connection URL of the superuser.
set -eu
psql "$1" --set ON_ERROR_STOP=1 --set "password=$KEYLATCH_DB_PASSWORD" <<'SQL'
CREATE ROLE keylatch LOGIN PASSWORD :'password';
CREATE DATABASE keylatch OWNER keylatch;
SQL
