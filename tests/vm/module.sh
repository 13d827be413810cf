# What plans for the real kernel module may call. A volume NAME stands on the disks NAME-c and
# NAME-b.
modprobe dm-writeboost

# attach NAME [KEY VALUE]...
attach() {
    name=$1
    shift
    sectors=$(blockdev --getsz "/disk/$name-b")
    dmsetup create "$name" --table "0 $sectors writeboost /disk/$name-b /disk/$name-c $# $*"
    dmsetup mknodes "$name"
}

# write NAME: does what /share/NAME.ops says, with the data in /share/NAME.data
write() {
    volume write "/dev/mapper/$1" "$1"
}

# dump NAME FILE: copies the volume to a file in the share
dump() {
    volume dump "/dev/mapper/$1" "$2"
}

detach() {
    dmsetup remove "$1"
}

say() {
    echo "$*" >> /share/progress
}
