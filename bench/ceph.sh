#!/bin/bash
# ceph.sh [SECONDS] [ROUNDS]: what a flushed random write of 4 KiB costs, one at a time, on an RBD
# image of a Ceph cluster that it starts (one monitor, one OSD), and on volumes before such images.
# All take turns. The images are written before, so that their objects exist. Run it as root, after
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

ratio() { python3 -c 'import sys; print("%.3f" % (int(sys.argv[1]) / int(sys.argv[2])))' "$@"; }
median() { sort -n | sed -n "$(((rounds + 1) / 2))p"; }

unpack_ceph
start_cluster
make_image alone
make_volume nbd "$(uri front)"
make_volume loop loop
echo "microseconds per flushed write of 4 KiB; load $(cut -d ' ' -f 1-3 /proc/loadavg)"
for round in $(seq "$rounds"); do
    # What the volumes still write back would slow down Ceph.
    "$wbctl" drain "nbd-$run" >/dev/null
    "$wbctl" drain "loop-$run" >/dev/null
    sleep 2
    ceph=$(measure --ioengine=nbd --uri="$(uri alone)")
    nbd=$(measure --ioengine=nbd --uri="$(uri front)")
    "$wbctl" drain "nbd-$run" >/dev/null
    loop=$(measure --ioengine=psync --direct=1 --filename="$device")
    ratio "$nbd" "$ceph" >>"$work/ratios-nbd"
    ratio "$loop" "$ceph" >>"$work/ratios-loop"
    echo "round $round: Ceph $ceph; wb over NBD $nbd, ratio $(tail -n 1 "$work/ratios-nbd");" \
        "wb over the loop device $loop, ratio $(tail -n 1 "$work/ratios-loop");" \
        "load $(cut -d ' ' -f 1 /proc/loadavg)"
done
echo "median ratio: over NBD $(median <"$work/ratios-nbd")," \
    "over the loop device $(median <"$work/ratios-loop"); goal: at most 0.25"
