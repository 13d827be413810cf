# The plan of the VM that tests the front ends, from end to end, with the programs that people use.
# shellcheck shell=sh disable=SC2154 # run.sh puts `only` and `want_kills` before it
set +e
modprobe fuse
modprobe loop
modprobe ext4
modprobe xfs
mkdir -p /mnt
front= passed=0 failed=0

# await COMMAND...: repeats it until it succeeds. Only guards against hangs.
await() {
    { set +x; } 2>/dev/null
    tries=0
    until "$@"; do
        tries=$((tries + 1))
        if [ $tries = 600 ]; then
            echo "in vain: $*"
            return 1
        fi
        sleep 0.1
    done
    set -x
}

refuses() {
    if "$@"; then
        echo "not refused: $*"
        return 1
    fi
}

# create BYTES [OPTION]...: makes the volume v, of two files, served as the tests of now want it
create() {
    bytes=$1
    shift
    truncate -s "$bytes" backing
    truncate -s 64M cache
    wbctl create v --cache cache --backing backing --serve "$front" --force "$@"
}

# attach [OPTION]...: sets `device` and `daemon`
attach() {
    : > ready
    wbctl attach v "$@" > ready 2>> daemon &
    daemon=$!
    await is_ready
    device=$(sed -n 's/^ready //p' ready)
    [ -b "$device" ]
}

is_ready() {
    grep -q '^ready ' ready || ! kill -0 "$daemon"
}

detach() {
    wbctl detach v "$@"
    wait "$daemon"
    await is_gone "$device"
}

crash() {
    kill -9 "$daemon"
    # Its exit code says only that it was killed.
    wait "$daemon" || true
}

# server: prints the process that serves the volume
server() {
    tr -d ' ' < "/proc/$daemon/task/$daemon/children"
}

# kill_server: kills it, and waits for the next one; sets `killed`
kill_server() {
    killed=$(server)
    kill -9 "$killed"
    await another_serves
}

another_serves() {
    now=$(server) && [ -n "$now" ] && [ "$now" != "$killed" ]
}

# load FILE: writes and checks until the file `enough` is there; `rounds` tells how often
load() {
    echo 0 > rounds
    until [ -e enough ]; do
        verify "$1" --rw=randrw --verify_backlog=128 --fsync=16 --randseed="$(cat rounds)" || exit
        echo $(($(cat rounds) + 1)) > rounds
    done
}

# has_ended JOB: a child of this shell has ended
has_ended() {
    ! kill -0 "$1" 2>/dev/null
}

# deaths FILE: kills servers while a file or device is in use, at all times after their start
deaths() {
    load "$1" &
    loader=$!
    { set +x; } 2>/dev/null
    kills=0
    while [ $kills -lt "$want_kills" ] && ! has_ended $loader; do
        sleep "0.$((kills * 3 % 10))"
        kill_server
        kills=$((kills + 1))
    done
    set -x
    # The last one gets to work.
    sleep 1
    : > enough
    await has_ended $loader
    wait $loader
    [ "$(grep -c 'was killed by SIGKILL' daemon)" = $kills ]
    say "$kills kills of the server; $(cat rounds) rounds of writes and reads, all right"
}

# say WORDS: for who reads the outcome
say() {
    echo "$*" >> said
}

# is_gone DEVICE: nothing is left of the volume that was there
is_gone() {
    case $1 in
    /dev/loop*) [ ! -e "/sys/block/${1#/dev/}/loop" ] ;;
    *) [ ! -e "$1" ] && [ ! -e "/dev/ublkc${1#/dev/ublkb}" ] && [ ! -e "/sys/block/${1#/dev/}" ] ;;
    esac
}

# write FILE [OPTION]...: copies a file to the volume, past the page cache, and flushes
write() {
    from=$1
    shift
    dd if="$from" of="$device" bs=1M oflag=direct conv=nocreat,notrunc,fsync status=none "$@"
}

# same FILE [DEVICE]: the volume begins with what is in the file
same() {
    mib=$(($(stat -c %s "$1") >> 20))
    dd if="${2:-$device}" bs=1M count=$mib iflag=direct status=none | cmp - "$1"
}

# random FILE MIB
random() {
    dd if=/dev/urandom of="$1" bs=1M count="$2" status=none
}

# zeros FILE AT_MIB MIB: puts zeros into a file
zeros() {
    dd if=/dev/zero of="$1" bs=1M seek="$2" count="$3" conv=notrunc status=none
}

# KiB that a file takes
space() {
    du -k "$1" | cut -f1
}

# verify FILE [OPTION]...: fio writes a file or device and reads it back, all of it checked
verify() {
    file=$1
    shift
    fio --name=verify --filename="$file" --size=8M --rw=randwrite --bsrange=4k-64k --direct=1 \
        --ioengine=libaio --iodepth=16 --verify=crc32c --verify_fatal=1 "$@" > fio
}

the_front_end_is_the_one_asked_for() {
    create 64M
    attach
    case $front in ublk) path=/dev/ublkb ;; *) path=/dev/loop ;; esac
    [ "${device#"$path"}" != "$device" ]
    [ "$(readlink -f /dev/wb/v)" = "$device" ]
    [ "$(blockdev --getsize64 "$device")" = $((64 << 20)) ]
    [ "$(blockdev --getro "$device")" = 0 ]
    # Whoever uses the device must know that it needs flushes.
    grep -q 'write back' "/sys/block/${device#/dev/}/queue/write_cache"
    [ "$front" != ublk ] || grep -q 1 "/sys/block/${device#/dev/}/queue/fua"
    # Other requests wait for a discard.
    [ "$(cat "/sys/block/${device#/dev/}/queue/discard_max_bytes")" = $((64 << 20)) ]
    detach
    [ ! -e /dev/wb/v ]
}

requests_of_all_sizes_read_back() {
    create 64M
    attach
    verify "$device" --size=16M --rw=randrw --bsrange=512-256k
    detach
}

a_filesystem_holds_what_fio_wrote() { # KIND MAKE CHECK
    create 320M
    attach
    $2 "$device"
    mount -t "$1" "$device" /mnt
    verify /mnt/file --end_fsync=1
    umount /mnt
    $3 "$device"
    detach
    attach
    mount -t "$1" "$device" /mnt
    verify /mnt/file --verify_only
    umount /mnt
    detach --drain
    wbcheck cache --backing backing
    $3 backing
}

ext4_holds_what_fio_wrote() {
    a_filesystem_holds_what_fio_wrote ext4 'mkfs.ext4 -q' 'e2fsck -fn'
}

xfs_holds_what_fio_wrote() {
    a_filesystem_holds_what_fio_wrote xfs 'mkfs.xfs -q' 'xfs_repair -n'
}

discarded_space_is_given_up_and_reads_as_zeros() {
    create 64M
    attach
    random data 24
    write data
    wbctl drain v
    before=$(space backing)
    blkdiscard --offset 4M --length 8M "$device"
    # Who demands zeros keeps the space for them. Files in memory cannot do that at once: the kernel
    # writes zeros instead, and does not flush them.
    blkdiscard --zeroout --offset 16M --length 4M "$device"
    dd if=/dev/null of="$device" conv=nocreat,notrunc,fsync status=none
    zeros data 4 8
    zeros data 16 4
    same data
    after=$(space backing)
    [ "$after" -le $((before - 8192)) ]
    [ "$after" -gt $((before - 12288)) ]
    crash
    attach
    same data
    detach --drain
    same data backing
}

fstrim_gives_up_the_space_of_removed_files() {
    create 64M
    attach
    mkfs.ext4 -q "$device"
    mount -t ext4 "$device" /mnt
    random /mnt/file 24
    sync
    wbctl drain v
    before=$(space backing)
    rm /mnt/file
    sync
    fstrim -v /mnt
    wbctl drain v
    [ "$(space backing)" -le $((before - 20 * 1024)) ]
    umount /mnt
    detach
}

a_discard_reaches_the_disk() {
    # The cache of the other front end is still there.
    wbctl create v --cache /disk/cache --backing /disk/backing --serve "$front" --discard-dirty
    attach
    random data 8
    write data
    wbctl drain v
    # The disk's file is in the share.
    before=$(space /share/backing)
    blkdiscard --offset 2M --length 4M "$device"
    [ "$(space /share/backing)" -le $((before - 4096)) ]
    zeros data 2 4
    same data
    detach
}

what_was_flushed_survives_sigkill() {
    create 64M
    attach
    wbctl pause v
    random data 16
    write data
    crash
    attach
    same data
    # Each write is durable when it is acknowledged.
    echo 0 > acknowledged
    random newer 1
    (
        set +ex
        n=0
        while dd if=newer of="$device" bs=4k skip=$n seek=$n count=1 oflag=direct,dsync \
            conv=nocreat,notrunc status=none 2>/dev/null; do
            n=$((n + 1))
            echo $n > acknowledged
            [ $n -lt 256 ] || break
        done
    ) &
    writer=$!
    await some_are_acknowledged
    crash
    wait $writer
    attach
    [ "$(blockdev --getsize64 "$device")" = $((64 << 20)) ]
    cmp -n $(($(cat acknowledged) * 4096)) "$device" newer
    detach
}

some_are_acknowledged() {
    [ "$(cat acknowledged)" -ge 20 ]
}

what_fio_synced_survives_sigkill() {
    create 64M
    attach
    wbctl pause v
    verify "$device" --do_verify=0 --fsync=8 --end_fsync=1
    crash
    attach
    verify "$device" --verify_only
    detach
}

a_synced_file_survives_sigkill_while_mounted() {
    create 64M
    attach
    mkfs.ext4 -q "$device"
    mount -t ext4 "$device" /mnt
    random data 8
    cp data /mnt/data
    sync
    random /mnt/more 4
    crash
    umount /mnt
    await is_gone "$device"
    attach
    mount -t ext4 "$device" /mnt
    cmp data /mnt/data
    umount /mnt
    e2fsck -fn "$device"
    detach
}

sectors_of_4096_bytes() {
    create 64M --sector-size 4096
    attach
    [ "$(blockdev --getss "$device")" = 4096 ]
    [ "$(blockdev --getpbsz "$device")" = 4096 ]
    random data 1
    write data
    refuses dd if=data of="$device" bs=512 count=1 oflag=direct conv=nocreat,notrunc
    same data
    mkfs.ext4 -q "$device"
    mount -t ext4 "$device" /mnt
    cp data /mnt/data
    umount /mnt
    e2fsck -fn "$device"
    detach
}

read_only() {
    create 64M
    attach
    mkfs.ext4 -q "$device"
    mount -t ext4 "$device" /mnt
    random data 4
    cp data /mnt/data
    umount /mnt
    detach
    cp cache cache-before
    cp backing backing-before
    attach --read-only
    [ "$(blockdev --getro "$device")" = 1 ]
    refuses dd if=data of="$device" bs=4k count=1 oflag=direct conv=nocreat,notrunc
    mount -t ext4 -o ro,noload "$device" /mnt
    cmp data /mnt/data
    umount /mnt
    detach
    cmp cache cache-before
    cmp backing backing-before
}

partitions() {
    create 64M
    attach
    printf 'size=16M\nsize=16M\n' | sfdisk --quiet "$device"
    await test -b "${device}p2"
    mkfs.ext4 -q "${device}p1"
    mount -t ext4 "${device}p1" /mnt
    random data 4
    cp data /mnt/data
    refuses wbctl detach v
    umount /mnt
    detach
    await test ! -e "${device}p1"
    attach
    await test -b "${device}p2"
    mount -t ext4 "${device}p1" /mnt
    cmp data /mnt/data
    umount /mnt
    crash
    await test ! -e "${device}p1"
}

detach_is_refused_while_the_volume_is_in_use() {
    create 64M
    attach
    mkfs.ext4 -q "$device"
    mount -t ext4 "$device" /mnt
    refuses wbctl detach v 2> refused
    grep -q 'mounted on /mnt' refused
    umount /mnt
    sleep 1000 < "$device" &
    holder=$!
    refuses wbctl detach v 2> refused
    grep -q "open in sleep (process $holder)" refused
    kill $holder
    wait $holder || true
    detach
}

sigkill_leaves_nothing_and_attach_works_at_once() {
    create 64M
    attach
    random data 2
    write data
    crash
    await is_gone "$device"
    refuses pidof wbctl
    attach
    # Now without waiting until the kernel has put away what was there.
    for _ in 1 2 3; do
        crash
        attach
        same data
    done
    detach
}

a_killed_daemon_ends_though_its_page_cache_is_dirty() {
    create 64M
    attach
    for _ in 1 2 3; do
        random data 1
        write data
        dd if=data of="$device" bs=1M seek=1 conv=nocreat,notrunc status=none
        crash
        await is_gone "$device"
        attach
        same data
    done
    detach
}

a_later_attach_removes_what_a_killed_daemon_and_its_guard_left() {
    create 64M
    attach
    killall -9 wbctl
    wait "$daemon" || true
    [ -n "$(ls /sys/class/ublk-char)" ]
    rm -r /run/wb
    # The kernel notices a moment later that the daemon is gone.
    await an_attach_leaves_nothing
}

an_attach_leaves_nothing() {
    attach && detach && [ -z "$(ls /sys/class/ublk-char)" ]
}

without_the_driver_ublk_is_refused_and_auto_takes_loop() {
    create 64M
    refuses wbctl attach v --serve ublk 2> refused
    grep 'modprobe ublk_drv' refused
    attach
    [ "${device#/dev/loop}" != "$device" ]
    detach
}

with_the_driver_auto_takes_ublk() {
    create 64M
    attach
    [ "${device#/dev/ublkb}" != "$device" ]
    detach
}

no_io_error_since() { # LINES of the kernel's log
    dmesg | tail -n +$(($1 + 1)) > kernel
    refuses grep -iE 'i/o error|buffer i/o|ext4-fs error' kernel
}

a_device_goes_on_while_its_servers_are_killed() {
    export WB_DEATHS_A_MINUTE=1000000
    logged=$(dmesg | wc -l)
    create 64M
    attach
    deaths "$device"
    verify "$device"
    detach --drain
    no_io_error_since "$logged"
    verify backing --verify_only
    refuses pidof wbctl
}

a_filesystem_goes_on_while_its_servers_are_killed() {
    export WB_DEATHS_A_MINUTE=1000000
    logged=$(dmesg | wc -l)
    create 64M
    attach
    mkfs.ext4 -q "$device"
    mount -t ext4 "$device" /mnt
    random data 4
    cp data /mnt/data
    deaths /mnt/file
    cmp data /mnt/data
    umount /mnt
    e2fsck -fn "$device"
    detach
    no_io_error_since "$logged"
}

# Nothing that was acknowledged is lost, flushed or not.
what_no_one_flushed_outlives_the_server() {
    export WB_DEATHS_A_MINUTE=1000000
    create 64M
    attach
    wbctl pause v
    for _ in 1 2 3 4; do
        random data 3
        dd if=data of="$device" bs=64k oflag=direct conv=nocreat,notrunc status=none
        kill_server
        same data
    done
    detach
}

a_restart_is_not_seen_by_users() {
    create 64M
    attach
    load "$device" &
    loader=$!
    for _ in 1 2 3 4 5 6 7 8; do
        before=$(server)
        wbctl restart v
        [ "$(server)" != "$before" ]
    done
    : > enough
    wait $loader
    detach
    refuses grep -i 'died\|killed' daemon
}

a_volume_whose_servers_die_too_often_fails() {
    create 64M
    attach
    random data 2
    write data
    load "$device" > loaded 2>&1 &
    loader=$!
    # A death before it serves makes the keeper try another program first.
    for _ in 1 2 3 4; do
        kill_server
        await wbctl status v
    done
    kill -9 "$(server)"
    refuses wait "$daemon"
    # Its users get errors, and do not wait.
    await has_ended $loader
    refuses wait $loader
    grep 'has died too often' daemon
    await is_gone "$device"
    await refuses pidof wbctl
    [ -z "$(ls /sys/class/ublk-char 2>/dev/null)" ]
    attach
    detach
}

# A later server is recognized by the kernel as such, and ends in order.
a_volume_ends_in_order_after_a_death() {
    create 64M
    attach
    random data 8
    write data
    kill_server
    await wbctl status v
    kill "$daemon"
    wait "$daemon" || true
    await is_gone "$device"
    await refuses pidof wbctl
    attach
    same data
    detach
}

# has_done_another_round: `load` has begun and ended a round since `rounds_before` was set
has_done_another_round() {
    [ "$(cat rounds)" -gt $((rounds_before + 1)) ]
}

go_on_for_a_while() {
    rounds_before=$(cat rounds)
    await has_done_another_round
}

# pull DISK: takes it out of the mirror. It may still be in use just after it has failed.
pull() {
    mdadm /dev/md0 --fail "$1"
    await mdadm /dev/md0 --remove "$1"
}

# has_data_at MIB DEVICE: what is in the file `data` is there
has_data_at() {
    dd if="$2" bs=1M skip="$1" count=4 iflag=direct status=none | cmp - data
}

is_mirrored() {
    grep -F '[UU]' /proc/mdstat
}

the_loss_of_an_ssd_below_a_mirrored_cache_is_survived() {
    modprobe raid1
    mdadm --create /dev/md0 --run --metadata=1.2 --level=1 --raid-devices=2 --bitmap=internal \
        "$(readlink -f /disk/leg-a)" "$(readlink -f /disk/leg-b)"
    # The cache of the other front end is still there.
    wbctl create v --cache /dev/md0 --backing /disk/backing --serve "$front" --discard-dirty
    # Nothing is written back before the log is nearly full.
    attach writeback_threshold=0
    random data 4
    write data seek=16
    echo 0 > rounds
    load "$device" &
    loader=$!
    go_on_for_a_while
    pull /disk/leg-b
    write data seek=20
    go_on_for_a_while
    mdadm /dev/md0 --re-add /disk/leg-b
    await is_mirrored
    go_on_for_a_while
    # Now all is on the leg that came back.
    pull /disk/leg-a
    write data seek=24
    go_on_for_a_while
    : > enough
    await has_ended $loader
    wait $loader
    wbctl drain v
    wbctl pause v
    write data seek=28
    # It is on that leg alone.
    refuses has_data_at 28 /disk/backing
    crash
    await mdadm --stop /dev/md0
    mdadm --assemble /dev/md0 --run "$(readlink -f /disk/leg-b)"
    attach
    for at in 16 20 24 28; do has_data_at $at "$device"; done
    detach --drain
    for at in 16 20 24 28; do has_data_at $at /disk/backing; done
    wbcheck /dev/md0 --backing /disk/backing
    mdadm --stop /dev/md0
    say "$(cat rounds) rounds of writes and reads beside the loss of one leg and of the other"
}

# try TEST: runs it in a shell and a folder of its own, puts away what it left, and says how it went
try() {
    case $1 in *${only:-}*) ;; *) return ;; esac
    rm -rf /tmp/test /etc/wb /var/lib/wb
    mkdir -p /tmp/test /etc /run
    cd /tmp/test || exit
    : > daemon
    started=$(cut -d. -f1 /proc/uptime)
    (set -ex; "$1") > log 2>&1
    code=$?
    took=$(($(cut -d. -f1 /proc/uptime) - started))
    if [ $code = 0 ]; then
        passed=$((passed + 1))
        echo "ok      $front: $1 ($took s)"
        [ ! -e said ] || sed 's/^/        /' said
    else
        failed=$((failed + 1))
        echo "FAILED  $front: $1 ($took s)"
        tail -n 30 log | sed 's/^/    /'
        echo "    the daemon said:"
        sed 's/^/    /' daemon
    fi
    ! grep -q ' /mnt ' /proc/mounts || umount -l /mnt
    ! pidof wbctl >/dev/null || killall -9 wbctl 2>/dev/null || true
    [ ! -e /dev/md0 ] || mdadm --stop /dev/md0 || true
    cd / || exit
}

try_all() {
    front=$1
    try the_front_end_is_the_one_asked_for
    try requests_of_all_sizes_read_back
    try ext4_holds_what_fio_wrote
    try xfs_holds_what_fio_wrote
    try discarded_space_is_given_up_and_reads_as_zeros
    try fstrim_gives_up_the_space_of_removed_files
    try a_discard_reaches_the_disk
    try what_was_flushed_survives_sigkill
    try what_fio_synced_survives_sigkill
    try a_synced_file_survives_sigkill_while_mounted
    try sectors_of_4096_bytes
    try read_only
    try partitions
    try detach_is_refused_while_the_volume_is_in_use
    try sigkill_leaves_nothing_and_attach_works_at_once
    try a_killed_daemon_ends_though_its_page_cache_is_dirty
    try a_device_goes_on_while_its_servers_are_killed
    try a_filesystem_goes_on_while_its_servers_are_killed
    try what_no_one_flushed_outlives_the_server
    try a_restart_is_not_seen_by_users
    try a_volume_whose_servers_die_too_often_fails
    try a_volume_ends_in_order_after_a_death
    try the_loss_of_an_ssd_below_a_mirrored_cache_is_survived
}

try_all loop
front=auto
try without_the_driver_ublk_is_refused_and_auto_takes_loop
modprobe ublk_drv
try_all ublk
try a_later_attach_removes_what_a_killed_daemon_and_its_guard_left
front=auto
try with_the_driver_auto_takes_ublk

echo "front ends: $passed passed, $failed failed"
echo "repeat with: WB_VM_ONLY=$only tests/vm/run.sh front-ends; that takes a part of a test's name"
[ $failed = 0 ] && [ $passed != 0 ]
