//! A volume while memory is short: programs that write to it wait for pages that only the daemon
//! can clean.
//!
//! The daemon has a group of its own, as systemd gives each service. In one group with the programs
//! that write, and without the right to mark itself as an I/O flusher (CAP_SYS_RESOURCE), it hangs:
//! its own allocations then wait for their pages.

use std::path::{Path, PathBuf};
use std::process::Command;
use wb_tests::{Filesystem, MIB, Volume, needs_serving, noise, skip, wait_for};

/// For the programs that write, with all their page cache.
const WRITERS: u64 = 64 * MIB;
/// For the daemon.
const DAEMON: u64 = 192 * MIB;
const FILES: u64 = 16;
const FILE_BYTES: u64 = 32 * MIB;

/// A control group with little memory. It goes away with this value.
struct Cgroup {
    dir: PathBuf,
    limit: PathBuf,
}

impl Cgroup {
    /// `None` where none can be made.
    fn with_limit(name: &str, bytes: u64) -> Option<Cgroup> {
        let v1 = (Path::new("/sys/fs/cgroup/memory"), "memory.limit_in_bytes");
        let v2 = (Path::new("/sys/fs/cgroup"), "memory.max");
        let (parent, limit) = if v1.0.exists() { v1 } else { v2 };
        let _ = std::fs::write(parent.join("cgroup.subtree_control"), "+memory");
        let dir = parent.join(name);
        std::fs::create_dir(&dir).ok()?;
        let group = Cgroup { limit: dir.join(limit), dir };
        group.limit(bytes).then_some(group)
    }

    fn limit(&self, bytes: u64) -> bool {
        std::fs::write(&self.limit, bytes.to_string()).is_ok()
    }

    /// A command, but in this group.
    fn command(&self, command: &Command) -> Command {
        let mut inside = Command::new("sh");
        inside.args(["-c", r#"echo $$ > "$0" && exec "$@""#]).arg(self.dir.join("cgroup.procs"));
        inside.arg(command.get_program()).args(command.get_args());
        inside.envs(command.get_envs().filter_map(|(key, value)| Some((key, value?))));
        inside
    }

    fn peak(&self) -> u64 {
        let files = ["memory.max_usage_in_bytes", "memory.peak"];
        let text = files.iter().find_map(|file| std::fs::read_to_string(self.dir.join(file)).ok());
        text.and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Processes that were killed leave it a moment later.
        wait_for(|| std::fs::remove_dir(&self.dir).is_ok());
    }
}

/// How many times to try to copy a file. The kernel may kill `cp` during each attempt.
const KILLED: u32 = 10;

/// Writes far more than the memory of `group` to a folder, and makes it durable.
///
/// In a cgroup of version 1, the kernel does not throttle processes that dirty pages. An allocation
/// for XFS may not wait for pages to be cleaned (GFP_NOFS). If it hits the limit first, the kernel
/// kills the program, whatever is below the filesystem. So such a file is written again once the
/// dirty data is on the volume. The test only checks that no program hangs.
fn write_all(group: &Cgroup, source: &Path, on: &Path) {
    let mut copy = Command::new("sh");
    // Of the shell and cp, the kernel is to choose cp. 137: killed.
    let script = format!(
        "copy() {{ sh -c 'echo 1000 > /proc/$$/oom_score_adj; exec cp \"$0\" \"$1\"' \"$1\" \
         \"$2\"; }}
         for i in $(seq {FILES}); do
             left={KILLED}
             until copy \"$0\" \"$1/$i\"; do
                 [ $? = 137 ] && [ $((left -= 1)) -gt 0 ] || exit 1
                 sync -f \"$1\" || exit 1
             done
         done
         sync -f \"$1\""
    );
    copy.args(["-c", &script]).arg(source).arg(on);
    let mut child = group.command(&copy).spawn().expect("what the test needs");
    let mut status = None;
    wait_for(|| {
        status = child.try_wait().expect("what the test needs");
        status.is_some()
    });
    if status.is_none() {
        // Lets go of what hangs, as far as it can be.
        group.limit(8 * WRITERS);
        let _ = child.kill();
    }
    assert_eq!(status.expect("the programs that write hang").code(), Some(0));
    assert!(group.peak() > WRITERS / 2, "memory was short: {}", group.peak());
}

fn fill(filesystem: Filesystem) {
    let volume = Volume::blank(64, 1024 * MIB);
    let group =
        |what: &str, bytes| Cgroup::with_limit(&format!("wb-{}-{what}", volume.name), bytes);
    let (Some(daemon), Some(writers)) = (group("daemon", DAEMON), group("writers", WRITERS)) else {
        skip!("needs cgroups with a memory limit")
    };
    volume.create(&[]);
    let mut attached = volume.start(daemon.command(&volume.command(&["attach", &volume.name])));
    filesystem.make(&attached.device);
    let on = attached.mount();
    let source = volume.path("source");
    std::fs::write(&source, noise(7, FILE_BYTES)).expect("what the test needs");
    write_all(&writers, &source, &on);
    // Read it from the volume, not from memory.
    attached.unmount();
    let on = attached.mount();
    for i in 1..=FILES {
        let read = std::fs::read(on.join(i.to_string()));
        assert!(read.is_ok_and(|data| data == noise(7, FILE_BYTES)), "file {i}");
    }
    attached.unmount();
    filesystem.check(&attached.device);
    attached.detach(&["--drain"]);
}

#[test]
fn a_program_that_writes_more_than_its_memory_to_ext4_on_a_volume_ends() {
    needs_serving!("mkfs.ext4", "e2fsck");
    fill(Filesystem::Ext4);
}

#[test]
fn a_program_that_writes_more_than_its_memory_to_xfs_on_a_volume_ends() {
    needs_serving!("mkfs.xfs", "xfs_repair");
    fill(Filesystem::Xfs);
}

#[test]
fn the_daemon_is_kept_from_waiting_for_itself_or_says_so() {
    needs_serving!();
    let volume = Volume::created(16, 16 * MIB);
    let attached = volume.attach_with(&[]);
    let process = Path::new("/proc").join(attached.server().to_string());
    let locked = std::fs::read_to_string(process.join("status")).unwrap();
    let locked = locked.lines().any(|line| line.starts_with("VmLck:") && !line.contains(" 0 kB"));
    assert!(
        locked || attached.stderr().contains("memory cannot be locked"),
        "{}",
        attached.stderr()
    );

    // linux/sched.h
    const PF_MEMALLOC_NOIO: u64 = 0x0008_0000;
    let is_flusher = |thread: PathBuf| {
        let stat = std::fs::read_to_string(thread.join("stat")).unwrap_or_default();
        // The name, in parentheses, may hold spaces; six fields after it come the flags.
        let flags = stat
            .rsplit(')')
            .next()
            .and_then(|rest| rest.split_whitespace().nth(6)?.parse::<u64>().ok());
        flags.is_some_and(|flags| flags & PF_MEMALLOC_NOIO != 0)
    };
    let threads =
        std::fs::read_dir(process.join("task")).unwrap().map(|thread| thread.unwrap().path());
    let all = threads.into_iter().all(is_flusher);
    let said = attached.stderr();
    assert_ne!(
        all,
        said.contains("cannot mark the process as an I/O flusher: it lacks CAP_SYS_RESOURCE"),
        "{said}"
    );
}
