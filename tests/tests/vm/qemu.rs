//! A virtual machine with the kernel module. `tests/vm/init` has the shell functions that a plan
//! may call.

use crate::pair::Pair;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a plan may take. Without hardware virtualization everything is slow, the more so beside
/// other work.
const PATIENCE: Duration = Duration::from_secs(1800);
/// The first PCI slot for disks; the lower ones are for what qemu adds by itself.
const FIRST_SLOT: usize = 8;

/// A running machine; killed when this value goes away.
pub(crate) struct Vm {
    qemu: Child,
    share: PathBuf,
    started: Instant,
}

impl Vm {
    /// Boots a machine that sees the disks of some pairs and the folder `share`, and runs a plan.
    pub(crate) fn boot<'a>(
        share: &Path,
        pairs: impl IntoIterator<Item = &'a Pair>,
        plan: &str,
    ) -> Vm {
        for stale in ["progress", "result", "output"] {
            let _ = fs::remove_file(share.join(stale));
        }
        fs::write(share.join("plan"), plan).unwrap();
        let variable = |name| {
            std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: use make test-vm"))
        };
        let kernel = format!("/boot/vmlinuz-{}", variable("WB_VM_KERNEL"));
        let folder = share.display();
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args([
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            "max",
            "-smp",
            "2",
            "-m",
            "2G",
            "-nodefaults",
            "-no-reboot",
        ])
        .args(["-display", "none", "-serial", &format!("file:{folder}/console")])
        .args(["-kernel", &kernel, "-initrd", &variable("WB_VM_INITRAMFS")])
        .args(["-append", "console=ttyS0 panic=-1 quiet mitigations=off"])
        .args(["-virtfs", &format!("local,path={folder},mount_tag=share,security_model=none")]);
        let disks = pairs
            .into_iter()
            .flat_map(|pair| [('c', pair, pair.cache()), ('b', pair, pair.backing())]);
        for (nth, (which, pair, path)) in disks.enumerate() {
            let (slot, function) = (FIRST_SLOT + nth / 8, nth % 8);
            let serial = format!("{}-{which}", pair.name);
            assert!(serial.len() <= 20, "{serial}: too long for the serial number of a disk");
            // What qemu has acknowledged survives its being killed: it is in the host's page cache.
            let drive =
                format!("if=none,id=d{nth},file={},format=raw,cache=unsafe", path.display());
            let device = format!(
                "virtio-blk-pci,drive=d{nth},serial={serial},addr={slot:x}.{function},\
                 multifunction=on"
            );
            qemu.args(["-drive", &drive, "-device", &device]);
        }
        let log = fs::File::create(share.join("qemu")).unwrap();
        let qemu = qemu.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn();
        let qemu = qemu.expect("qemu-system-x86_64, from the package qemu-system-x86");
        Vm { qemu, share: share.into(), started: Instant::now() }
    }

    /// Waits until the plan says `word`.
    pub(crate) fn wait_for(&mut self, word: &str) {
        while !self.file("progress").lines().any(|line| line == word) {
            self.go_on(&format!("saying '{word}'"));
        }
    }

    /// Waits until the plan is done and the machine is off.
    pub(crate) fn wait(mut self) {
        while self.file("result").is_empty() {
            self.go_on("the end of the plan");
        }
        assert_eq!(self.file("result").trim(), "0", "the plan failed: {}", self.what_it_said());
        let _ = self.qemu.wait();
    }

    /// Cuts the power.
    pub(crate) fn cut(mut self) {
        self.qemu.kill().unwrap();
        let _ = self.qemu.wait();
    }

    fn go_on(&mut self, awaited: &str) {
        std::thread::sleep(Duration::from_millis(50));
        let ended = self.qemu.try_wait().unwrap().is_some() && self.file("result").is_empty();
        let failed = !matches!(self.file("result").trim(), "" | "0");
        let late = self.started.elapsed() > PATIENCE;
        let how = if late { "nothing came of" } else { "the machine ended before" };
        assert!(!(ended || failed || late), "{how} {awaited}: {}", self.what_it_said());
    }

    fn what_it_said(&self) -> String {
        let told = ["qemu", "progress", "output", "dmesg"]
            .map(|name| format!("{name}: {}\n", self.file(name)));
        format!("\n{}see {}/console", told.concat(), self.share.display())
    }

    fn file(&self, name: &str) -> String {
        fs::read(self.share.join(name))
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}
