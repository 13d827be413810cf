#!/bin/bash
# run.sh SECONDS [TARGET...] fuzzes each target for that many seconds, and prints a line for each at
# the end. Findings stay in fuzz/artifacts, and new inputs in fuzz/corpus.
set -uo pipefail
cd "$(dirname "$0")/.."
seconds=${1:?"how many seconds for each target?"}
shift
targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=(device recovery control head nbd)

cargo run --quiet -p wb-tests --bin fuzz-seeds -- fuzz/seeds || exit 1
# Uses the same versions of all dependencies as the workspace.
cp Cargo.lock fuzz/Cargo.lock
# The targets reach no unsafe code, so they need no sanitizer. cargo fuzz also passes options of
# nightly compilers, which this makes a stable one accept.
export RUSTC_BOOTSTRAP=1
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}/fuzz
cargo fuzz build --sanitizer none || exit 1

failed=0
summary=
for target in "${targets[@]}"; do
    mkdir -p "fuzz/corpus/$target"
    log=$(mktemp)
    # A damage script is short. A request may exceed the 64 KiB that the daemon reads of it.
    length=4096
    [ "$target" = control ] && length=70000
    cargo fuzz run --sanitizer none "$target" "fuzz/corpus/$target" "fuzz/seeds/$target" -- \
        -max_total_time="$seconds" -max_len=$length -len_control=0 -rss_limit_mb=2048 \
        -timeout=20 -print_final_stats=1 >"$log" 2>&1
    ended=$?
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    coverage=$(grep -Eo 'cov: [0-9]+ ft: [0-9]+' "$log" | tail -1)
    if [ $ended = 0 ]; then
        summary+="fuzzed $target: ${runs:-?} runs, $coverage"$'\n'
    else
        failed=1
        tail -60 "$log"
        summary+="FAILED $target"$'\n'
    fi
    rm -f "$log"
done
printf '\n%s' "$summary"
exit $failed
