#!/bin/bash
# Run once by the Postgres image, when it makes its data folder: connects the database to the compute server.
set -euo pipefail

# The file has lines `NAME TOKEN`; Postgres uses the first.
token=$(awk '!/^#/ && NF == 2 { print $2; exit }' /run/secrets/compute_token)
psql -X -v ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname "${POSTGRES_DB:-$POSTGRES_USER}" \
    -v "endpoint=${COMPUTE_ENDPOINT:-http://compute-server:50051}" -v "token=$token" <<'SQL'
CREATE EXTENSION candle_fdw;
CREATE SERVER compute FOREIGN DATA WRAPPER candle_fdw OPTIONS (endpoint :'endpoint');
CREATE USER MAPPING FOR CURRENT_USER SERVER compute OPTIONS (token :'token');
CREATE SCHEMA llm;
IMPORT FOREIGN SCHEMA candle FROM SERVER compute INTO llm;
SQL
