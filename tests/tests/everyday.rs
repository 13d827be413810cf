//! What a volume is used for, with everything that an administrator may do to it underneath.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use wb_tests::{
    Attached, Filesystem, MIB, Volume, how_to_repeat, needs_serving, sha256, sha256_direct, skip,
    succeeds, system,
};

/// How long the stress goes on, in seconds, where `WB_STRESS_SECONDS` does not say.
const STRESS_SECONDS: u64 = 15;

/// The SHA-256 of each file below a folder, as `sha256sum` prints it.
fn sums(dir: &Path) -> String {
    let script = "cd \"$0\" && find . -type f -print0 | sort -z | xargs -0 sha256sum";
    succeeds(Command::new("sh").args(["-c", script]).arg(dir))
}

#[test]
fn a_source_tree_compiles_on_the_volume() {
    needs_serving!("mkfs.ext4", "e2fsck", "cargo", "git");
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    if system("git", &["-C", sources.to_str().expect("UTF-8"), "ls-files"]).is_none() {
        skip!("needs a git checkout");
    }
    // The cache holds a tenth of what the compiler writes.
    let volume = Volume::created(64, 2048 * MIB);
    let mut attached = volume.attach_with(&[]);
    Filesystem::Ext4.make(&attached.device);
    let on = attached.mount();
    let copy = "cd \"$0\" && git ls-files -z | xargs -0 cp --parents -t \"$1\"";
    let (tree, built) = (on.join("tree"), on.join("built"));
    std::fs::create_dir(&tree).expect("a new folder");
    succeeds(Command::new("sh").args(["-c", copy]).arg(sources).arg(&tree));
    let mut cargo = Command::new("cargo");
    cargo.args(["build", "--offline", "--package", "wbdump"]).current_dir(&tree);
    cargo.env("CARGO_TARGET_DIR", &built).env("CARGO_INCREMENTAL", "0");
    succeeds(&mut cargo);
    succeeds(Command::new(built.join("debug/wbdump")).arg("--version"));
    let before = sums(&on);
    attached.unmount();
    attached.detach(&["--drain"]);
    Filesystem::Ext4.check(&volume.backing);
    let after = Filesystem::Ext4.with_image(&volume.backing, sums);
    assert!(before == after, "the files differ; {}", how_to_repeat());
}

/// fio on a part of a device, which writes, reads what it wrote, and begins again.
struct Fio(Child);

impl Fio {
    fn start(device: &str, seconds: u64, job: &[&str]) -> Fio {
        let mut fio = Command::new("fio");
        fio.args([
            "--ioengine=libaio",
            "--direct=1",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--randrepeat=0",
        ]);
        fio.args(["--verify_state_save=0", "--time_based=1", "--group_reporting=1"]);
        fio.arg(format!("--runtime={seconds}")).arg(format!("--filename={device}")).args(job);
        Fio(fio.stdout(Stdio::null()).spawn().expect("fio"))
    }

    fn runs(&mut self) -> bool {
        self.0.try_wait().expect("a child").is_none()
    }
}

impl Drop for Fio {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What is done to the volume under load, over and over. The daemon may refuse a discard, never the
/// others.
fn meddle(volume: &Volume, attached: &Attached<'_>, nth: usize) {
    let name = volume.name.as_str();
    let steps: &[&[&str]] = &[
        &["set", name, "nr_max_batched_writeback=1"],
        &["flush", name],
        &["set", name, "writeback_threshold=0", "read_cache_threshold=127"],
        &["drain", name],
        &["set", name, "nr_max_batched_writeback=1024", "writeback_threshold=100"],
        &["set", name, "write_mode=around"],
        &["set", name, "write_mode=through", "nr_read_cache_cells=64"],
        &["drain", name],
        &["set", name, "write_mode=back", "read_cache_threshold=0"],
        &["set", name, "writeback_order=strict"],
        &["drain", name],
        &["set", name, "sync_data_interval=1"],
        &["set", name, "writeback_order=sorted", "sync_data_interval=0"],
        &["stat", name],
        &["set", name, "nr_max_batched_writeback=32", "writeback_threshold=70"],
        &["status", name, "--json"],
    ];
    volume.must(steps[nth % steps.len()]);
    // No other client uses the last quarter.
    let offset = (192 + nth as u64 % 60) * MIB + 4096 * (nth as u64 % 7);
    let range =
        ["--offset", &offset.to_string(), "--length", &(MIB + 512).to_string()].map(String::from);
    let zero = if nth.is_multiple_of(2) { &["--zeroout"][..] } else { &[] };
    let _ = Command::new("blkdiscard").args(zero).args(range).arg(&attached.device).output();
}

#[test]
fn a_volume_under_load_stands_drains_discards_and_new_tunables() {
    needs_serving!("fio", "blkdiscard");
    let seconds = std::env::var("WB_STRESS_SECONDS")
        .map_or(STRESS_SECONDS, |text| text.parse().expect("seconds"));
    let volume = Volume::created(40, 256 * MIB);
    let attached = volume.attach_undying();
    let outlives = volume.status()["live"]["outlives_server"] == true;
    let device = attached.device_str();
    let wide =
        ["--name=wide", "--rw=randwrite", "--bsrange=512-256k", "--blockalign=512", "--iodepth=16"];
    let wide = [&wide[..], &["--offset=0", "--size=96m", "--fsync=100"]].concat();
    let narrow =
        ["--name=narrow", "--rw=randwrite", "--bs=4k", "--iodepth=8", "--offset=96m", "--size=96m"];
    let mut jobs = [Fio::start(device, seconds, &wide), Fio::start(device, seconds, &narrow)];
    let mut nth = 0;
    while jobs.iter_mut().any(Fio::runs) {
        meddle(&volume, &attached, nth);
        nth += 1;
        if outlives && nth.is_multiple_of(5) {
            attached.kill_server();
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    for job in &mut jobs {
        let status = job.0.wait().expect("a child");
        assert!(status.success(), "fio: {status}\n{}", attached.stderr());
    }
    println!("{nth} changes, a server killed after each fifth");
    let live = volume.status()["live"].clone();
    assert!(live["failure"].is_null() && live["writeback_error"].is_null(), "{live}");
    let content = sha256_direct(&attached.device);
    attached.detach(&["--drain"]);
    assert_eq!(content, sha256(&volume.backing), "{}", how_to_repeat());
}
