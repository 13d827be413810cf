#!/bin/bash
# pause.sh [SIZE] [DIRTY] [KILLS]: how long programs wait when the server of a volume is killed,
# with a cache of SIZE GiB that holds DIRTY GiB (7/8 of SIZE by default). Prints the longest
# request of all, and that of the same load without a kill. Run it as root, after `make build`.
set -euo pipefail
size=${1:-8} dirty=${2:-$((${1:-8} * 7 / 8))} kills=${3:-10}
repository=$(cd "$(dirname "$0")/.." && pwd)
release=${CARGO_TARGET_DIR:-$repository/target}/release
work=$(mktemp -d "${TMPDIR:-/tmp}/wb-pause-XXXXXX")
export WB_CONFIG_DIR=$work/config WB_RUN_DIR=$work/run WB_STATE_DIR=$work/state
export WB_DEATHS_A_MINUTE=1000000
name=pause-$$ keeper=

cleanup() {
    ended=$?
    set +e
    trap - EXIT
    [ $ended = 0 ] || tail -n 20 "$work"/log 2>/dev/null
    kill $(jobs -p) 2>/dev/null
    wait
    rm -rf "$work"
    exit $ended
}
trap cleanup EXIT

# load SECONDS: random reads and writes, few enough that the log does not fill; prints the longest
# one in milliseconds
load() {
    fio --name=load --filename="$device" --direct=1 --ioengine=io_uring --rw=randrw --bs=4k \
        --iodepth=16 --rate_iops=2000 --time_based --runtime="$1" --randrepeat=0 --norandommap \
        --output-format=json | python3 -c '
import json, sys
job = json.load(sys.stdin)["jobs"][0]
assert job["error"] == 0, job["error"]
print(round(max(job[way]["clat_ns"]["max"] for way in ("read", "write")) / 1e6))'
}

server() {
    "$release/wbctl" status "$name" --json |
        python3 -c 'import json, sys; print(json.load(sys.stdin)["live"]["server_pid"])'
}

truncate -s "${size}G" "$work/cache"
truncate -s "$((4 * size))G" "$work/backing"
"$release/wbctl" create "$name" --cache "$work/cache" --backing "$work/backing" >/dev/null
"$release/wbctl" attach "$name" >"$work/ready" 2>"$work/log" &
keeper=$!
until device=$(sed -n 's/^ready //p' "$work/ready") && [ -n "$device" ]; do
    kill -0 $keeper
    sleep 0.1
done
"$release/wbctl" pause "$name" >/dev/null
fio --name=fill --filename="$device" --direct=1 --ioengine=io_uring --rw=randwrite --bs=4k \
    --iodepth=64 --io_size="${dirty}G" --norandommap --randrepeat=0 >/dev/null
"$release/wbctl" status "$name" | grep -i dirty
without=$(load 5)
load $((2 * kills)) >"$work/longest" &
loading=$!
for _ in $(seq "$kills"); do
    sleep 1.8
    kill -KILL "$(server)"
done
wait $loading
grep -o 'took over in.*' "$work/log" || true
echo "the longest request: $(cat "$work/longest") ms with $kills kills, $without ms without"
"$release/wbctl" detach --force "$name" >/dev/null
wait $keeper
