//! Who may access a volume's files, whose files wb trusts, and how it works with limited rights.

use std::fs::{Metadata, Permissions, set_permissions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown, lchown, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use wb_tests::{MIB, NOBODY, Outcome, Volume, after, as_nobody, needs_serving, skip, wait_for};

fn mode(path: &Path) -> u32 {
    std::fs::symlink_metadata(path).expect("what wb made").permissions().mode() & 0o7777
}

/// Says `why` in one line, and does nothing.
fn is_refused(outcome: &Outcome, says: &[&str]) {
    assert_eq!((outcome.code, outcome.stdout.as_str()), (1, ""), "{outcome:?}");
    for part in says {
        assert!(
            outcome.stderr.lines().last().is_some_and(|line| line.contains(part)),
            "{part:?}: {outcome:?}"
        );
    }
}

#[test]
fn no_umask_opens_a_volumes_files_to_others() {
    needs_serving!();
    let volume = Volume::blank(4, 8 * MIB);
    let create = volume.command(&[&["create", &volume.name], &volume.pair()[..]].concat());
    assert_eq!(Outcome::of(after("umask 0", &create)).code, 0);
    let attached = volume.start(after("umask 0", &volume.command(&["attach", &volume.name])));
    let run = volume.socket().with_file_name("");
    assert_eq!((mode(&volume.record()), mode(&volume.path("config"))), (0o644, 0o755));
    assert_eq!((mode(&run), mode(&volume.path("run")) & 0o022), (0o700, 0));
    assert_eq!((mode(&volume.socket()), mode(&run.join("lock"))), (0o600, 0o600));
    assert_eq!(mode(Path::new("/dev/wb")) & 0o022, 0);
    let notes: Vec<_> = std::fs::read_dir(volume.path("state")).unwrap().flatten().collect();
    assert_eq!(notes.len(), 1, "{notes:?}");
    assert_eq!((mode(&notes[0].path()), mode(&volume.path("state")) & 0o022), (0o600, 0));
    attached.detach(&[]);
}

#[test]
fn a_record_that_another_user_could_have_written_is_not_believed() {
    if !nix::unistd::geteuid().is_root() {
        skip!("needs root");
    }
    let volume = Volume::created(4, 8 * MIB);
    let record = volume.record();
    let attach = || volume.wbctl(&["attach", &volume.name]);
    chown(&record, Some(NOBODY), None).unwrap();
    is_refused(&attach(), &[record.to_str().unwrap(), "it belongs to user 65534", "chown root"]);
    chown(&record, Some(0), None).unwrap();
    for bad in [0o666, 0o664] {
        set_permissions(&record, Permissions::from_mode(bad)).unwrap();
        is_refused(&attach(), &[record.to_str().unwrap(), "others may change it", "chmod go-w"]);
    }
    set_permissions(&record, Permissions::from_mode(0o644)).unwrap();
    let elsewhere = volume.path("elsewhere.toml");
    std::fs::rename(&record, &elsewhere).unwrap();
    symlink(&elsewhere, &record).unwrap();
    is_refused(&attach(), &[record.to_str().unwrap(), "it is a symbolic link"]);
    std::fs::remove_file(&record).unwrap();
    nix::unistd::mkfifo(&record, nix::sys::stat::Mode::S_IRUSR).unwrap();
    is_refused(&attach(), &[record.to_str().unwrap(), "it is not a regular file"]);
}

#[test]
fn a_run_folder_or_a_lock_of_another_user_is_not_used() {
    needs_serving!();
    let volume = Volume::created(4, 8 * MIB);
    let attach = || volume.wbctl(&["attach", &volume.name]);
    let run = volume.socket().parent().unwrap().to_path_buf();
    let lock = run.join("lock");
    std::fs::create_dir_all(&run).unwrap();

    chown(&run, Some(NOBODY), None).unwrap();
    is_refused(&attach(), &[run.to_str().unwrap(), "it belongs to user 65534"]);
    chown(&run, Some(0), None).unwrap();
    set_permissions(&run, Permissions::from_mode(0o777)).unwrap();
    is_refused(&attach(), &[run.to_str().unwrap(), "others may change it"]);
    set_permissions(&run, Permissions::from_mode(0o700)).unwrap();

    std::fs::write(&lock, "").unwrap();
    chown(&lock, Some(NOBODY), None).unwrap();
    is_refused(&attach(), &[lock.to_str().unwrap(), "it belongs to user 65534"]);
    std::fs::remove_file(&lock).unwrap();
    let target = volume.path("target");
    symlink(&target, &lock).unwrap();
    is_refused(&attach(), &[lock.to_str().unwrap(), "it is a symbolic link"]);
    assert!(!target.exists(), "nothing is made through the link");
    std::fs::remove_file(&lock).unwrap();

    let elsewhere = volume.path("elsewhere");
    std::fs::rename(&run, &elsewhere).unwrap();
    symlink(&elsewhere, &run).unwrap();
    lchown(&run, Some(NOBODY), None).unwrap();
    is_refused(&attach(), &[run.to_str().unwrap(), "it is not a folder"]);
    std::fs::remove_file(&run).unwrap();
    volume.attach_with(&[]).detach(&[]);
}

#[test]
fn a_daemon_does_what_root_says_and_nobody_else() {
    needs_serving!();
    let volume = Volume::created(4, 8 * MIB);
    let attached = volume.attach_with(&[]);
    // As if an administrator had opened what wb keeps shut.
    for folder in [volume.dir.path(), &volume.path("run"), volume.socket().parent().unwrap()] {
        set_permissions(folder, Permissions::from_mode(0o755)).unwrap();
    }
    set_permissions(volume.socket(), Permissions::from_mode(0o666)).unwrap();
    is_refused(
        &Outcome::of(as_nobody(&volume, &["flush", &volume.name])),
        &["user 65534 is at the other end of the socket; only root may be"],
    );
    volume.must(&["flush", &volume.name]);
    attached.detach(&[]);
}

#[test]
fn a_socket_of_another_user_is_not_taken_for_a_daemon() {
    needs_serving!("python3");
    let volume = Volume::created(4, 8 * MIB);
    let socket = volume.socket();
    let run = socket.parent().unwrap();
    std::fs::create_dir_all(run).unwrap();
    set_permissions(volume.dir.path(), Permissions::from_mode(0o755)).unwrap();
    chown(run, Some(NOBODY), None).unwrap();
    let listen = "import socket,sys,time; s=socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); \
                  s.listen(); time.sleep(300)";
    let mut python = Command::new("python3");
    python.args(["-c", listen]).arg(&socket).uid(NOBODY).gid(NOBODY).stdin(Stdio::null());
    let mut python = python.spawn().expect("python3");
    let is_there = wait_for(|| {
        std::fs::metadata(&socket).is_ok_and(|it: Metadata| it.file_type().is_socket())
    });
    let outcome = volume.wbctl(&["flush", &volume.name]);
    python.kill().and_then(|()| python.wait()).expect("a process of ours");
    assert!(is_there && std::fs::metadata(&socket).unwrap().uid() == NOBODY);
    is_refused(
        &outcome,
        &["cannot reach the daemon", "user 65534 is at the other end of the socket"],
    );
}

/// What the daemon says of its memory, and whether any of it is locked, where it may lock this many
/// KiB and lacks capabilities.
fn attach_with_limit(kib: u32, without: &str) -> (String, bool) {
    let volume = Volume::created(16, 16 * MIB);
    let limit = format!("ulimit -l {kib}");
    let attach = volume.command(&["attach", &volume.name]);
    let mut without_rights = Command::new("setpriv");
    without_rights
        .args(["--bounding-set", without, "--inh-caps", without])
        .arg(attach.get_program());
    without_rights.args(attach.get_args());
    without_rights.envs(attach.get_envs().filter_map(|(key, value)| Some((key, value?))));
    let attached = volume.start(after(&limit, &without_rights));
    wb_tests::overwrite(&attached.device, 0, &wb_tests::noise(1, 4 * MIB));
    let status = std::fs::read_to_string(format!("/proc/{}/status", attached.pid()))
        .expect("a process that runs");
    let locked = status.lines().any(|line| line.starts_with("VmLck:") && !line.contains(" 0 kB"));
    let said = attached.stderr();
    attached.detach(&["--drain"]);
    (said, locked)
}

#[test]
fn little_locked_memory_keeps_no_volume_from_being_served() {
    needs_serving!("setpriv");
    let raises = after("ulimit -l 64 && ulimit -l unlimited", &Command::new("true"));
    let can_raise = Outcome::of(raises).code == 0;
    for kib in [64, 8192] {
        let (said, locked) = attach_with_limit(kib, "-ipc_lock,-sys_resource");
        let why = format!("memory cannot be locked: the limit is {kib} KiB");
        assert!(said.contains(&why) && said.contains("LimitMEMLOCK=infinity") && !locked, "{said}");
        // The daemon raises the limit, where it may.
        let (said, locked) = attach_with_limit(kib, "-ipc_lock");
        assert_eq!((locked, said.contains("cannot be locked")), (can_raise, !can_raise), "{said}");
        // It does not matter.
        let (said, locked) = attach_with_limit(kib, "-sys_resource");
        assert!(locked && !said.contains("cannot be locked"), "{said}");
    }
}

#[test]
fn an_ordinary_user_is_told_that_root_is_needed_before_anything_is_touched() {
    let volume = Volume::created(4, 8 * MIB);
    if nix::unistd::geteuid().is_root() {
        for path in [
            volume.dir.path(),
            &volume.path("config"),
            &volume.record(),
            &volume.cache,
            &volume.backing,
        ] {
            chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
        }
    }
    let before = volume.images();
    let refused = Outcome::of(as_nobody(&volume, &["attach", &volume.name]));
    is_refused(&refused, &["needs root (CAP_SYS_ADMIN)", "wbctl replay"]);
    assert_eq!(refused.stderr.lines().count(), 1, "{refused:?}");
    assert_eq!(volume.images(), before);
    assert!(!volume.path("run").exists());
}
