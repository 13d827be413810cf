#!/bin/bash
# Runs all tests, and closes with how many passed, failed and were skipped. Skipped tests are listed
# with the reason.
set -uo pipefail
cd "$(dirname "$0")/.."
mkdir -p target
log=$PWD/target/test.log
export WB_SKIP_LOG=$PWD/target/skipped.log
rm -f "$WB_SKIP_LOG"
cargo test --workspace --all-features --no-fail-fast 2>&1 | tee "$log"
ended=$?

passed=$(grep '^test result' "$log" | grep -Eo '[0-9]+ passed' | awk '{ n += $1 } END { print n + 0 }')
failed=$(grep '^test result' "$log" | grep -Eo '[0-9]+ failed' | awk '{ n += $1 } END { print n + 0 }')
skipped=0
if [ -s "$WB_SKIP_LOG" ]; then
    skipped=$(wc -l < "$WB_SKIP_LOG")
    echo
    cat "$WB_SKIP_LOG"
fi
# A skipped test ended early, and was counted as passed.
passed=$((passed - skipped))
if [ "$passed" -le 0 ]; then echo "no test ran"; exit 1; fi

# Each fuzz target for a moment. It counts as one test.
if ! cargo fuzz --version >/dev/null 2>&1; then
    echo 'SKIPPED fuzz: needs cargo fuzz; `make tools` installs it'
    skipped=$((skipped + 1))
elif fuzz/run.sh 10; then
    passed=$((passed + 1))
else
    failed=$((failed + 1))
    ended=1
fi
echo
echo "$passed passed, $failed failed, $skipped skipped"
exit $ended
