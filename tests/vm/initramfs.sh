#!/bin/sh
# Makes the initramfs of a VM: busybox, a shell, programs, and the modules that a plan may load.
# usage: initramfs.sh KERNEL OUT PROGRAM...
set -eu
kernel=$1 out=$2
shift 2
here=$(dirname "$(readlink -f "$0")")
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
mkdir -p "$root/proc" "$root/sys" "$root/dev" "$root/share" "$root/etc"

put() { # FILE DIRECTORY: with the shared libraries it needs
    install -D "$1" "$root$2"
    ldd "$1" 2>/dev/null | grep -o '/[^ ]*' | while read -r library; do
        install -D "$library" "$root$library"
    done
}
put /bin/busybox /bin/busybox
# busybox's own shell would prefer its applets to the programs.
put /bin/sh /bin/sh
for program in "$@"; do put "$(command -v "$program")" "/bin/${program##*/}"; done
install "$here/init" "$root/init"

# This kernel may lack some, or have them built in.
for module in virtio_pci virtio_blk nvme 9pnet_virtio 9p crc32c_generic ext4 xfs fuse loop \
    ublk_drv brd dm-mod dm-writeboost dm-writecache bcache raid1; do
    modprobe --set-version "$kernel" --show-depends "$module" 2>/dev/null || true
done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' | while read -r module; do
    install -D -m 644 "$module" "$root$module"
done
# busybox does not unpack them.
find "$root/lib/modules" -name '*.xz' -exec xz -d {} +
install -m 644 -t "$root/lib/modules/$kernel" "/lib/modules/$kernel"/modules.builtin* \
    "/lib/modules/$kernel/modules.order"
depmod -b "$root" "$kernel"

(cd "$root" && find . | cpio --quiet -o -H newc) > "$out"
