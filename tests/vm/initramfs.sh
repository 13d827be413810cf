#!/bin/sh
# Makes the initramfs of the VM: busybox, dmsetup, the program of volume.rs, and the modules for
# virtio disks, the share, and dm-writeboost. usage: initramfs.sh KERNEL VOLUME OUT
set -eu
kernel=$1 volume=$2 out=$3
here=$(dirname "$(readlink -f "$0")")
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
mkdir "$root/bin" "$root/proc" "$root/sys" "$root/dev" "$root/share"

put() { # FILE DIRECTORY: with the shared libraries it needs
    install -D "$1" "$root$2"
    ldd "$1" 2>/dev/null | grep -o '/[^ ]*' | while read -r library; do
        install -D "$library" "$root$library"
    done
}
put /bin/busybox /bin/busybox
put "$(command -v dmsetup)" /bin/dmsetup
install "$volume" "$root/bin/volume"
install "$here/init" "$root/init"

# Lists modules in the order of loading. What is built into the kernel needs no loading.
for module in virtio_pci virtio_blk 9pnet_virtio 9p crc32c_generic dm-writeboost; do
    modprobe --set-version "$kernel" --show-depends "$module"
done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' > "$root/modules"
while read -r module; do install -D -m 644 "$module" "$root$module"; done < "$root/modules"

(cd "$root" && find . | cpio --quiet -o -H newc) > "$out"
