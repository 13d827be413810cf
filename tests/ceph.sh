#!/bin/bash
# ceph.sh: a volume before an RBD image of a Ceph cluster, which qemu-nbd serves. fio verifies what
# it writes, and PostgreSQL's clients check each commit, while the OSD stops, the OSD is killed,
# qemu-nbd is killed, and the volume's server is killed each time. None may see an error. At the
# end, the image holds every byte of the volume, and a database with all that was committed.
# Starts the cluster itself, in a folder of its own. Run it as root, after
# `cargo build --release -p wbctl -p wbformat`.
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
wbctl=${CARGO_TARGET_DIR:-$repository/target}/release/wbctl
work=$(mktemp -d /tmp/wb-ceph-XXXXXX)
name=ceph-$$ verifier=''
# shellcheck source=tests/database.sh
. "$repository/tests/database.sh"
# shellcheck source=tests/ceph-cluster.sh
. "$repository/tests/ceph-cluster.sh"

cleanup() {
    ended=$?
    set +e
    trap - EXIT
    [ $ended = 0 ] || { tail -n 20 "$work"/log* "$work"/postgres.log; echo "FAILED; in $work"; }
    touch "$work/enough"
    kill $verifier $load "${clients[@]}" 2>/dev/null
    [ -z "$ceph_osd" ] || kill -CONT "$ceph_osd" 2>/dev/null
    give_up_database
    end_cluster
    wait
    if [ $ended = 0 ]; then rm -rf "$work"; else rm -rf "$work/ceph"; fi
    exit $ended
}
trap cleanup EXIT
trap 'exit 143' TERM

say() { echo "$(date +%T) $*"; }

# live MEMBER: a number of the volume's status; -1 if the daemon does not answer yet
live() {
    { "$wbctl" status "$name" --json || true; } | python3 -c '
import json, sys
print((json.load(sys.stdin)["live"] or {}).get(sys.argv[1], -1))' "$1"
}

another_server() {
    local now
    now=$(live server_pid)
    [ "$now" != -1 ] && [ "$now" != "$1" ]
}

written_back_beyond() { [ "$(live written_back_segment)" -gt "$1" ]; }

kill_server() {
    local before
    before=$(live server_pid)
    kill -KILL "$before"
    wait_until 60 another_server "$before"
}

committed() { cat "$work"/committed.* | wc -l; }

# goes_on: the volume writes back, and clients are at work
goes_on() {
    local before
    before=$(live written_back_segment)
    wait_until 120 written_back_beyond "$before"
    for pid in "${clients[@]}" "$load" "$verifier"; do
        kill -0 "$pid"
    done
    say "goes on; $(committed) commits"
}

# meanwhile: for 10 s, with the volume's server killed among them
meanwhile() {
    local before
    before=$(committed)
    sleep 3
    kill_server
    sleep 7
    say "$(($(committed) - before)) commits meanwhile; $(live free_bytes) bytes of the log are free"
}

# Beside the filesystem: writes and flushes at random, then reads all of it, again and again.
verify() {
    local round=0
    while [ ! -e "$work/enough" ]; do
        round=$((round + 1))
        fio --name=verify --filename="$device" --allow_mounted_write=1 --direct=1 \
            --ioengine=io_uring --iodepth=8 --offset=832M --size=64M --rw=randwrite \
            --bsrange=4k-64k --fdatasync=64 --rate=8M --randseed=$round \
            --verify=crc32c --verify_fatal=1 --verify_state_save=0 >"$work/log.fio" 2>&1
        echo $round >"$work/verified"
    done
}

say "starting a Ceph cluster"
unpack_ceph
start_cluster
rbd create --size 1G image
start_exporter image "$work/nbd"
truncate -s 512M "$work/cache"
"$wbctl" create "$name" --cache "$work/cache" --backing "nbd+unix:///?socket=$work/nbd" \
    --serve loop >/dev/null
attach
make_database 800M
start_postgres -c max_wal_size=128MB
verify &
verifier=$!
start_clients --rate=100
say "PostgreSQL and fio are at work"
goes_on

say "the OSD stops, and the volume's server is killed"
kill -STOP "$ceph_osd"
meanwhile
kill -CONT "$ceph_osd"
goes_on

say "the OSD is killed, and so is the volume's server"
end "$ceph_osd"
meanwhile
start_osd
wait_until 60 osd_is_up
goes_on

# Until Ceph gives up the lock of the killed client, for half a minute, its image takes no writes.
say "qemu-nbd is killed, and so is the volume's server; qemu-nbd starts again"
end "$exporter"
meanwhile
start_exporter image "$work/nbd"
goes_on

touch "$work/enough"
wait "$verifier"
end_clients
stop_postgres fast
umount "$on"
sync "$device"
before=$(sha256sum <"$device")
detach --drain
# Only what Ceph has made durable counts.
end "$exporter"
rbd export --no-progress image "$work/image"
after=$(sha256sum <"$work/image")
[ "$before" = "$after" ] || { echo "the image differs from the volume"; exit 1; }
say "the image holds every byte of the volume"

mount -o loop "$work/image" "$on"
start_postgres
check_commits
stop_postgres fast
umount "$on"
echo "Ceph: $committed commits that were checked, none lost, no error;" \
    "$(cat "$work/verified") rounds of fio verified"
