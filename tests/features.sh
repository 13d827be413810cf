#!/bin/bash
# Builds libwb with each of its features alone, and its documentation, without a warning.
set -euo pipefail
cd "$(dirname "$0")/.."
for feature in "" log engine uring socket control serve-loop serve-ublk cli blkid sim; do
    echo "libwb with only: ${feature:-the format}"
    cargo clippy --quiet -p libwb --lib --no-default-features --features "$feature" -- -D warnings
done
RUSTDOCFLAGS="-D warnings" cargo doc --quiet --workspace --all-features --no-deps
