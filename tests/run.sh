#!/bin/bash
# Runs all tests, and prints at the end how many passed, failed and were skipped. Lists skipped
# tests with the reason.
set -uo pipefail
cd "$(dirname "$0")/.."
mkdir -p target
log=$PWD/target/test.log
export WB_SKIP_LOG=$PWD/target/skipped.log
rm -f "$WB_SKIP_LOG"
cargo test --workspace --all-features --no-fail-fast 2>&1 | tee "$log"
ended=$?

# count WORD: how many tests have this result
count() {
    grep '^test result' "$log" | grep -Eo "[0-9]+ $1" | awk '{ n += $1 } END { print n + 0 }'
}
passed=$(count passed)
failed=$(count failed)
skipped=0
if [ -s "$WB_SKIP_LOG" ]; then
    skipped=$(wc -l < "$WB_SKIP_LOG")
    echo
    cat "$WB_SKIP_LOG"
fi
# A skipped test ends early and counts as passed.
passed=$((passed - skipped))
if [ "$passed" -le 0 ]; then echo "no test ran"; exit 1; fi

# Fuzzes each target for a moment. This counts as one test.
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
