//! Space given back: discard, write-zeroes and fstrim reach the backing device, and nothing old
//! comes back.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use wb_tests::{Filesystem, MIB, Volume, needs_serving, noise, read_at, succeeds, unmount};

/// Bytes of disk space that a file takes.
fn space(file: &Path) -> u64 {
    std::fs::metadata(file).expect("a file").blocks() * 512
}

fn blkdiscard(device: &Path, at: u64, bytes: u64, more: &[&str]) {
    let range = ["--offset".to_string(), at.to_string(), "--length".to_string(), bytes.to_string()];
    succeeds(Command::new("blkdiscard").args(more).args(range).arg(device));
}

/// Writes past the page cache's back.
fn write(device: &Path, at: u64, data: &[u8]) {
    let file = File::options().write(true).open(device).expect("a device");
    file.write_all_at(data, at).and_then(|()| file.sync_all()).expect("a write");
}

/// A filesystem in memory whose files cannot have holes punched.
struct Ramfs(PathBuf);

impl Ramfs {
    fn new(volume: &Volume) -> Ramfs {
        let on = volume.path("ramfs");
        std::fs::create_dir(&on).expect("a new folder");
        succeeds(Command::new("mount").args(["-t", "ramfs", "wb-test"]).arg(&on));
        Ramfs(on)
    }
}

impl Drop for Ramfs {
    fn drop(&mut self) {
        unmount(&self.0);
    }
}

fn is_zeros(data: &[u8]) -> bool {
    data.iter().all(|&byte| byte == 0)
}

#[test]
fn what_was_discarded_reads_as_zeros_and_stays_so_after_a_crash() {
    needs_serving!("blkdiscard");
    let volume = Volume::created(16, 32 * MIB);
    let attached = volume.attach_with(&[]);
    write(&attached.device, 0, &noise(1, 24 * MIB));
    volume.must(&["drain", &volume.name]);
    // Half of it is dirty again.
    write(&attached.device, 4 * MIB, &noise(2, 2 * MIB));
    let full = space(&volume.backing);
    blkdiscard(&attached.device, 3 * MIB + 512, 2 * MIB, &[]);
    blkdiscard(&attached.device, 12 * MIB, 4 * MIB, &["--zeroout"]);
    let expect = |device: &Path| {
        assert!(is_zeros(&read_at(device, 3 * MIB + 512, 2 * MIB)), "{}", device.display());
        assert!(is_zeros(&read_at(device, 12 * MIB, 4 * MIB)), "{}", device.display());
        assert!(read_at(device, 0, 3 * MIB + 512) == noise(1, 24 * MIB)[..(3 << 20) + 512]);
        assert!(read_at(device, 5 * MIB + 512, MIB - 512) == noise(2, 2 * MIB)[(1 << 20) + 512..]);
        assert!(read_at(device, 16 * MIB, 8 * MIB) == noise(1, 24 * MIB)[16 << 20..]);
    };
    expect(&attached.device);
    // Who demands zeros keeps the space for them.
    let left = space(&volume.backing);
    assert!(left + MIB < full && left + 3 * MIB > full, "{left} of {full} bytes are left");
    let status = volume.status();
    assert!(status["live"]["counters"]["discarded_bytes"].as_u64() > Some(5 * MIB), "{status}");
    attached.crash();
    let attached = volume.attach_with(&[]);
    expect(&attached.device);
    attached.detach(&["--drain"]);
    expect(&volume.backing);
}

#[test]
fn what_is_discarded_while_it_is_dirty_takes_no_space_once_it_is_written_back() {
    needs_serving!("blkdiscard");
    let volume = Volume::created(128, 64 * MIB);
    let attached = volume.attach_with(&[]);
    volume.must(&["pause", &volume.name]);
    write(&attached.device, 0, &noise(1, 40 * MIB));
    let before = space(&volume.backing);
    blkdiscard(&attached.device, 0, 32 * MIB, &[]);
    // A part of it is written again.
    write(&attached.device, 10 * MIB, &noise(2, MIB));
    volume.must(&["resume", &volume.name]);
    volume.must(&["drain", &volume.name]);
    let taken = space(&volume.backing) - before;
    assert!((9 * MIB..12 * MIB).contains(&taken), "{taken} bytes are taken");
    assert!(read_at(&volume.backing, 10 * MIB, MIB) == noise(2, MIB));
    assert!(read_at(&volume.backing, 32 * MIB, 8 * MIB) == noise(1, 40 * MIB)[32 << 20..]);
    assert!(is_zeros(&read_at(&volume.backing, 11 * MIB, 21 * MIB)));
    attached.detach(&[]);
}

#[test]
fn fstrim_gives_back_the_space_of_deleted_files() {
    needs_serving!("fstrim", "mkfs.ext4");
    let volume = Volume::created(16, 64 * MIB);
    let mut attached = volume.attach_with(&[]);
    Filesystem::Ext4.make(&attached.device);
    let dir = attached.mount();
    std::fs::write(dir.join("stays"), noise(1, 4 * MIB)).unwrap();
    std::fs::write(dir.join("goes"), noise(2, 32 * MIB)).unwrap();
    succeeds(Command::new("sync").arg("-f").arg(&dir));
    volume.must(&["drain", &volume.name]);
    let full = space(&volume.backing);
    std::fs::remove_file(dir.join("goes")).unwrap();
    succeeds(Command::new("sync").arg("-f").arg(&dir));
    succeeds(Command::new("fstrim").arg(&dir));
    assert!(
        space(&volume.backing) + 24 * MIB < full,
        "{} of {full} bytes are left",
        space(&volume.backing)
    );
    assert!(std::fs::read(dir.join("stays")).unwrap() == noise(1, 4 * MIB));
    attached.unmount();
    Filesystem::Ext4.check(&attached.device);
    attached.detach(&["--drain"]);
    Filesystem::Ext4.check(&volume.backing);
}

#[test]
fn on_a_backing_device_that_cannot_discard_zeros_are_written_where_they_are_demanded() {
    needs_serving!("blkdiscard", "mount");
    let mut volume = Volume::blank(16, 0);
    let ramfs = Ramfs::new(&volume);
    volume.backing = ramfs.0.join("backing.img");
    File::create(&volume.backing)
        .and_then(|file| file.write_all_at(&noise(1, 16 * MIB), 0))
        .unwrap();
    volume.create(&[]);
    let attached = volume.attach_with(&[]);
    // A discard is a hint, and the kernel takes no offence; a demand for zeros it meets by writing
    // them.
    blkdiscard(&attached.device, 0, 16 * MIB, &[]);
    assert!(read_at(&attached.device, 0, 16 * MIB) == noise(1, 16 * MIB));
    blkdiscard(&attached.device, MIB, MIB, &["--zeroout"]);
    assert!(is_zeros(&read_at(&attached.device, MIB, MIB)));
    assert!(read_at(&attached.device, 2 * MIB, 14 * MIB) == noise(1, 16 * MIB)[2 << 20..]);
    attached.detach(&["--drain"]);
}
