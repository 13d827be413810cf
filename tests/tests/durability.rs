//! What was made durable is durable, and what was only written is not forgotten by detach.

use std::fs::File;
use std::os::unix::fs::FileExt;
use wb_tests::{MIB, Volume, needs_serving, noise, overwrite, read_at, sha256, sha256_direct};

#[test]
fn data_that_was_fsynced_survives_the_daemon() {
    needs_serving!();
    let volume = Volume::created(32, 64 * MIB);
    let mut attached = volume.attach_with(&[]);
    let device = File::options().write(true).open(&attached.device).unwrap();
    // Whole blocks, odd sectors, and a rewrite; each made durable.
    let writes = [(0, 5 * MIB), (20 * MIB + 512, 1536), (3 * MIB, 4096), (64 * MIB - 512, 512)];
    for (seed, (at, bytes)) in (0..).zip(writes) {
        device.write_all_at(&noise(seed, bytes), at).unwrap();
        device.sync_all().unwrap();
    }
    attached.kill();
    drop(device);
    assert!(volume.is_gone());
    volume.must(&[&["replay"], &volume.pair()[..]].concat());
    for (seed, (at, bytes)) in (0..).zip(writes).skip(1) {
        assert!(read_at(&volume.backing, at, bytes) == noise(seed, bytes), "{bytes} bytes at {at}");
    }
    assert!(read_at(&volume.backing, 0, 3 * MIB) == noise(0, 5 * MIB)[..3 << 20]);
}

#[test]
fn a_flush_by_wbctl_is_one_as_well() {
    needs_serving!("dd");
    let volume = Volume::created(32, 64 * MIB);
    let mut attached = volume.attach_with(&[]);
    std::fs::write(volume.path("data"), noise(5, 2 * MIB)).unwrap();
    let direct = format!("if={} of={}", volume.path("data").display(), attached.device_str());
    let args: Vec<&str> = direct.split(' ').chain(["bs=64K", "oflag=direct"]).collect();
    wb_tests::succeeds(std::process::Command::new("dd").args(args));
    volume.must(&["flush", &volume.name]);
    attached.kill();
    volume.must(&[&["replay"], &volume.pair()[..]].concat());
    assert!(read_at(&volume.backing, 0, 2 * MIB) == noise(5, 2 * MIB));
}

#[test]
fn detach_with_drain_writes_out_the_page_cache_of_the_device() {
    needs_serving!();
    let volume = Volume::created(16, 64 * MIB);
    let attached = volume.attach_with(&[]);
    // More than the log holds, at no block's beginning, and not synced.
    overwrite(&attached.device, MIB + 1, &noise(6, 30 * MIB));
    attached.detach(&["--drain"]);
    assert!(read_at(&volume.backing, MIB + 1, 30 * MIB) == noise(6, 30 * MIB));
    let check = wb_tests::wb!("wbcheck", &volume.cache, "--json");
    assert_eq!((check.code, &check.json()["dirty_blocks"]), (0, &0.into()), "{check:?}");
    let backing = sha256(&volume.backing);
    let attached = volume.attach_with(&[]);
    assert_eq!(sha256_direct(&attached.device), backing);
}
