//! How a volume becomes a block device, and what happens when that ends by itself.

#![allow(clippy::unwrap_used)] // all of it is a test, but clippy sees that in test functions alone

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, minor, stat};
use nix::sys::statfs::{FUSE_SUPER_MAGIC, statfs};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};
use std::fs::File;
use std::io::Write;
use std::path::Path;
use wb_tests::{Attached, MIB, PATIENCE, Volume, needs_serving, noise, overwrite, read_at, skip};

const CONTROL: &str = "/dev/ublk-control";

#[test]
fn without_ublk_the_way_to_get_it_is_told_and_auto_takes_a_loop_device() {
    needs_serving!();
    if Path::new(CONTROL).exists() {
        skip!("the kernel has ublk here");
    }
    let volume = Volume::created(16, 16 * MIB);
    let refused = volume.wbctl(&["attach", &volume.name, "--serve", "ublk"]);
    assert_eq!(refused.code, 1, "{refused:?}");
    assert!(refused.stderr.contains(CONTROL), "{refused:?}");
    assert!(refused.stderr.contains("modprobe ublk_drv"), "{refused:?}");
    let attached = volume.start(volume.command(&["attach", &volume.name, "--serve", "auto"]));
    assert!(attached.device.starts_with("/dev/"), "{:?}", attached.device);
    assert!(attached.device_str().starts_with("/dev/loop"), "{:?}", attached.device);
    assert!(attached.stderr().contains("Falling back to a loop device"), "{}", attached.stderr());
    attached.detach(&[]);
}

#[test]
fn the_front_end_is_recorded_and_attach_goes_by_it() {
    needs_serving!();
    let volume = Volume::blank(16, 16 * MIB);
    volume.create(&["--serve", "loop"]);
    let record = std::fs::read_to_string(volume.record()).unwrap();
    assert!(record.contains("serve = \"loop\""), "{record}");
    let attached = volume.start(volume.command(&["attach", &volume.name]));
    assert!(attached.device_str().starts_with("/dev/loop"), "{:?}", attached.device);
    assert!(!attached.stderr().contains("ublk"), "{}", attached.stderr());
    attached.detach(&[]);
}

#[test]
fn a_front_end_that_does_not_exist_is_refused() {
    let volume = Volume::created(16, 16 * MIB);
    let refused = volume.wbctl(&["attach", &volume.name, "--serve", "floppy"]);
    assert_eq!(refused.code, 2, "{refused:?}");
    std::fs::write(
        volume.record(),
        std::fs::read_to_string(volume.record()).unwrap().replacen(
            "cache",
            "serve = \"floppy\"\ncache",
            1,
        ),
    )
    .unwrap();
    let refused = volume.wbctl(&["attach", &volume.name]);
    assert_eq!(refused.code, 1, "{refused:?}");
    assert!(refused.stderr.contains("floppy"), "{refused:?}");
}

/// Aborts the FUSE connection of a daemon, as an administrator may through /sys/fs/fuse.
fn abort_connection(attached: &Attached<'_>) {
    let descriptors = format!("/proc/{}/fd", attached.pid());
    let mount = std::fs::read_dir(&descriptors)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| {
            let target = std::fs::read_link(path).unwrap_or_default();
            target == Path::new("/")
                && statfs(path).is_ok_and(|it| it.filesystem_type() == FUSE_SUPER_MAGIC)
        })
        .expect("the daemon's mount");
    let number = minor(stat(&mount).unwrap().st_dev);
    let context = fsopen("fusectl", FsOpenFlags::FSOPEN_CLOEXEC).expect("what the test needs");
    fsconfig_create(&context).expect("what the test needs");
    let control = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty());
    let file = format!("{number}/abort");
    let abort = openat(control.unwrap(), file.as_str(), OFlag::O_WRONLY, Mode::empty());
    File::from(abort.expect("the connection")).write_all(b"1").unwrap();
}

#[test]
fn a_daemon_whose_block_device_ends_says_so_and_ends_with_the_log_closed() {
    needs_serving!();
    let volume = Volume::created(16, 16 * MIB);
    let mut attached = volume.attach();
    let data = noise(7, 64 << 10);
    overwrite(&attached.device, 8192, &data);
    File::open(&attached.device).unwrap().sync_all().unwrap();
    abort_connection(&attached);
    let status = attached.ended_within(PATIENCE).expect("the daemon ends");
    assert_eq!(status.code(), Some(1), "{}", attached.stderr());
    assert!(attached.stderr().contains("the kernel has ended /dev/"), "{}", attached.stderr());
    drop(attached);
    assert!(volume.is_gone(), "the loop device is there still");
    let attached = volume.attach();
    assert_eq!(read_at(&attached.device, 8192, 64 << 10), data);
    attached.detach(&[]);
}
