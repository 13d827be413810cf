#!/bin/bash
# Runs the tests that need a VM: those against the real kernel module, and those of the front ends,
# with the programs that people use. Needs the packages that `make test-vm` names.
# usage: run.sh module|front-ends...
# WB_VM_ONLY is a part of the names of the tests of the front ends to run; WB_VM_KILLS is how many
# servers are killed in each test that kills them; WB_VM_SECONDS is for all.
set -euo pipefail
cd "$(dirname "$0")/../.."
PATH=$PATH:/usr/sbin:/sbin
vm=$PWD/target/vm
mkdir -p "$vm"
cargo build --workspace --bins --all-features

module() {
    local writeboost=dm-writeboost/2.2.17 kernel as_root=
    # The newest kernel that the module is known to build for.
    kernel=${WB_VM_KERNEL:-$(cd /lib/modules && printf '%s\n' 6.1.* | sort -V | tail -n 1)}
    if ! modinfo --set-version "$kernel" dm-writeboost >/dev/null 2>&1; then
        [ "$(id -u)" = 0 ] || as_root=sudo
        $as_root dkms install "$writeboost" -k "$kernel"
    fi
    rustc --edition 2024 -O -C target-feature=+crt-static -o "$vm/volume" tests/vm/volume.rs
    tests/vm/initramfs.sh "$kernel" "$vm/module.cpio" dmsetup "$vm/volume"
    WB_VM_KERNEL=$kernel WB_VM_INITRAMFS=$vm/module.cpio \
        cargo test -p wb-tests --all-features --test vm -- --ignored --nocapture
}

front-ends() {
    local kernel share=$vm/front-ends
    kernel=$(tests/vm/kernel-with.sh ublk_drv)
    mkdir -p "$share"
    for program in wbctl wbcheck wbdump wbformat; do
        strip -o "$vm/$program" "${CARGO_TARGET_DIR:-target}/debug/$program"
    done
    tests/vm/initramfs.sh "$kernel" "$vm/front-ends.cpio" "$vm"/{wbctl,wbcheck,wbdump,wbformat} \
        fio mkfs.ext4 e2fsck mkfs.xfs xfs_repair blkdiscard fstrim blockdev sfdisk dd du cmp \
        truncate mdadm
    truncate -s 64M "$share/cache" "$share/leg-a" "$share/leg-b"
    truncate -s 128M "$share/backing"
    {
        echo "only=${WB_VM_ONLY:-} want_kills=${WB_VM_KILLS:-20}"
        cat tests/vm/front-ends.sh
    } > "$share/plan"
    tests/vm/run-plan.sh "${WB_VM_SECONDS:-1800}" "$kernel" "$vm/front-ends.cpio" "$share" \
        cache="$share/cache" leg-a="$share/leg-a" leg-b="$share/leg-b" \
        backing="$share/backing",discard=unmap
}

for tests in "$@"; do "$tests"; done
