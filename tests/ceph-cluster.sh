# shellcheck shell=bash
# To be sourced, with $work set to an empty folder: a Ceph cluster of one monitor and one OSD on
# loopback, all of it in $work, and qemu-nbd in front of its RBD images. Its programs come from
# Debian's packages, which are unpacked there and not installed.

ceph_root=$work/ceph/root
ceph_conf=$work/ceph/ceph.conf
ceph_libraries=$ceph_root/usr/lib/$(uname -m)-linux-gnu
ceph_mon='' ceph_osd='' exporter=''

# in_ceph PROGRAM ARGUMENT...: becomes one of the unpacked programs; call it in a subshell
in_ceph() {
    local program=$1
    shift
    export LD_LIBRARY_PATH=$ceph_libraries:$ceph_libraries/ceph:$ceph_root/lib/${ceph_libraries##*/}
    export PYTHONPATH=$ceph_root/usr/lib/python3/dist-packages CEPH_CONF=$ceph_conf
    exec "$ceph_root/usr/bin/$program" "$@"
}

rbd() { (in_ceph rbd "$@"); }
ceph() { (in_ceph ceph --connect-timeout 20 "$@") 2>>"$work/log.ceph"; }

# wait_until SECONDS COMMAND...: until the command succeeds
wait_until() {
    local left=$(($1 * 10))
    shift
    until "$@"; do
        left=$((left - 1))
        [ $left -gt 0 ] || { echo "in vain: $*" >&2; return 1; }
        sleep 0.1
    done
}

# end PID: kills a child of this shell, even if it is stopped, and waits for it
end() {
    kill -KILL "$1" 2>/dev/null || true
    wait "$1" 2>/dev/null || true
}

# Dependencies that this machine has are not downloaded; of the named packages, all are.
download_ceph() {
    apt-get install --download-only --reinstall --no-install-recommends -yqq \
        -o Dir::Cache::archives="$1" ceph-mon ceph-osd ceph-common librbd1 \
        qemu-utils qemu-block-extra >>"$work/log.apt" 2>&1
}

unpack_ceph() {
    local debs=$work/ceph/debs deb
    mkdir -p "$debs/partial" "$ceph_root"
    download_ceph "$debs" || { apt-get update -qq && download_ceph "$debs"; }
    for deb in "$debs"/*.deb; do
        dpkg-deb -x "$deb" "$ceph_root"
    done
    rm -r "$debs"
}

# unused_port: nothing listens on it at this moment
unused_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0))
print(s.getsockname()[1])'
}

write_ceph_conf() {
    local folder=$work/ceph
    cat >"$ceph_conf" <<END
[global]
fsid = $1
mon host = v2:127.0.0.1:$2
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
run dir = $folder/run
admin socket = $folder/run/\$name.\$pid
log file = $work/log.\$name
pid file =
mon cluster log file = $work/log.cluster
plugin dir = $ceph_libraries/ceph
erasure code dir = $ceph_libraries/ceph/erasure-code
osd class dir = $ceph_libraries/rados-classes
mon data = $folder/mon
mon data avail crit = 1
mon allow pool size one = true
osd data = $folder/osd
osd objectstore = bluestore
osd memory target = 939524096
osd pool default size = 1
osd pool default min size = 1
osd crush chooseleaf type = 0
bluestore block size = 6442450944
END
}

start_osd() {
    (in_ceph ceph-osd -f -i 0) >>"$work/log.osd" 2>&1 &
    ceph_osd=$!
}

osd_is_up() { ceph osd stat | grep -q '1 up'; }

start_cluster() {
    local folder=$work/ceph fsid port
    fsid=$(cat /proc/sys/kernel/random/uuid)
    port=$(unused_port)
    mkdir -p "$folder/run" "$folder/mon" "$folder/osd"
    write_ceph_conf "$fsid" "$port"
    (in_ceph monmaptool --create --fsid "$fsid" --addv a "[v2:127.0.0.1:$port]" \
        "$folder/map") >>"$work/log.ceph"
    (in_ceph ceph-mon --mkfs -i a --monmap "$folder/map")
    (in_ceph ceph-mon -f -i a) >>"$work/log.mon" 2>&1 &
    ceph_mon=$!
    [ "$(ceph osd create)" = 0 ]
    (in_ceph ceph-osd --mkfs -i 0) >>"$work/log.osd" 2>&1
    start_osd
    wait_until 60 osd_is_up
    ceph osd pool create rbd 8
    rbd pool init rbd
}

# What it holds is gone with $work, so nothing is closed.
end_cluster() {
    local pid
    for pid in $exporter $ceph_osd $ceph_mon; do
        end "$pid"
    done
}

# start_exporter IMAGE SOCKET [CACHE]: serves the image to up to 8 clients. With the cache
# writeback, librbd holds writes until a flush, and loses them if qemu-nbd is killed; none has no
# such cache.
start_exporter() {
    rm -f "$2"
    (in_ceph qemu-nbd --persistent --shared=8 --format=raw --cache="${3:-writeback}" \
        --discard=unmap --socket="$2" "rbd:rbd/$1:conf=$ceph_conf") >>"$work/log.qemu-nbd" 2>&1 &
    exporter=$!
    wait_until 60 test -S "$2"
}
