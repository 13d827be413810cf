//! Devices go back and forth between us and the real kernel module, which runs in a virtual
//! machine: what one side wrote, the other must read. `make test-vm` runs this; `WB_VM_SEED`
//! chooses other data.
//!
//! There are two boots. In the first, the module writes to new pairs of devices, until the power is
//! cut. Then we read those, go on writing to copies of some, and write to pairs of our own. In the
//! second boot the module reads all of them, goes on writing, and reads again. Last, we read what
//! that left.
#![allow(clippy::unwrap_used)] // all of it is a test, but clippy sees that in test functions alone

mod pair;
mod qemu;

use pair::{End, Pair, Work, difference};
use qemu::Vm;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Pairs that the module makes: name, its options, what it writes, and how it ends. Without an end,
/// the module writes until the power fails.
const MODULES: [(&str, &str, Work, Option<End>); 13] = [
    ("module-fresh", "", Work::Nothing, Some(End::Close)),
    ("module-whole", "", Work::Whole, Some(End::Close)),
    ("module-partial", "", Work::Partial, Some(End::Cut)),
    ("module-flushes", "", Work::FlushHeavy, Some(End::Cut)),
    ("module-wrapped", "", Work::Wrapped, Some(End::Cut)),
    ("module-writeback", "writeback_threshold 100", Work::Wrapped, Some(End::Close)),
    (
        "module-record",
        "writeback_threshold 100 update_sb_record_interval 1",
        Work::Mixed,
        Some(End::Cut),
    ),
    (
        "module-reads",
        "read_cache_threshold 127 nr_read_cache_cells 32",
        Work::Reads,
        Some(End::Cut),
    ),
    ("module-odd-size", "", Work::Partial, Some(End::Close)),
    ("cut-partial", "", Work::Partial, None),
    ("cut-flushes", "", Work::FlushHeavy, None),
    ("cut-wrapped", "", Work::Wrapped, None),
    ("cut-writeback", "writeback_threshold 100", Work::Wrapped, None),
];
/// Copies of pairs of the module to which we write.
const CONTINUED: [(&str, &str, End); 3] = [
    ("module-partial", "after-partial", End::Close),
    ("module-wrapped", "after-wrapped", End::Cut),
    ("module-reads", "after-reads", End::Close),
];
/// Pairs that we make, each with and without the extension.
const OURS: [(&str, Work, End); 15] = [
    ("fresh", Work::Nothing, End::Close),
    ("whole", Work::Whole, End::Close),
    ("partial", Work::Partial, End::Close),
    ("flushes", Work::FlushHeavy, End::Close),
    ("wrapped", Work::Wrapped, End::Close),
    ("drained", Work::Drained, End::Close),
    ("modes", Work::Modes, End::Close),
    ("cut-partial", Work::Partial, End::Cut),
    ("cut-wrapped", Work::Wrapped, End::Cut),
    ("cut-modes", Work::Modes, End::Cut),
    ("cut-aged", Work::Aged, End::Cut),
    ("rep-partial", Work::Partial, End::Repair),
    ("rep-wrapped", Work::Wrapped, End::Repair),
    ("rep-modes", Work::Modes, End::Repair),
    ("rep-aged", Work::Aged, End::Repair),
];

/// The findings.
#[derive(Default)]
struct Findings {
    passed: usize,
    failed: usize,
}

impl Findings {
    fn note(&mut self, name: &str, what: &str, result: Result<(), String>) {
        match result {
            Ok(()) => {
                self.passed += 1;
                println!("ok      {name}: {what}");
            }
            Err(why) => {
                self.failed += 1;
                println!("FAILED  {name}: {what}: {why}");
            }
        }
    }

    /// Checks that we read what the volume must hold.
    fn we_read(&mut self, pair: &Pair, what: &str) {
        self.note(
            &pair.name,
            what,
            pair.read_ours().and_then(|volume| difference(&volume, &pair.volume)),
        );
    }
}

fn seed() -> u64 {
    std::env::var("WB_VM_SEED").map_or(1, |text| text.parse().expect("WB_VM_SEED: a number"))
}

/// An empty folder for the devices. It stays, so that a failure can be examined.
fn folder(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("vm").join(name);
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).unwrap();
    dir
}

#[test]
#[ignore = "needs a virtual machine with the kernel module: make test-vm"]
fn devices_go_back_and_forth_between_the_kernel_module_and_us() {
    let seed = seed();
    println!("repeat with: WB_VM_SEED={seed} make test-vm");
    let (root, share) = (folder("pairs"), folder("share"));
    let mut findings = Findings::default();

    let mut pairs = the_module_writes(&root, &share, seed);
    for pair in pairs.iter().filter(|pair| !pair.interrupted) {
        findings.we_read(pair, "the module wrote, we read");
    }
    let ours = we_write(&root, seed, &pairs);
    for pair in &ours {
        findings.we_read(pair, "we wrote, we read");
    }
    pairs.extend(ours);
    the_module_reads_and_writes(&root, &share, &mut pairs, &mut findings);
    for pair in &pairs {
        findings.we_read(pair, "the module went on writing, we read");
    }

    println!("{} passed, {} failed", findings.passed, findings.failed);
    assert_eq!(
        findings.failed,
        0,
        "repeat with: WB_VM_SEED={seed} make test-vm. The devices are in {}",
        root.display()
    );
}

/// The first boot.
fn the_module_writes(root: &Path, share: &Path, seed: u64) -> Vec<Pair> {
    let (mut plan, mut interrupt) = (String::new(), String::new());
    let mut pairs = Vec::new();
    for (name, options, work, end) in MODULES {
        let mut pair = Pair::new(root, name, seed, name == "module-odd-size");
        let ops = pair.work(work);
        pair.hand_over(&ops, share);
        pair.apply(&ops);
        pair.misleading = options.contains("update_sb_record_interval");
        write!(plan, "attach {name} {options}\nwrite {name}\n").unwrap();
        match end {
            Some(End::Close) => writeln!(plan, "detach {name}").unwrap(),
            Some(End::Cut | End::Repair) => {}
            None => {
                pair.interrupted = true;
                writeln!(interrupt, "while write {name}; do :; done &").unwrap();
            }
        }
        pairs.push(pair);
    }
    write!(plan, "{interrupt}say writing\nsleep 600\n").unwrap();

    let mut vm = Vm::boot(share, &pairs, &plan);
    vm.wait_for("writing");
    std::thread::sleep(Duration::from_millis(fastrand::Rng::with_seed(seed).u64(2000..6000)));
    vm.cut();
    pairs
}

fn we_write(root: &Path, seed: u64, modules: &[Pair]) -> Vec<Pair> {
    let mut pairs = Vec::new();
    for (from, name, end) in CONTINUED {
        let pair = modules.iter().find(|pair| pair.name == from).expect("a pair of the module");
        pairs.push((pair.copy(root, name), Work::Mixed, end));
    }
    for kind in ["ours", "compat"] {
        for (name, work, end) in OURS {
            let pair = Pair::new(root, &format!("{kind}-{name}"), seed, work == Work::Partial);
            pair.format(kind == "ours");
            pairs.push((pair, work, end));
        }
    }
    let write = |(mut pair, work, end): (Pair, Work, End)| {
        let ops = pair.work(work);
        pair.write_ours(&ops, end);
        pair.apply(&ops);
        pair.misleading = end == End::Cut;
        pair
    };
    pairs.into_iter().map(write).collect()
}

/// The second boot.
fn the_module_reads_and_writes(
    root: &Path,
    share: &Path,
    pairs: &mut [Pair],
    findings: &mut Findings,
) {
    let mut plan = String::new();
    let mut before = Vec::new();
    for (nth, pair) in pairs.iter_mut().enumerate() {
        if pair.misleading {
            pair.write_ours(&[], End::Close);
        }
        let ops = pair.work(Work::Mixed);
        pair.hand_over(&ops, share);
        let name = &pair.name;
        let lines = format!(
            "attach {name}\ndump {name} {name}.first\nwrite {name}\ndump {name} {name}.second\n"
        );
        plan.push_str(&lines);
        // The others are cut off.
        if nth % 2 == 0 {
            writeln!(plan, "detach {name}").unwrap();
        }
        before.push((ops, pair.extension(), pair.copy(root, &format!("{name}-before"))));
    }
    Vm::boot(share, pairs.iter(), &plan).wait();

    for (pair, (ops, extension, before)) in pairs.iter_mut().zip(before) {
        let dumped = |which| fs::read(share.join(format!("{}.{which}", pair.name))).unwrap();
        let (first, second) = (dumped("first"), dumped("second"));
        if pair.interrupted {
            let same = before.read_ours().and_then(|ours| difference(&ours, &first));
            findings.note(&pair.name, "the power went, the module and we recover the same", same);
            pair.volume = first;
        } else {
            findings.note(&pair.name, "the module reads", difference(&first, &pair.volume));
        }
        pair.apply(&ops);
        findings.note(
            &pair.name,
            "the module went on writing, it reads",
            difference(&second, &pair.volume),
        );
        if extension.iter().flatten().any(|&byte| byte != 0) {
            let kept =
                if pair.extension() == extension { Ok(()) } else { Err("it was changed".into()) };
            findings.note(&pair.name, "the module left the extension alone", kept);
        }
    }
}
