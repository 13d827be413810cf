# The plan of the VM that measures front ends and peers. Prints a line for each figure: an equals
# sign, the round, the group, the target, the work, and how many requests a second it did.
# shellcheck shell=sh disable=SC2154 # run.sh puts `rounds` before it
cd /tmp || exit
for module in fuse loop dm-mod dm-writecache bcache; do modprobe "$module"; done
modprobe brd rd_nr=3 rd_size=$((640 << 10))
modprobe dm-writeboost 2>/dev/null && writeboost=dm-writeboost
modprobe ublk_drv 2>/dev/null && ublk=wb-ublk

# measure GROUP TARGET WORK DEVICE FIO-OPTION...: of writes if there are any, else of reads
measure() {
    group=$1 target=$2 work=$3 device=$4
    shift 4
    if fio --name=x --filename="$device" --bs=4k --size=512M --direct=1 --norandommap \
        --output-format=terse --terse-version=3 "$@" > fio 2>&1; then
        printf '= %s %s %s %s ' "$round" "$group" "$target" "$work"
        awk -F ';' '{ print ($49 > 0 ? $49 : $8) }' fio
    else
        echo "fio failed: $target $work"
        cat fio
    fi
}

# on_memory TARGET DEVICE: what the front end itself costs
on_memory() {
    for queue in 32 1; do
        for work in write read; do
            measure memory "$1" "$work-$queue" "$2" --rw=rand$work --iodepth=$queue \
                --ioengine=libaio --time_based --runtime=2 --randseed="$round"
        done
    done
    measure memory "$1" sync "$2" --rw=randwrite --ioengine=psync --fsync=1 --time_based \
        --runtime=2 --randseed="$round"
}

# on_disks TARGET DEVICE: 40 MiB of writes, and then 4 MiB, each of them flushed
on_disks() {
    measure disks "$1" burst "$2" --rw=randwrite --iodepth=32 --ioengine=libaio --io_size=40M \
        --end_fsync=1 --randseed="$round"
    measure disks "$1" sync "$2" --rw=randwrite --ioengine=psync --fsync=1 --io_size=4M \
        --randseed="$round"
}

# blank DEVICE...: no program takes them for what they were
blank() {
    for blanked in "$@"; do
        dd if=/dev/zero of="$blanked" bs=1M count=2 oflag=direct conv=fsync status=none
    done
}

# await COMMAND...: repeats it until it succeeds
await() {
    tries=0
    until "$@"; do
        tries=$((tries + 1))
        [ $tries -lt 300 ] || return
        sleep 0.1
    done
}

ready() {
    grep -q '^ready ' said || ! kill -0 "$daemon" 2>/dev/null
}

# with_wb FRONT-END CACHE BACKING MEASURE: a new cache, not written back meanwhile
with_wb() {
    blank "$2"
    rm -rf /etc/wb /var/lib/wb
    # The segments of the last round are still there.
    wbctl create v --cache "$2" --backing "$3" --serve "$1" --force --discard-dirty \
        > created 2>&1 || cat created
    : > said
    wbctl attach v writeback_threshold=0 > said 2> errors &
    daemon=$!
    await ready
    device=$(sed -n 's/^ready //p' said)
    if [ -b "$device" ]; then
        $4 "wb-$1" "$device"
        wbctl detach v > detached 2>&1 || cat detached
    else
        cat errors
    fi
    wait $daemon || cat errors
}

with_writeboost() {
    blank /disk/cache
    dmsetup create peer --table "0 $sectors writeboost /disk/backing /disk/cache 0"
    dmsetup mknodes
    on_disks dm-writeboost /dev/mapper/peer
    dmsetup remove peer
}

with_writecache() {
    blank /disk/cache
    dmsetup create peer --table "0 $sectors writecache s /disk/backing /disk/cache 4096 0"
    dmsetup mknodes
    on_disks dm-writecache /dev/mapper/peer
    dmsetup remove peer
}

with_bcache() {
    blank /disk/cache /disk/backing
    make-bcache --bucket 64k --writeback -C /disk/cache -B /disk/backing > made 2>&1 || cat made
    for registered in cache backing; do
        readlink -f /disk/$registered > /sys/fs/bcache/register
    done
    await test -b /dev/bcache0
    echo 0 > /sys/block/bcache0/bcache/sequential_cutoff
    echo 90 > /sys/block/bcache0/bcache/writeback_percent
    for setting in /sys/fs/bcache/*-*/congested_write_threshold_us; do echo 0 > "$setting"; done
    on_disks bcache /dev/bcache0
    echo 1 > /sys/block/bcache0/bcache/stop
    for cache_set in /sys/fs/bcache/*-*; do echo 1 > "$cache_set/stop"; done
    await test ! -e /sys/block/bcache0
    await no_cache_set
}

no_cache_set() {
    [ "$(echo /sys/fs/bcache/*-*)" = '/sys/fs/bcache/*-*' ]
}

ublk_null=
if [ -n "${ublk:-}" ] && command -v rublk >/dev/null; then
    rublk add null -n 0 -q 1 -d 128 > rublk 2>&1 || cat rublk
    await test -b /dev/ublkb0
    ublk_null=/dev/ublkb0
fi
sectors=$(blockdev --getsz /disk/backing)
for round in $(seq "$rounds"); do
    echo "round $round of $rounds, after $(cut -d. -f1 /proc/uptime) s"
    on_memory ramdisk /dev/ram0
    [ -z "$ublk_null" ] || on_memory ublk-null $ublk_null
    [ -z "${ublk:-}" ] || with_wb ublk /dev/ram1 /dev/ram2 on_memory
    with_wb loop /dev/ram1 /dev/ram2 on_memory
    on_disks no-cache /disk/backing
    [ -z "${writeboost:-}" ] || with_writeboost
    with_writecache
    with_bcache
    [ -z "${ublk:-}" ] || with_wb ublk /disk/cache /disk/backing on_disks
    with_wb loop /disk/cache /disk/backing on_disks
done
