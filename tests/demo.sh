#!/bin/bash
# Shows a write cache in front of a "disk", crashes it during writes, and checks that every file is
# whole afterwards. usage: demo.sh FOLDER_OF_PROGRAMS
set -euo pipefail
bin=$(cd "$1" && pwd)
if [ "$(id -u)" != 0 ]; then exec sudo "$0" "$bin"; fi

dir=$(mktemp -d /var/tmp/wb-demo.XXXXXX)
export WB_CONFIG_DIR=$dir/etc WB_RUN_DIR=$dir/run WB_STATE_DIR=$dir/state
name=demo-$$ disk=$dir/disk.img ssd=$dir/ssd.img mnt=$dir/mnt
daemon= writer=

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
show() { printf '  $ %s\n' "$*"; "$@" 2>&1 | sed 's/^/    /'; }
end() {
    status=$?
    [ -z "$writer" ] || kill "$writer" 2>/dev/null || true
    ! mountpoint -q "$mnt" || umount -l "$mnt" || true
    [ -z "$daemon" ] || kill "$daemon" 2>/dev/null || true
    wait
    if [ $status != 0 ]; then
        echo "the demo failed; the daemon said:"
        cat "$dir/daemon.log" || true
    fi
    rm -rf "$dir"
    exit $status
}
trap end EXIT

attach() {
    printf '  $ wbctl attach %s &\n' "$name"
    # The line of an earlier daemon would pass for this one's.
    rm -f "$dir/ready"
    "$bin/wbctl" attach "$name" > "$dir/ready" 2>> "$dir/daemon.log" &
    daemon=$!
    for _ in $(seq 300); do
        device=$(sed -n 's/^ready //p' "$dir/ready" 2>/dev/null || true)
        [ -z "$device" ] || break
        kill -0 $daemon 2>/dev/null || return 1
        sleep 0.1
    done
    [ -n "$device" ]
    echo "    ready $device"
}
files() { (cd "$1" && find . -type f -print0 | sort -z | xargs -0 sha256sum); }
# Checks the copies in a folder against the checksums taken when they were synced.
verify() {
    (cd "$1" && sha256sum --quiet -c "$dir/checksums") &&
        echo "    all $(wc -l < "$dir/checksums") files are whole"
}

PATH=$bin:$PATH
say "1. A disk of 2 GiB, an SSD of 128 MiB in front of it (two files in $dir)"
truncate -s 2G "$disk"
truncate -s 128M "$ssd"
show wbctl create "$name" --cache "$ssd" --backing "$disk"
attach

say "2. A filesystem on the cached volume, and real files on it, more than the SSD holds"
show mkfs.ext4 -q "$device"
mkdir "$mnt"
show mount "$device" "$mnt"
mkdir "$mnt/files" "$mnt/more"
# 200 MiB of files, none of them larger than 20 MiB.
find /usr/bin /usr/share /usr/include -xdev -type f -size -20M ! -name $'*\n*' \
    -printf '%s %p\n' 2>/dev/null |
    awk '(bytes += $1) <= 200 * 1048576 { sub(/^[0-9]+ /, ""); print }' |
    tr '\n' '\0' | xargs -0 cp --parents -t "$mnt/files" || true
sync -f "$mnt"
show wbctl list
files "$mnt/files" > "$dir/checksums"
echo "    copied $(wc -l < "$dir/checksums") files, $(du -sh "$mnt/files" | cut -f1); all synced"

say "3. SIGKILL ends the daemon during writes, while the disk still lacks some of the data"
show wbctl pause "$name"
(while true; do
    cp -r "$mnt"/files/usr/bin/[a-d]* "$mnt/more" && sync -f "$mnt" || exit
done) >/dev/null 2>&1 &
writer=$!
for _ in $(seq 300); do
    dirty=$(wbctl status "$name" --json | sed -n 's/.*"dirty_bytes":\([0-9]*\).*/\1/p')
    [ "$dirty" -lt 10000000 ] || break
    sleep 0.1
done
echo "  \$ kill -9 $daemon"
kill -9 $daemon
wait $daemon 2>/dev/null || true
daemon=
wait $writer 2>/dev/null || true
writer=
umount "$mnt" 2>/dev/null || umount -l "$mnt"

say "4. What is on the SSD?"
show wbcheck "$ssd" --backing "$disk"

say "5. Attach again: wb recovers the log, and every synced file must be there"
attach
show mount "$device" "$mnt"
verify "$mnt/files"
umount "$mnt"

say "6. Write everything back and detach: now the disk alone holds the filesystem"
show wbctl detach "$name" --drain
wait $daemon
daemon=
mount -o loop,ro "$disk" "$mnt"
verify "$mnt/files"
umount "$mnt"
say "Done. Nothing that was synced was lost."
