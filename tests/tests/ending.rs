//! A daemon ends when it is told to or killed, whatever hangs, and does not end for less.

use libwb::device::IoBuf;
use nix::libc::O_DIRECT;
use nix::sys::signal::Signal;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;
use wb_tests::{
    Attached, FailingFile, MIB, Outcome, PATIENCE, Volume, needs_serving, noise, overwrite,
    read_at, wait_for,
};

/// A new volume of 64 MiB, one of whose devices can fail.
fn on_failing(cache: bool) -> (Volume, FailingFile) {
    let mut volume = Volume::blank(32, 64 * MIB);
    let content = if cache { &volume.cache } else { &volume.backing };
    let failing = FailingFile::over(content, &volume.path("failing"));
    *(if cache { &mut volume.cache } else { &mut volume.backing }) = failing.path.clone();
    volume.create(&[]);
    (volume, failing)
}

/// Writes past the page cache.
fn write(device: &Path, at: u64, data: &[u8]) -> io::Result<()> {
    let file = File::options().write(true).custom_flags(O_DIRECT).open(device)?;
    file.write_all_at(&IoBuf::copy_of(data), at)
}

fn flush(device: &Path) -> io::Result<()> {
    File::open(device)?.sync_all()
}

/// A client that runs meanwhile, and is killed in the end.
struct Client(Child);

impl Client {
    fn start(volume: &Volume, args: &[&str]) -> Client {
        let mut command = volume.command(args);
        let silent = command.stdout(Stdio::null()).stderr(Stdio::null());
        Client(silent.spawn().expect("wbctl"))
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn must_have_ended(attached: &mut Attached<'_>) {
    assert!(
        attached.ended_within(PATIENCE / 2).is_some(),
        "it does not end: {}",
        attached.stderr()
    );
}

#[test]
fn a_daemon_that_dies_while_its_page_cache_is_dirty_is_gone_and_the_volume_can_be_attached_again() {
    needs_serving!("losetup");
    for signal in [Signal::SIGKILL, Signal::SIGABRT] {
        let volume = Volume::created(32, 256 * MIB);
        let mut attached = volume.attach_with(&[]);
        let kept = noise(1, MIB);
        overwrite(&attached.device, 0, &kept);
        flush(&attached.device).unwrap();
        // More than the log takes at once, through the page cache, and no process has the device
        // open any more.
        overwrite(&attached.device, 64 * MIB, &noise(2, 128 * MIB));
        attached.signal(signal);
        must_have_ended(&mut attached);
        assert!(volume.is_gone(), "{signal}");
        drop(attached);
        let attached = volume.attach_with(&[]);
        assert!(read_at(&attached.device, 0, MIB) == kept, "{signal}");
        attached.detach(&[]);
    }
}

#[test]
fn a_signal_that_is_not_to_end_it_neither_ends_nor_stops_a_daemon() {
    needs_serving!();
    let volume = Volume::created(16, 16 * MIB);
    let mut attached = volume.attach_with(&[]);
    for (n, signal) in [
        Signal::SIGHUP,
        Signal::SIGUSR1,
        Signal::SIGUSR2,
        Signal::SIGALRM,
        Signal::SIGXFSZ,
        Signal::SIGTSTP,
        Signal::SIGTTIN,
        Signal::SIGTTOU,
        Signal::SIGPROF,
        Signal::SIGPWR,
    ]
    .into_iter()
    .enumerate()
    {
        overwrite(&attached.device, MIB, &noise(n as u64, MIB));
        attached.signal(signal);
        flush(&attached.device).unwrap_or_else(|e| panic!("{signal}: {e}"));
        assert_eq!(volume.status()["state"], "attached", "{signal}");
        assert!(attached.is_running(), "{signal}");
    }
    attached.end(Signal::SIGTERM);
}

#[test]
fn a_second_signal_ends_a_daemon_whose_cache_device_hangs_and_flushed_data_survives() {
    needs_serving!("losetup");
    let (volume, cache) = on_failing(true);
    let mut attached = volume.attach_with(&[]);
    let device = attached.device.clone();
    write(&device, 0, &noise(1, MIB)).unwrap();
    flush(&device).unwrap();
    let hang = cache.hang();
    write(&device, 8 * MIB, &noise(2, MIB)).unwrap();
    let waits = std::thread::spawn(move || flush(&device));
    attached.signal(Signal::SIGTERM);
    assert!(
        wait_for(|| attached.stderr().contains("SIGTERM: closing the log")),
        "{}",
        attached.stderr()
    );
    attached.signal(Signal::SIGTERM);
    // The device hangs all the time; who waits for the volume is told all the same.
    assert!(
        wait_for(|| attached.stderr().contains("stay only in the cache")),
        "{}",
        attached.stderr()
    );
    assert!(wait_for(|| waits.is_finished()), "a flush still waits: {}", attached.stderr());
    assert!(waits.join().unwrap().is_err());
    assert!(!volume.link().is_symlink() && !volume.socket().exists());
    // The kernel keeps a process whose requests a FUSE device has not answered.
    drop(hang);
    must_have_ended(&mut attached);
    assert_eq!(attached.wait().code(), Some(1), "{}", attached.stderr());
    drop(attached);
    let attached = volume.attach_with(&[]);
    assert!(read_at(&attached.device, 0, MIB) == noise(1, MIB));
    attached.detach(&[]);
}

#[test]
fn a_daemon_that_is_killed_while_it_writes_out_to_a_device_that_hangs_is_gone_when_that_answers() {
    needs_serving!("losetup");
    let (volume, cache) = on_failing(true);
    let mut attached = volume.attach_with(&[]);
    let hang = cache.hang();
    overwrite(&attached.device, 0, &noise(1, 4 * MIB));
    attached.signal(Signal::SIGTERM);
    assert!(
        wait_for(|| attached.stderr().contains("SIGTERM: closing the log")),
        "{}",
        attached.stderr()
    );
    std::thread::sleep(Duration::from_millis(500));
    attached.signal(Signal::SIGKILL);
    std::thread::sleep(Duration::from_millis(500));
    drop(hang);
    must_have_ended(&mut attached);
    assert!(volume.is_gone());
    drop(attached);
    volume.attach_with(&[]).detach(&[]);
}

#[test]
fn a_detach_by_force_ends_while_write_back_hangs_and_says_what_is_left() {
    needs_serving!("losetup");
    let (volume, backing) = on_failing(false);
    let mut attached = volume.attach_with(&[]);
    let hang = backing.hang();
    write(&attached.device, 0, &noise(1, 4 * MIB)).unwrap();
    flush(&attached.device).expect("a flush needs the cache device alone");
    let _drain = Client::start(&volume, &["drain", &volume.name]);
    let live = |key: &str| volume.status()["live"][key].clone();
    assert!(
        wait_for(|| live("backing_requests_in_flight").as_u64() > Some(0)),
        "{}",
        volume.status()
    );
    let age = || live("backing_oldest_request_seconds").as_f64();
    let before = age();
    assert!(before.is_some() && wait_for(|| age() > before), "{}", volume.status());
    let shown = volume.must(&["status", &volume.name]);
    let row = shown.lines().find(|line| line.contains("requests to backing")).unwrap_or_default();
    assert!(row.contains(" in flight") && row.contains(", the oldest for "), "{shown}");
    let metrics = volume.must(&["status", "--prometheus"]);
    let metric = format!("wb_backing_oldest_request_seconds{{volume=\"{}\"}} ", volume.name);
    assert!(metrics.lines().any(|line| line.starts_with(&metric)), "{metrics}");

    // What needs the cache device alone goes on.
    write(&attached.device, 16 * MIB, &noise(2, 4 * MIB)).unwrap();
    flush(&attached.device).unwrap();
    assert!(read_at(&attached.device, 16 * MIB, 4 * MIB) == noise(2, 4 * MIB));

    let detached = volume.must(&["detach", "--force", &volume.name]);
    assert!(detached.contains("; 8 MiB stay only in the cache"), "{detached}");
    drop(hang);
    must_have_ended(&mut attached);
    drop(attached);
    let attached = volume.attach_with(&[]);
    assert!(read_at(&attached.device, 0, 4 * MIB) == noise(1, 4 * MIB));
    assert!(read_at(&attached.device, 16 * MIB, 4 * MIB) == noise(2, 4 * MIB));
    attached.detach(&["--drain"]);
    assert!(read_at(&volume.backing, 0, 4 * MIB) == noise(1, 4 * MIB));
}

#[test]
fn a_detach_says_what_stays_only_in_the_cache() {
    needs_serving!();
    let volume = Volume::created(32, 64 * MIB);
    let mut attached = volume.attach_with(&["writeback_threshold=0"]);
    write(&attached.device, 0, &noise(1, 2 * MIB)).unwrap();
    let detached = volume.must(&["detach", &volume.name]);
    assert!(detached.contains("; 2 MiB stay only in the cache"), "{detached}");
    assert_eq!(attached.wait().code(), Some(0), "{}", attached.stderr());
    drop(attached);
    let mut attached = volume.attach_with(&[]);
    let drained = volume.must(&["detach", "--drain", &volume.name]);
    assert!(drained.contains("; the backing device alone holds all data"), "{drained}");
    assert_eq!(attached.wait().code(), Some(0), "{}", attached.stderr());
}

#[test]
fn a_volume_that_waits_for_its_devices_is_ended_by_a_signal() {
    needs_serving!();
    let volume = Volume::created(16, 16 * MIB);
    std::fs::remove_file(&volume.backing).unwrap();
    let mut command = volume.command(&["attach", &volume.name, "--wait", "600"]);
    let mut daemon = Client(command.stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap());
    assert!(wait_for(|| volume.status()["state"] == "starting or stopping"));
    let pid = nix::unistd::Pid::from_raw(i32::try_from(daemon.0.id()).unwrap());
    nix::sys::signal::kill(pid, Signal::SIGHUP).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert!(daemon.0.try_wait().unwrap().is_none(), "SIGHUP does not end it");
    nix::sys::signal::kill(pid, Signal::SIGTERM).unwrap();
    assert!(wait_for(|| daemon.0.try_wait().unwrap().is_some()));
}

#[test]
fn what_a_daemon_has_others_do_is_no_command_of_the_manual() {
    let mut command = std::process::Command::new(wb_tests::bin("wbctl"));
    command.arg("--help");
    let help = Outcome::of(command);
    assert!(help.code == 0 && !help.stdout.contains("apart"), "{help:?}");
}
