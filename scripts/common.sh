# shellcheck shell=bash disable=SC2034
# Shared by the scripts of this folder; sourced, not run.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$root/target}
export PG_CONFIG=${PG_CONFIG:-/usr/lib/postgresql/15/bin/pg_config}
export PGRX_HOME=${PGRX_HOME:-$CARGO_TARGET_DIR/pgrx}
export PGRX_BUILD_FLAGS=${PGRX_BUILD_FLAGS:---locked --ignore-rust-version}
package_dir=$CARGO_TARGET_DIR/package

say() { printf '==> %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

# Runs a command as root.
as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"
    elif have sudo; then sudo "$@"
    else fail "this needs root: $*"
    fi
}

# Runs a command as the user that owns the private clusters: Postgres refuses to run as root.
as_postgres() {
    if [ "$(id -u)" = 0 ]; then runuser -u postgres -- "$@"; else "$@"; fi
}

# Prints a folder that the owner of the private clusters can reach: target/private, or, when target/ lies in
# another user's private home, one in /var/tmp that target/private links to.
private_dir() {
    local dir=$CARGO_TARGET_DIR/private elsewhere
    mkdir -p "$CARGO_TARGET_DIR"
    if [ ! -e "$dir" ]; then
        if as_postgres test -x "$CARGO_TARGET_DIR" 2>/dev/null; then
            mkdir "$dir"
        else
            elsewhere=$(mktemp -d /var/tmp/candle_fdw.XXXXXX)
            ln -sfn "$elsewhere" "$dir"
            say "$CARGO_TARGET_DIR cannot be reached by user postgres: private clusters go to $elsewhere" >&2
        fi
        chmod 755 "$dir/."
        [ "$(id -u)" != 0 ] || chown postgres: "$dir/."
    fi
    (cd "$dir" && pwd -P)
}
