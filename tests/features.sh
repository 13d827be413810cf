#!/bin/bash
# Builds libwb with each of its features alone, and its documentation, without a warning.
set -euo pipefail
cd "$(dirname "$0")/.."
features="log engine uring socket nbd nbd-client control serve-loop serve-ublk serve-nbd cli blkid"
for feature in "" $features sim; do
    echo "libwb with only: ${feature:-the format}"
    cargo clippy --quiet -p libwb --lib --no-default-features --features "$feature" -- -D warnings
done
RUSTDOCFLAGS="-D warnings" cargo doc --quiet --workspace --all-features --no-deps
