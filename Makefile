# Everything that developers and newcomers run. `make demo` and `make test` install what they need.

.PHONY: demo test sim soak stress fuzz test-vm test-postgres test-ceph bench bench-nbd bench-pause \
	bench-ceph bench-vm deps tools build install uninstall deb package deny advisories fmt

# How many scenarios of work and crashes `make sim` and `make soak` simulate, and the first seed of
# `make soak`.
SIM_SEEDS = 2000
SEEDS = 20000
FIRST = 0
# How many seconds `make fuzz` runs each target.
SECONDS = 180
# How often `make test-postgres` kills the server.
KILLS = 200
# How many seconds `make stress` runs.
STRESS_SECONDS = 300
# How often `make bench-vm` measures each figure, and on which kind of disk: virtio or nvme, which
# offers FUA.
ROUNDS = 3
DISKS = virtio

# What the build needs (libblkid and the tools to bind to it), and what the tests use on volumes.
PACKAGES = gcc libc6-dev pkg-config libblkid-dev libclang-dev groff-base e2fsprogs xfsprogs fio \
	zstd util-linux udev python3 strace nbdkit libnbd-bin python3-libnbd qemu-utils openssl

# What runs virtual machines: one with the real kernel module, and what builds that, and one with
# a kernel that has ublk. The module does not build for the second kernel, so no headers of it.
VM_PACKAGES = qemu-system-x86 busybox-static cpio kmod xz-utils binutils dmsetup fdisk \
	bcache-tools mdadm dkms linux-image-amd64 linux-headers-amd64 dm-writeboost-dkms \
	linux-image-6.12-amd64

demo: deps
	cargo build --release --workspace --bins
	tests/demo.sh target/release

test: deps sim
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --all-features -- -D warnings
	tests/features.sh
	tests/run.sh

# Tests wb against the real kernel module in a virtual machine, and its front ends from end to end
# in another, which has ublk. Takes some ten minutes.
test-vm: deps
	@tests/install-packages.sh $(VM_PACKAGES)
	tests/vm/run.sh module front-ends

# Uses the build of the tests, so that nothing is built twice.
sim: deps
	cargo build --workspace --all-features --bins
	"$${CARGO_TARGET_DIR:-target}/debug/soak" $(SIM_SEEDS)

soak: deps
	cargo run --release -p wb-tests --bin soak -- $(SEEDS) $(FIRST)

# Changes all settings of a volume under load and kills its server, for minutes. `make test` does so
# for seconds.
stress: deps
	cargo build --workspace --all-features --bins
	WB_STRESS_SECONDS=$(STRESS_SECONDS) \
		cargo test -p wb-tests --all-features --test everyday -- under_load

# PostgreSQL on a volume whose server is killed again and again.
test-postgres: deps
	@tests/install-packages.sh postgresql
	cargo build --workspace --all-features --bins
	tests/postgres.sh $(KILLS)

# PostgreSQL and fio on a volume before an image of a Ceph cluster, parts of which stop and die. The
# cluster's packages are unpacked in a temporary folder. Needs root, and 3 GB of disk.
test-ceph: deps
	@tests/install-packages.sh postgresql
	cargo build --release -p wbctl -p wbformat
	tests/ceph.sh

fuzz: deps
	$(call cargo-tool,fuzz)
	fuzz/run.sh $(SECONDS)

bench: deps
	cargo build --release -p wbcheck
	cargo run --release -p wb-bench -- all

# What NBD costs: serving beside nbdkit's memory, and a drain over a Unix socket beside a file.
bench-nbd: deps
	cargo build --release -p wbctl -p wbformat
	bench/nbd.sh

# How long programs wait when the server of a volume is killed. Needs root, and 8 GB of disk.
bench-pause: deps
	cargo build --release -p wbctl -p wbformat
	bench/pause.sh

# What a flushed write costs on such an image, and on a volume before it. Needs root, and 6 GB of
# disk.
bench-ceph: deps
	cargo build --release -p wbctl -p wbformat
	bench/ceph.sh

# Measures the front ends beside other caches, in a virtual machine for each kernel, and prints the
# tables of docs/benchmarks.md. Takes some ten minutes, on a machine that does nothing else.
bench-vm: deps
	@tests/install-packages.sh $(VM_PACKAGES)
	bench/vm/run.sh $(ROUNDS) $(DISKS)

build: deps
	cargo build --release --workspace --bins
	$(RELEASE)/manual $(RELEASE)/share

# Where `make install` puts files. systemd and udev look only in /usr/lib and /etc.
PREFIX = /usr
SYSTEM = /usr/lib
RELEASE = $${CARGO_TARGET_DIR:-target}/release
PROGRAMS = wbctl wbformat wbcheck wbdump

# Installs the programs, the manual, completions, and files for systemd and udev.
# Run `make build` first.
install:
	@for file in $(PROGRAMS) share/man/man7/wb.7; do test -e "$(RELEASE)/$$file" || { \
		echo "make install: there is no $(RELEASE)/$$file; first: make build" >&2; exit 1; }; done
	install -D -t $(DESTDIR)$(PREFIX)/bin $(addprefix $(RELEASE)/,$(PROGRAMS))
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/man/man5 man/wb.5
	cd $(RELEASE)/share && find . -type f \
		-exec install -D -m 644 {} $(abspath $(DESTDIR)$(PREFIX))/share/{} \;
	install -D -m 644 -t $(DESTDIR)$(SYSTEM)/udev/rules.d dist/udev/60-wb.rules
	install -d $(DESTDIR)$(SYSTEM)/systemd/system
	sed 's|/usr/bin/|$(PREFIX)/bin/|' dist/systemd/wb@.service \
		> $(DESTDIR)$(SYSTEM)/systemd/system/wb@.service
	chmod 644 $(DESTDIR)$(SYSTEM)/systemd/system/wb@.service

# Keeps all volumes and their records.
uninstall:
	rm -f $(addprefix $(DESTDIR)$(PREFIX)/bin/,$(PROGRAMS)) $(DESTDIR)$(PREFIX)/share/man/man5/wb.5 \
		$(addprefix $(DESTDIR)$(PREFIX)/share/man/man8/,$(addsuffix .8,$(PROGRAMS))) \
		$(DESTDIR)$(PREFIX)/share/man/man7/wb.7 \
		$(addprefix $(DESTDIR)$(PREFIX)/share/bash-completion/completions/,$(PROGRAMS)) \
		$(addprefix $(DESTDIR)$(PREFIX)/share/zsh/vendor-completions/_,$(PROGRAMS)) \
		$(addprefix $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/,$(addsuffix .fish,$(PROGRAMS))) \
		$(DESTDIR)$(SYSTEM)/udev/rules.d/60-wb.rules $(DESTDIR)$(SYSTEM)/systemd/system/wb@.service

# Makes a Debian package of the release build, in target/debian.
deb: build
	$(call cargo-tool,deb)
	@tests/install-packages.sh dpkg-dev binutils
	$(MAKE) package

# The package holds what `make install` installs, so there is only one list of files.
package:
	rm -rf $(RELEASE)/package
	$(MAKE) install PREFIX=/usr DESTDIR=$(RELEASE)/package
	strip $(addprefix $(RELEASE)/package/usr/bin/,$(PROGRAMS))
	cargo deb --no-build --offline -p wbctl

# Checks licences and sources of all dependencies against deny.toml.
deny:
	$(call cargo-tool,deny)
	cargo fetch --quiet --locked
	cargo deny --offline check --hide-inclusion-graph bans licenses sources

# Checks all dependencies for known vulnerabilities. Fetches the database of vulnerabilities.
advisories:
	$(call cargo-tool,deny)
	cargo deny check advisories

deps:
	@tests/install-packages.sh $(PACKAGES)

# With these, `make test` skips only what this machine cannot run.
tools: deps
	$(call cargo-tool,deb)
	$(call cargo-tool,fuzz)
	$(call cargo-tool,deny)

# Installs a subcommand of cargo if it is missing.
cargo-tool = cargo $(1) --version >/dev/null 2>&1 || cargo install cargo-$(1) --locked --quiet

fmt:
	cargo fmt --all
