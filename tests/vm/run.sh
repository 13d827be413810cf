#!/bin/sh
# Runs the tests against the real kernel module. Needs the packages that `make test-vm` names.
set -eu
cd "$(dirname "$0")/../.."
PATH=$PATH:/usr/sbin:/sbin
module=dm-writeboost/2.2.17

# The newest kernel that the module is known to build for.
kernel=${WB_VM_KERNEL:-$(cd /lib/modules && printf '%s\n' 6.1.* | sort -V | tail -n 1)}
if ! modinfo --set-version "$kernel" dm-writeboost >/dev/null 2>&1; then
    as_root=
    [ "$(id -u)" = 0 ] || as_root=sudo
    $as_root dkms install "$module" -k "$kernel"
fi

mkdir -p target/vm
export WB_VM_KERNEL="$kernel" WB_VM_INITRAMFS="$PWD/target/vm/initramfs"
rustc --edition 2024 -O -C target-feature=+crt-static -o target/vm/volume tests/vm/volume.rs
tests/vm/initramfs.sh "$kernel" target/vm/volume "$WB_VM_INITRAMFS"
cargo build --workspace --bins --all-features
cargo test -p wb-tests --all-features --test vm -- --ignored --nocapture
