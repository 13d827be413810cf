#!/bin/sh
# Prints the newest installed kernel that has a module. usage: kernel-with.sh MODULE
set -eu
for kernel in $(cd /lib/modules && printf '%s\n' * | sort -rV); do
    if modinfo --set-version "$kernel" "$1" >/dev/null 2>&1; then
        echo "$kernel"
        exit
    fi
done
echo "no kernel in /lib/modules has the module $1" >&2
exit 1
