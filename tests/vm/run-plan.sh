#!/bin/sh
# Runs SHARE/plan in a VM, prints what it says as it says it, and exits as it does.
# usage: run-plan.sh SECONDS KERNEL INITRAMFS SHARE [SERIAL=FILE[,OPTION]...]...
set -eu
seconds=$1
shift
share=$3
rm -f "$share/result" "$share/console"
: > "$share/output"
timeout "$seconds" "$(dirname "$0")/boot.sh" "$@" &
qemu=$!
trap 'kill $qemu 2>/dev/null || true' EXIT
tail --pid=$qemu -n +1 -s 0.5 -f "$share/output"
wait $qemu || echo "the VM ended with code $?; see $share/console" >&2
if [ -s "$share/result" ]; then exit "$(cat "$share/result")"; fi
echo "the plan did not end in $seconds seconds; see $share/console" >&2
exit 1
