# Everything a developer or a newcomer runs. `make demo` and `make test` install what they need.

.PHONY: demo test bench deps build fmt

# What the build needs (libblkid and what binds to it), and what the tests drive the volumes with.
PACKAGES = gcc libc6-dev pkg-config libblkid-dev libclang-dev e2fsprogs xfsprogs fio zstd util-linux

demo: deps
	cargo build --release --workspace --bins
	tests/demo.sh target/release

test: deps
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --all-features -- -D warnings
	tests/run.sh

bench: deps
	cargo run --release -p wb-bench -- all

build: deps
	cargo build --release --workspace --bins

deps:
	@tests/install-packages.sh $(PACKAGES)

fmt:
	cargo fmt --all
