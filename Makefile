# Everything a developer or a newcomer runs. `make demo` and `make test` install what they need.

.PHONY: demo test sim soak fuzz test-vm bench deps build install fmt

# How many courses of work and crashes `make sim` simulates, and `make soak`; the first seed of the latter.
SIM_SEEDS = 2000
SEEDS = 20000
FIRST = 0
# How long `make fuzz` runs each target.
SECONDS = 180

# What the build needs (libblkid and what binds to it), and what the tests drive the volumes with.
PACKAGES = gcc libc6-dev pkg-config libblkid-dev libclang-dev e2fsprogs xfsprogs fio zstd util-linux

# A virtual machine with the real kernel module, and what builds the module for its kernel.
VM_PACKAGES = qemu-system-x86 busybox-static cpio kmod dmsetup dkms linux-image-amd64 linux-headers-amd64 \
	dm-writeboost-dkms

demo: deps
	cargo build --release --workspace --bins
	tests/demo.sh target/release

test: deps sim
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --all-features -- -D warnings
	tests/run.sh

# Against the real kernel module, in a virtual machine: a few minutes.
test-vm: deps
	@tests/install-packages.sh $(VM_PACKAGES)
	tests/vm/run.sh

# Built as the tests are, so that nothing is built twice.
sim: deps
	cargo build --workspace --all-features --bins
	"$${CARGO_TARGET_DIR:-target}/debug/soak" $(SIM_SEEDS)

soak: deps
	cargo run --release -p wb-tests --bin soak -- $(SEEDS) $(FIRST)

# Needs cargo fuzz: cargo install cargo-fuzz --locked
fuzz: deps
	fuzz/run.sh $(SECONDS)

bench: deps
	cargo build --release -p wbcheck
	cargo run --release -p wb-bench -- all

build: deps
	cargo build --release --workspace --bins

# The programs, the manual, and what systemd and udev need; after `make build`.
install:
	install -D -t $(DESTDIR)/usr/bin $(addprefix $${CARGO_TARGET_DIR:-target}/release/,wbctl wbformat wbcheck wbdump)
	install -D -m 644 -t $(DESTDIR)/usr/share/man/man5 man/wb.5
	install -D -m 644 -t $(DESTDIR)/usr/lib/systemd/system dist/systemd/wb@.service
	install -D -m 644 -t $(DESTDIR)/usr/lib/udev/rules.d dist/udev/60-wb.rules

deps:
	@tests/install-packages.sh $(PACKAGES)

fmt:
	cargo fmt --all
