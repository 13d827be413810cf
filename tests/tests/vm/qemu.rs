//! A virtual machine with the kernel module.

use crate::pair::Pair;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a plan may take. Without hardware virtualization everything is slow, the more so beside
/// other work.
const PATIENCE: Duration = Duration::from_secs(1800);
/// The shell functions that a plan may call.
const FUNCTIONS: &str = include_str!("../../vm/module.sh");

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
        fs::write(share.join("plan"), [FUNCTIONS, plan].concat()).unwrap();
        let variable = |name| {
            std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: use make test-vm"))
        };
        let disks = pairs.into_iter().flat_map(|pair| {
            [('c', pair.cache()), ('b', pair.backing())]
                .map(|(which, path)| format!("{}-{which}={}", pair.name, path.display()))
        });
        let boot = Path::new(env!("CARGO_MANIFEST_DIR")).join("vm/boot.sh");
        let mut qemu = Command::new(boot);
        qemu.args([variable("WB_VM_KERNEL"), variable("WB_VM_INITRAMFS")]).arg(share).args(disks);
        let log = fs::File::create(share.join("qemu")).unwrap();
        let qemu = qemu.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn();
        let qemu = qemu.expect("boot.sh");
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
        let told =
            ["qemu", "progress", "output"].map(|name| format!("{name}: {}\n", self.file(name)));
        format!("\n{}see {}/console and dmesg", told.concat(), self.share.display())
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
