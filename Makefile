# Everything a developer or a newcomer runs. `make demo` and `make test` install what they need.

.PHONY: demo test test-vm bench deps build fmt

# What the build needs (libblkid and what binds to it), and what the tests drive the volumes with.
PACKAGES = gcc libc6-dev pkg-config libblkid-dev libclang-dev e2fsprogs xfsprogs fio zstd util-linux

# A virtual machine with the real kernel module, and what builds the module for its kernel.
VM_PACKAGES = qemu-system-x86 busybox-static cpio kmod dmsetup dkms linux-image-amd64 linux-headers-amd64 \
	dm-writeboost-dkms

demo: deps
	cargo build --release --workspace --bins
	tests/demo.sh target/release

test: deps
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --all-features -- -D warnings
	tests/run.sh

# Against the real kernel module, in a virtual machine: a few minutes.
test-vm: deps
	@tests/install-packages.sh $(VM_PACKAGES)
	tests/vm/run.sh

bench: deps
	cargo run --release -p wb-bench -- all

build: deps
	cargo build --release --workspace --bins

deps:
	@tests/install-packages.sh $(PACKAGES)

fmt:
	cargo fmt --all
