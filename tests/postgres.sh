#!/bin/bash
# postgres.sh KILLS: PostgreSQL on a volume whose server is killed again and again. Its clients
# check each commit, and none may see an error. At the end the keeper is killed, too: what was
# committed is there after the next attach. Run it as root.
set -euo pipefail
kills=${1:-50}
repository=$(cd "$(dirname "$0")/.." && pwd)
wbctl=${CARGO_TARGET_DIR:-$repository/target}/debug/wbctl
work=$(mktemp -d /tmp/wb-postgres-XXXXXX)
name=postgres-$$
# shellcheck source=tests/database.sh
. "$repository/tests/database.sh"

server() { cat "/proc/$keeper/task/$keeper/children"; }

cleanup() {
    ended=$?
    set +e
    trap - EXIT
    [ $ended = 0 ] || { tail -n 30 "$work"/log* "$work"/postgres.log; echo "FAILED; in $work"; }
    kill $(jobs -p) 2>/dev/null
    give_up_database
    wait
    [ $ended = 0 ] && rm -rf "$work"
    exit $ended
}
trap cleanup EXIT

truncate -s 64M "$work/cache"
truncate -s 2G "$work/backing"
"$wbctl" create "$name" --cache "$work/cache" --backing "$work/backing" --serve loop >/dev/null
attach
make_database
start_postgres
start_clients
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
end_clients

# As a power cut without the loss of what the cache device holds.
kill -9 $keeper
wait $keeper 2>/dev/null || true
stop_postgres immediate 2>/dev/null || true
umount "$on" || umount -l "$on"
attach
mount "$device" "$on"
# Its process may not have been waited for, and then PostgreSQL takes it for alive.
rm -f "$on/data/postmaster.pid"
start_postgres
check_commits
stop_postgres fast
umount "$on"
detach
echo "PostgreSQL: $kills kills, $committed commits that were checked, none lost, no error"
