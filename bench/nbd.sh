#!/bin/bash
# What NBD costs, on both sides of a volume. Each figure is a ratio in the same run, in rounds that
# take turns, on files: no rights beyond those on the files are needed.
#
#   bench/nbd.sh [ROUNDS]
#
# 1. Serving: fio writes 4 KiB at random, 32 at a time, to a volume over NBD, and to nbdkit's
#    memory. The volume's cache and disk are files in memory.
# 2. Backing: how long a drain of 256 MiB in random blocks takes, to a file, and to the same file
#    through nbdkit on a Unix socket.
#
# Environment: WB_BIN (a folder with wbctl and wbformat, otherwise those of the release build),
# WB_BENCH_DIR (a folder on the disk that part 2 writes to, otherwise /var/tmp).
set -euo pipefail
cd "$(dirname "$0")/.."

rounds=${1:-5}
seconds=5
bin=$(realpath "${WB_BIN:-${CARGO_TARGET_DIR:-target}/release}")
memory=$(mktemp -d /dev/shm/wb-bench-XXXXXX)
disk=$(mktemp -d "${WB_BENCH_DIR:-/var/tmp}/wb-bench-XXXXXX")
export WB_CONFIG_DIR=$memory/config WB_RUN_DIR=$memory/run WB_STATE_DIR=$memory/state
volume=bench-nbd-$$
started=()

clean_up() {
    "$bin/wbctl" detach --force "$volume" >/dev/null 2>&1 || true
    for process in "${started[@]}"; do
        kill "$process" 2>/dev/null || true
        wait "$process" 2>/dev/null || true
    done
    rm -rf "$memory" "$disk"
}
trap clean_up EXIT

# Starts a process that serves on a Unix socket, and waits for the socket.
serve_on() {
    local socket=$1
    shift
    "$@" >"$memory/log" 2>&1 &
    started+=($!)
    for ((wait = 0; wait < 200; wait++)); do
        if [[ -S $socket ]]; then return; fi
        sleep 0.05
    done
    cat "$memory/log" >&2
    exit 1
}

# The writes per second that an address takes.
writes_per_second() {
    fio --name=write --ioengine=nbd --uri="$1" --rw=randwrite --bs=4k --iodepth=32 \
        --size=256M --time_based --runtime=$seconds --randrepeat=0 --output-format=json \
        --output="$memory/fio" >/dev/null
    python3 -c 'import json, sys; print(round(json.load(sys.stdin)["jobs"][0]["write"]["iops"]))' \
        <"$memory/fio"
}

ratio() {
    python3 -c 'import sys; print(f"{float(sys.argv[1]) / float(sys.argv[2]):.2f}")' "$1" "$2"
}

median() {
    printf '%s\n' "$@" | sort -n | sed -n "$((($# + 1) / 2))p"
}

new_volume() {
    truncate -s "$1" "$memory/cache"
    WB_RUN_DIR=$memory/run "$bin/wbctl" create "$volume" --cache "$memory/cache" --backing "$2" \
        --serve "nbd+unix:///?socket=$memory/wb" writeback_threshold=0 >/dev/null
    serve_on "$memory/wb" "$bin/wbctl" attach "$volume"
}

end_volume() {
    "$bin/wbctl" detach "$volume" "$@" >/dev/null
    "$bin/wbctl" remove "$volume" --force >/dev/null
    rm -f "$memory/cache"
}

echo "load: $(cut -d' ' -f1-3 /proc/loadavg), $(nproc) processors"
echo "serving: 4 KiB random writes, 32 at a time, per second"
truncate -s 4G "$memory/disk"
new_volume 3G "$memory/disk"
serve_on "$memory/nbdkit" nbdkit -f -U "$memory/nbdkit" memory 256M
ratios=()
for ((round = 1; round <= rounds; round++)); do
    wb=$(writes_per_second "nbd+unix:///?socket=$memory/wb")
    nbdkit=$(writes_per_second "nbd+unix:///?socket=$memory/nbdkit")
    ratios+=("$(ratio "$wb" "$nbdkit")")
    # So that the next round finds room in the log.
    "$bin/wbctl" drain "$volume" >/dev/null
    echo "  wb $wb, nbdkit's memory $nbdkit: ${ratios[-1]}"
done
echo "  median: $(median "${ratios[@]}")"
end_volume
rm "$memory/disk"

# How many seconds a drain takes to a backing device.
drain() {
    new_volume 512M "$1"
    fio --name=fill --ioengine=nbd --uri="nbd+unix:///?socket=$memory/wb" --rw=randwrite --bs=4k \
        --iodepth=32 --size=1G --io_size=256M --randseed=1 >/dev/null
    local begun=$EPOCHREALTIME
    "$bin/wbctl" drain "$volume" >/dev/null
    python3 -c 'import sys; print(f"{float(sys.argv[2]) - float(sys.argv[1]):.2f}")' \
        "$begun" "$EPOCHREALTIME"
    end_volume
}

echo "backing: a drain of 256 MiB in blocks of 4 KiB all over 1 GiB, in seconds"
fallocate -l 1G "$disk/disk"
serve_on "$disk/socket" nbdkit -f -U "$disk/socket" file "$disk/disk"
ratios=()
for ((round = 1; round <= rounds; round++)); do
    direct=$(drain "$disk/disk")
    nbd=$(drain "nbd+unix:///?socket=$disk/socket")
    ratios+=("$(ratio "$direct" "$nbd")")
    echo "  directly $direct, over a Unix socket $nbd: ${ratios[-1]} of the speed"
done
echo "  median: $(median "${ratios[@]}")"
