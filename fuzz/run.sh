#!/bin/bash
# run.sh SECONDS [TARGET...] fuzzes each target for so long, and closes with a line for each. What
# it finds stays in fuzz/artifacts, and what it learns in fuzz/corpus.
set -uo pipefail
cd "$(dirname "$0")/.."
seconds=${1:?"how many seconds for each target?"}
shift
targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=(device recovery control)

cargo run --quiet -p wb-tests --bin fuzz-seeds -- fuzz/seeds || exit 1
# The same versions of everything as in the workspace.
cp Cargo.lock fuzz/Cargo.lock
# Nothing unsafe is in reach of the targets, so that no sanitizer is needed. What cargo fuzz asks of
# the compiler besides is for nightly ones, which a stable one is told to allow.
export RUSTC_BOOTSTRAP=1
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}/fuzz
cargo fuzz build --sanitizer none || exit 1

failed=0
summary=
for target in "${targets[@]}"; do
    mkdir -p "fuzz/corpus/$target"
    log=$(mktemp)
    # A script is short; a request may be a little longer than the 64 KiB that are read of it.
    length=4096
    [ "$target" = control ] && length=70000
    cargo fuzz run --sanitizer none "$target" "fuzz/corpus/$target" "fuzz/seeds/$target" -- -max_total_time="$seconds" \
        -max_len=$length -len_control=0 -rss_limit_mb=2048 -timeout=20 -print_final_stats=1 >"$log" 2>&1
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
