#!/bin/bash
# postgres.sh KILLS: PostgreSQL on a volume whose server is killed again and again. Its clients
# check each commit, and none may see an error. At the end the keeper is killed, too: what was
# committed is there after the next attach. Run it as root.
set -euo pipefail
kills=${1:-50}
repository=$(cd "$(dirname "$0")/.." && pwd)
wbctl=${CARGO_TARGET_DIR:-$repository/target}/debug/wbctl
bin=$(ls -d /usr/lib/postgresql/*/bin | sort -V | tail -1)
work=$(mktemp -d /tmp/wb-postgres-XXXXXX)
chmod 755 "$work"
export WB_CONFIG_DIR=$work/config WB_RUN_DIR=$work/run WB_STATE_DIR=$work/state
export WB_DEATHS_A_MINUTE=1000000
name=postgres-$$ on=$work/mounted keeper=

as_postgres() { (cd / && setpriv --reuid=postgres --regid=postgres --init-groups "$@"); }
sql() { as_postgres "$bin/psql" -h "$work/socket" -v ON_ERROR_STOP=1 -qAtX "$@" postgres; }
server() { cat "/proc/$keeper/task/$keeper/children"; }
stop() { as_postgres "$bin/pg_ctl" -D "$on/data" -m "$1" -w stop >/dev/null; }

cleanup() {
    ended=$?
    set +e
    trap - EXIT
    [ $ended = 0 ] || { tail -n 30 "$work"/log* "$work"/postgres.log; echo "FAILED; in $work"; }
    kill $(jobs -p) 2>/dev/null
    stop immediate 2>/dev/null
    mountpoint -q "$on" && umount "$on"
    [ -n "$keeper" ] && "$wbctl" detach --force "$name" >/dev/null 2>&1
    wait
    [ $ended = 0 ] && rm -rf "$work"
    exit $ended
}
trap cleanup EXIT

# attach: sets keeper and device
attach() {
    : >"$work/ready"
    "$wbctl" attach "$name" >"$work/ready" 2>>"$work/log" &
    keeper=$!
    for _ in $(seq 300); do
        device=$(sed -n 's/^ready //p' "$work/ready")
        [ -z "$device" ] || return 0
        kill -0 $keeper
        sleep 0.1
    done
    return 1
}

start_postgres() {
    as_postgres "$bin/pg_ctl" -D "$on/data" -l "$work/postgres.log" -w start \
        -o "-c listen_addresses= -c unix_socket_directories=$work/socket" >/dev/null
}

# commits NUMBER: a client that commits one row after the other, and reads each again
commits() {
    local n=0 found
    while [ ! -e "$work/enough" ]; do
        n=$((n + 1))
        sql -c "insert into commits values ($1, $n)"
        echo "$1 $n" >>"$work/committed.$1"
        found=$(sql -c "select count(*) from commits where client = $1")
        [ "$found" = $n ] || { echo "client $1 finds $found rows of $n"; return 1; }
    done
}

truncate -s 64M "$work/cache"
truncate -s 2G "$work/backing"
mkdir "$on" "$work/socket"
touch "$work/postgres.log"
chown postgres "$work/socket" "$work/postgres.log"
"$wbctl" create "$name" --cache "$work/cache" --backing "$work/backing" --serve loop >/dev/null
attach
mkfs.ext4 -q "$device"
mount "$device" "$on"
mkdir "$on/data"
chown postgres "$on/data"
as_postgres "$bin/initdb" -D "$on/data" -A trust >/dev/null
start_postgres
sql -c "create table commits (client int, n int)"
as_postgres "$bin/pgbench" -h "$work/socket" -i -s 5 -q postgres 2>/dev/null

clients=()
for client in 1 2; do
    commits $client &
    clients+=($!)
done
as_postgres "$bin/pgbench" -h "$work/socket" -n -c 4 -T 100000 postgres >"$work/log.pgbench" 2>&1 &
load=$!
for _ in $(seq "$kills"); do
    before=$(server)
    kill -9 $before
    for _ in $(seq 300); do
        now=$(server)
        [ -n "$now" ] && [ "$now" != "$before" ] && break
        sleep 0.1
    done
    sleep 0.3
done
touch "$work/enough"
for client in "${clients[@]}"; do wait "$client"; done
kill -0 $load
pkill -INT -P $load || kill -INT $load
wait $load || true
if grep -iE "error|fatal|panic|abort" "$work/log.pgbench"; then exit 1; fi
if grep -E "PANIC|could not (read|write|fsync)" "$work/postgres.log"; then exit 1; fi
committed=$(cat "$work"/committed.* | wc -l)

# As a power cut without the loss of what the cache device holds.
kill -9 $keeper
wait $keeper 2>/dev/null || true
stop immediate 2>/dev/null || true
umount "$on" || umount -l "$on"
attach
mount "$device" "$on"
# Its process may not have been waited for, and then PostgreSQL takes it for alive.
rm -f "$on/data/postmaster.pid"
start_postgres
found=$(sql -c "select count(*) from commits")
[ "$found" -ge "$committed" ] || { echo "$found of $committed commits are left"; exit 1; }
stop fast
umount "$on"
"$wbctl" detach "$name" >/dev/null
wait $keeper
keeper=
echo "PostgreSQL: $kills kills, $committed commits that were checked, none lost, no error"
