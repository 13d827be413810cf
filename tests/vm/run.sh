#!/bin/bash
# Runs the tests against the real kernel module. Needs the packages that `make test-vm` names.
# usage: run.sh module
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

for tests in "$@"; do "$tests"; done
