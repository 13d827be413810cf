#!/bin/sh
# Boots a VM that runs the script SHARE/plan; see init. Without hardware virtualization: that hangs
# on some machines. WB_VM_DISKS=nvme makes the disks NVMe, which offers FUA, instead of virtio.
# WB_VM_CPU is another processor for it.
# usage: boot.sh KERNEL INITRAMFS SHARE [SERIAL=FILE[,OPTION]...]...
set -eu
kernel=$1 initramfs=$2 share=$3
shift 3
# The first PCI slot for disks; the lower ones are for what qemu adds by itself.
slot=8 function=0
device=virtio-blk-pci
[ "${WB_VM_DISKS:-virtio}" = virtio ] || device=$WB_VM_DISKS
for disk in "$@"; do
    shift
    serial=${disk%%=*} drive=${disk#*=}
    if [ ${#serial} -gt 20 ]; then
        echo "$serial: too long for the serial number of a disk" >&2
        exit 1
    fi
    # What qemu has acknowledged survives its being killed: it is in the host's page cache.
    case $drive in *,cache=*) ;; *) drive=$drive,cache=unsafe ;; esac
    id=d$slot$function address=$(printf %x "$slot").$function
    set -- "$@" -drive "if=none,id=$id,format=raw,file=$drive" \
        -device "$device,drive=$id,serial=$serial,addr=$address,multifunction=on"
    function=$((function + 1))
    [ $function -lt 8 ] || { function=0 slot=$((slot + 1)); }
done
exec qemu-system-x86_64 -accel tcg,thread=multi -cpu "${WB_VM_CPU:-max}" \
    -smp 2 -m "${WB_VM_MEMORY:-2G}" \
    -nodefaults -no-reboot -display none -serial "file:$share/console" \
    -kernel "/boot/vmlinuz-$kernel" -initrd "$initramfs" \
    -append "console=ttyS0 panic=-1 quiet mitigations=off" \
    -virtfs "local,path=$share,mount_tag=share,security_model=none" "$@"
