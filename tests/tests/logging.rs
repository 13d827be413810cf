//! The daemon's log never holds up the volume, and never ends it.

use libwb::device::IoBuf;
use libwb::format::to_usize;
use nix::libc::O_DIRECT;
use std::fs::File;
use std::io::{self, PipeReader, Write, pipe};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::Stdio;
use wb_tests::{
    Attached, FailingFile, FileFaults, MIB, PATIENCE, Volume, needs_serving, noise, overwrite,
};

/// A new volume of 32 MiB, on a cache device that can fail.
fn on_failing_cache() -> (Volume, FailingFile) {
    let mut volume = Volume::blank(16, 32 * MIB);
    let cache = FailingFile::over(&volume.cache, &volume.path("failing"));
    volume.cache = cache.path.clone();
    volume.create(&[]);
    (volume, cache)
}

/// Attaches with a standard error that is full and that no process reads.
fn attach_stalled(volume: &Volume) -> (Attached<'_>, PipeReader) {
    let (reader, mut writer) = pipe().expect("a pipe");
    rustix::pipe::fcntl_setpipe_size(&writer, 4096).expect("a small pipe");
    writer.write_all(&[b'.'; 4096]).expect("room in a pipe");
    (volume.start_with(volume.command(&["attach", &volume.name]), writer.into()), reader)
}

fn read(device: &Path, at: u64, bytes: u64) -> io::Result<()> {
    let file = File::options().read(true).custom_flags(O_DIRECT).open(device)?;
    file.read_exact_at(&mut IoBuf::zeroed(to_usize(bytes)), at)
}

/// Two writes, one after the other: the first MiB is on the cache device, and not in memory, when
/// the second is.
fn fill(device: &Path) {
    for at in [0, MIB] {
        write_and_flush(device, at, &noise(1, MIB));
    }
}

fn write_and_flush(device: &Path, at: u64, data: &[u8]) {
    overwrite(device, at, data);
    File::open(device).and_then(|device| device.sync_all()).expect("a volume that goes on");
}

/// How many reads of dirty data fail. Each failure writes a line to the log.
fn fail_reads(cache: &FailingFile, device: &Path, count: u64) {
    cache.fail(FileFaults { reads: 0..u64::MAX, ..FileFaults::default() });
    for n in 0..count {
        read(device, n % 256 * 4096, 4096).expect_err("a device that fails");
    }
    cache.heal();
}

#[test]
fn a_daemon_whose_log_has_lost_its_reader_goes_on() {
    needs_serving!();
    let volume = Volume::created(16, 32 * MIB);
    let (reader, writer) = pipe().unwrap();
    let mut attached =
        volume.start_with(volume.command(&["attach", &volume.name]), Stdio::from(writer));
    drop(reader);
    for _ in 0..3 {
        volume.must(&["pause", &volume.name]);
        volume.must(&["resume", &volume.name]);
    }
    write_and_flush(&attached.device, 0, &noise(1, MIB));
    assert!(attached.is_running());
    attached.detach(&["--drain"]);
}

#[test]
fn a_log_that_is_not_read_holds_up_neither_requests_nor_the_end() {
    needs_serving!();
    let (volume, cache) = on_failing_cache();
    let (mut attached, mut reader) = attach_stalled(&volume);
    volume.must(&["pause", &volume.name]);
    fill(&attached.device);
    fail_reads(&cache, &attached.device, 300);
    for n in 0..500 {
        let reply = ask(&volume, &format!("{{\"request\":\"{}\"}}\n", ["pause", "resume"][n % 2]));
        assert!(reply.contains("done"), "{reply}");
    }
    write_and_flush(&attached.device, 4 * MIB, &noise(2, MIB));
    assert!(attached.is_running());
    volume.must(&["detach", &volume.name]);
    assert!(attached.ended_within(PATIENCE / 2).is_some_and(|status| status.success()));
    drop(attached);
    let mut rest = Vec::new();
    io::Read::read_to_end(&mut reader, &mut rest).unwrap();
    assert!(rest.starts_with(&[b'.'; 4096]));
}

/// Asks a daemon over its socket.
fn ask(volume: &Volume, request: &str) -> String {
    let mut socket =
        std::os::unix::net::UnixStream::connect(volume.socket()).expect("a daemon that listens");
    socket.set_read_timeout(Some(PATIENCE)).expect("a socket");
    socket.write_all(request.as_bytes()).expect("a daemon that reads");
    let mut line = String::new();
    io::BufRead::read_line(&mut io::BufReader::new(socket), &mut line)
        .expect("a daemon that answers");
    line
}

#[test]
fn what_comes_thousands_of_times_is_said_a_few_times_and_counted() {
    needs_serving!();
    let (volume, cache) = on_failing_cache();
    let attached = volume.attach_with(&[]);
    volume.must(&["pause", &volume.name]);
    fill(&attached.device);
    fail_reads(&cache, &attached.device, 3000);
    assert!(
        wb_tests::wait_for(|| attached.stderr().contains(" more like it)")),
        "{}",
        attached.stderr()
    );
    let said = attached.stderr();
    assert!(said.lines().count() < 1000, "{} lines", said.lines().count());
    let held_back: u64 = said
        .lines()
        .filter_map(|line| {
            line.split_once("(the last of ")?.1.split(' ').next()?.parse::<u64>().ok()
        })
        .sum();
    assert!(held_back > 1000, "{said}");
    attached.detach(&[]);
}
