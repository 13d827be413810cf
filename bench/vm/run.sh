#!/bin/sh
# Measures front ends and peers in a VM for each kernel, and prints the figures as tables in
# Markdown. Needs the packages that `make bench-vm` names. usage: run.sh [ROUNDS [virtio|nvme]]
set -eu
cd "$(dirname "$0")/../.."
PATH=$PATH:/usr/sbin:/sbin
rounds=${1:-3}
# The emulator does the CRC instruction bit by bit, and a long copy byte by byte: 20 and 8 us for
# 4 KiB, many times what a processor takes. So the VM has neither, for all targets.
export WB_VM_DISKS="${2:-virtio}" WB_VM_MEMORY=4G WB_VM_CPU="${WB_VM_CPU:-max,-sse4.2,-erms}"
release=${CARGO_TARGET_DIR:-target}/release
vm=$PWD/target/vm
mkdir -p "$vm/bench"
cargo build --release -p wbctl -p wbformat
for program in wbctl wbformat; do strip -o "$vm/bench/$program" "$release/$program"; done

# The null target of ublk, by which wb over ublk is measured. Of a GPL program, not part of wb.
rublk=$(command -v rublk || ls ~/.cargo/bin/rublk 2>/dev/null || true)
[ -n "$rublk" ] || echo "no row 'ublk null': cargo install rublk --version 0.2.15" >&2

for module in ublk_drv dm-writeboost; do
    kernel=$(tests/vm/kernel-with.sh "$module") || continue
    share=$vm/bench/$module
    mkdir -p "$share"
    # shellcheck disable=SC2086 # there may be no rublk
    tests/vm/initramfs.sh "$kernel" "$vm/bench/initramfs" "$vm/bench/wbctl" "$vm/bench/wbformat" \
        fio blockdev dd dmsetup make-bcache $rublk
    # Written once, so that no target pays for the allocation. qemu goes past the page cache.
    for disk in cache:256 backing:1024; do
        dd if=/dev/zero of="$vm/bench/${disk%:*}" bs=1M count="${disk#*:}" conv=fsync status=none
    done
    { echo "rounds=$rounds" && cat bench/vm/plan.sh; } > "$share/plan"
    echo "Linux $kernel; this machine's load is $(cut -d ' ' -f 1 /proc/loadavg)" >&2
    tests/vm/run-plan.sh 1500 "$kernel" "$vm/bench/initramfs" "$share" \
        cache="$vm/bench/cache",cache=none,aio=native \
        backing="$vm/bench/backing",cache=none,aio=native >&2
    echo "Linux $kernel, $WB_VM_DISKS disks, the median of $rounds rounds:"
    echo
    python3 bench/vm/table.py "$share/output"
done
