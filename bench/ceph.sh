#!/bin/bash
# ceph.sh [SECONDS] [ROUNDS]: what a flushed random write of 4 KiB costs, one at a time, on an RBD
# image of a Ceph cluster that it starts (one monitor, one OSD), and on volumes before such images,
# with write-back paused, and again while it uses the same processors as the clients. All take
# turns. The images are written before, so that their objects exist. Run it as root, after
# `cargo build --release -p wbctl -p wbformat`.
set -euo pipefail
seconds=${1:-10} rounds=${2:-3}
repository=$(cd "$(dirname "$0")/.." && pwd)
wbctl=${CARGO_TARGET_DIR:-$repository/target}/release/wbctl
work=$(mktemp -d "${TMPDIR:-/tmp}/wb-bench-ceph-XXXXXX")
chmod 755 "$work"
export WB_CONFIG_DIR=$work/config WB_RUN_DIR=$work/run WB_STATE_DIR=$work/state
run=$$ keepers=() exporters=()
# shellcheck source=tests/ceph-cluster.sh
. "$repository/tests/ceph-cluster.sh"

cleanup() {
    ended=$?
    set +e
    trap - EXIT
    [ $ended = 0 ] || tail -n 20 "$work"/log "$work"/log.qemu-nbd
    for front in nbd loop; do
        "$wbctl" detach --force "$front-$run" >/dev/null 2>&1
    done
    for pid in "${keepers[@]}" "${exporters[@]}"; do
        end "$pid"
    done
    exporter=
    end_cluster
    rm -rf "$work"
    exit $ended
}
trap cleanup EXIT
trap 'exit 143' TERM

uri() { echo "nbd+unix:///?socket=$work/$1"; }

# make_image NAME: serves a written image as $(uri NAME)
make_image() {
    rbd create --size 1G "$1"
    start_exporter "$1" "$work/$1"
    exporters+=("$exporter")
    fio --name=fill --ioengine=nbd --uri="$(uri "$1")" --rw=write --bs=1M --iodepth=8 \
        --size=256M --end_fsync=1 >/dev/null
}

# make_volume FRONT ADDRESS: before an image of its own; sets device
make_volume() {
    make_image "behind-$1"
    truncate -s 1G "$work/cache-$1"
    "$wbctl" create "$1-$run" --cache "$work/cache-$1" --backing "$(uri "behind-$1")" \
        --serve "$2" >/dev/null
    "$wbctl" attach "$1-$run" >"$work/ready-$1" 2>>"$work/log" &
    keepers+=($!)
    wait_until 60 grep -qs '^ready' "$work/ready-$1"
    device=$(sed -n 's/^ready //p' "$work/ready-$1")
}

# measure OPTION...: microseconds per flushed write
measure() {
    fio --name=commits --rw=randwrite --bs=4k --size=256M --fsync=1 --randrepeat=0 \
        --time_based --runtime="$seconds" --output-format=json --output="$work/measured" \
        "$@" >>"$work/log" 2>&1
    python3 -c '
import json, sys
text = open(sys.argv[1]).read()
# fio may say something first.
job = json.loads(text[text.index("{"):])["jobs"][0]
assert job["error"] == 0, job["error"]
print(round(job["job_runtime"] * 1000 / job["write"]["total_ios"]))' "$work/measured"
}

# turn NAME BASELINE MEASURE_OPTION...: prints a time, and its ratio to the baseline if there is one
turn() {
    local name=$1 baseline=$2 ratio=1 time
    shift 2
    time=$(measure "$@")
    if [ "$baseline" -gt 0 ]; then
        ratio=$(python3 -c "print('%.3f' % ($time / $baseline))")
        echo "$ratio" >>"$work/ratios.$name"
    fi
    echo "$time" >"$work/time"
    printf '%-36s %6d  %s  load %s\n' "$name" "$time" "$ratio" "$(cut -d ' ' -f 1 /proc/loadavg)"
}

on_volumes() { for front in nbd loop; do "$wbctl" "$1" "$front-$run" >/dev/null; done; }

unpack_ceph
start_cluster
make_image alone
make_volume nbd "$(uri front)"
make_volume loop loop
# The disk of the volumes' caches and of the OSD: what a commit costs at least.
truncate -s 256M "$work/file"
fio --name=fill --filename="$work/file" --rw=write --bs=1M --size=256M --end_fsync=1 >/dev/null
alone=(--ioengine=psync --direct=1 --filename="$work/file" --rw=write --bs=8k)
over_nbd=(--ioengine=nbd --uri="$(uri front)")
over_loop=(--ioengine=psync --direct=1 --filename="$device")
echo "microseconds per flushed write of 4 KiB, and the ratio to Ceph's; $(date)"
for _ in $(seq "$rounds"); do
    # What the volumes still write back would slow down Ceph.
    on_volumes drain
    on_volumes pause
    sleep 2
    turn 'Ceph' 0 --ioengine=nbd --uri="$(uri alone)"
    ceph=$(cat "$work/time")
    turn 'the disk alone, 8 KiB' "$ceph" "${alone[@]}"
    turn 'wb over NBD' "$ceph" "${over_nbd[@]}"
    turn 'wb over the loop device' "$ceph" "${over_loop[@]}"
    on_volumes drain
    on_volumes resume
    turn 'wb over NBD, writing back' "$ceph" "${over_nbd[@]}"
    on_volumes drain
    turn 'wb over the loop device, writing back' "$ceph" "${over_loop[@]}"
done
for ratios in "$work"/ratios.*; do
    echo "${ratios#*/ratios.}: median ratio $(sort -n "$ratios" | sed -n "$(((rounds + 1) / 2))p")"
done
echo "goal: at most 0.25"
