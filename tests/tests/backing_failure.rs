//! A backing device that fails below the daemon: no block is lost, status says so, and it goes on
//! once it can.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use wb_tests::{MIB, Volume, needs_serving, noise, read_at, succeeds, unmount, wait_for};

/// A filesystem in memory, of a size that can be changed.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn new(volume: &Volume, size: &str) -> Tmpfs {
        let on = volume.path("tmpfs");
        std::fs::create_dir(&on).expect("a new folder");
        succeeds(
            Command::new("mount")
                .args(["-t", "tmpfs", "-o", &format!("size={size}"), "wb-test"])
                .arg(&on),
        );
        Tmpfs(on)
    }

    fn resize(&self, size: &str) {
        succeeds(Command::new("mount").args(["-o", &format!("remount,size={size}")]).arg(&self.0));
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        unmount(&self.0);
    }
}

/// A new volume of 32 MiB, on a sparse file in a filesystem with room for 1 MiB.
fn on_full_filesystem() -> (Volume, Tmpfs) {
    let mut volume = Volume::blank(16, 0);
    let tmpfs = Tmpfs::new(&volume, "1M");
    volume.backing = tmpfs.0.join("backing.img");
    File::create(&volume.backing).and_then(|file| file.set_len(32 * MIB)).expect("a sparse file");
    volume.create(&[]);
    (volume, tmpfs)
}

fn write_through(device: &std::path::Path, at: u64, data: &[u8]) {
    let file = File::options().write(true).open(device).expect("a device");
    file.write_all_at(data, at)
        .and_then(|()| file.sync_all())
        .expect("a write that the cache takes");
}

#[test]
fn write_back_waits_for_a_backing_device_without_room_and_goes_on_when_there_is() {
    needs_serving!();
    let (volume, tmpfs) = on_full_filesystem();
    let mut attached = volume.attach_with(&[]);
    write_through(&attached.device, 8 * MIB, &noise(1, 4 * MIB));
    let drained = volume.wbctl(&["drain", &volume.name]);
    assert_eq!((drained.code, drained.stderr.lines().count()), (1, 1), "{drained:?}");
    assert!(
        drained.stderr.contains("backing.img") && drained.stderr.contains("No space left"),
        "{drained:?}"
    );
    assert!(
        wait_for(|| volume.status()["live"]["writeback_error"].is_string()),
        "{}",
        volume.status()
    );
    let shown = volume.wbctl(&["status", &volume.name]);
    assert_eq!(shown.code, 5, "{shown:?}");
    assert!(shown.stdout.contains("makes no progress, trying again"), "{shown:?}");
    assert!(attached.is_running());
    assert!(read_at(&attached.device, 8 * MIB, 4 * MIB) == noise(1, 4 * MIB));

    tmpfs.resize("64M");
    assert!(wait_for(|| volume.status()["live"]["dirty_bytes"] == 0), "{}", volume.status());
    assert!(volume.status()["live"]["writeback_error"].is_null());
    assert!(read_at(&volume.backing, 8 * MIB, 4 * MIB) == noise(1, 4 * MIB));
    attached.detach(&["--drain"]);
}

#[test]
fn a_detach_that_cannot_drain_says_so_and_keeps_serving() {
    needs_serving!();
    let (volume, tmpfs) = on_full_filesystem();
    let mut attached = volume.attach_with(&[]);
    write_through(&attached.device, 0, &noise(2, 4 * MIB));
    let refused = volume.wbctl(&["detach", "--drain", &volume.name]);
    assert_eq!((refused.code, refused.stderr.lines().count()), (1, 1), "{refused:?}");
    assert!(attached.is_running());
    // Without --drain it ends, and the data stays in the cache.
    attached.detach(&[]);
    let replayed = volume.wbctl(&[&["replay"], &volume.pair()[..]].concat());
    assert_eq!((replayed.code, replayed.stderr.lines().count()), (1, 1), "{replayed:?}");
    tmpfs.resize("64M");
    volume.must(&[&["replay"], &volume.pair()[..]].concat());
    assert!(read_at(&volume.backing, 0, 4 * MIB) == noise(2, 4 * MIB));
}

#[test]
fn the_cache_outlives_a_truncated_backing_file() {
    needs_serving!();
    let volume = Volume::created(16, 32 * MIB);
    let mut attached = volume.attach_with(&[]);
    let file = File::options().write(true).open(&volume.backing).unwrap();
    file.set_len(0).unwrap();
    write_through(&attached.device, 8 * MIB, &noise(3, MIB));
    assert!(read_at(&attached.device, 8 * MIB, MIB) == noise(3, MIB));
    // What is on neither device cannot be read, and that is all.
    let mut buf = [0; 4096];
    assert!(
        File::open(&attached.device)
            .and_then(|device| device.read_exact_at(&mut buf, 20 * MIB))
            .is_err()
    );
    assert!(attached.is_running());
    assert_eq!(volume.status()["state"], "attached");
    file.set_len(32 * MIB).unwrap();
    volume.must(&["drain", &volume.name]);
    assert!(read_at(&volume.backing, 8 * MIB, MIB) == noise(3, MIB));
    attached.detach(&[]);
}
