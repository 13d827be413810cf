//! Devices of another size: a backing device that grows or shrinks, a cache device that is replaced
//! by a larger one.

use std::fs::File;
use std::path::Path;
use std::process::Command;
use wb_tests::{
    Filesystem, MIB, Volume, cache_bytes, needs_serving, noise, overwrite, read_at, wb, zeros,
};

fn resize(path: &Path, bytes: u64) {
    File::options()
        .write(true)
        .open(path)
        .and_then(|file| file.set_len(bytes))
        .expect("a file to resize");
}

fn recorded_sectors(volume: &Volume) -> u64 {
    wb!("wbdump", "super", &volume.cache, "--json").json()["extension"]["backing_sectors"]
        .as_u64()
        .expect("what the test needs")
}

fn attach_once(volume: &Volume) {
    volume.attach_with(&[]).detach(&[]);
}

/// To attach, and to replay.
fn refuses(volume: &Volume, why: &str) {
    refuses_to(
        volume,
        &[vec!["attach", volume.name.as_str()], [&["replay"], &volume.pair()[..]].concat()],
        why,
    );
}

fn refuses_to(volume: &Volume, commands: &[Vec<&str>], why: &str) {
    let before = volume.images();
    for args in commands {
        let refused = volume.wbctl(args);
        assert_eq!((refused.code, refused.stdout.as_str()), (1, ""), "{refused:?}");
        assert!(refused.stderr.contains(why), "{refused:?}");
    }
    assert_eq!(volume.images(), before);
}

#[test]
fn a_backing_device_that_has_grown_is_served_whole_and_may_not_shrink_again() {
    needs_serving!();
    let volume = Volume::created(16, 16 * MIB);
    let attached = volume.attach_with(&[]);
    overwrite(&attached.device, 15 * MIB, &noise(1, MIB));
    File::open(&attached.device).unwrap().sync_all().unwrap();
    attached.crash();

    resize(&volume.backing, 24 * MIB + 512);
    refuses(
        &volume,
        "this one has 49153; if it is the same and has grown, attach the volume with --grown",
    );
    assert_eq!(recorded_sectors(&volume), 32768);
    let attached = volume.attach_with(&["--grown"]);
    assert_eq!(volume.status()["live"]["volume_bytes"], 24 * MIB + 512);
    overwrite(&attached.device, 24 * MIB - MIB, &noise(2, MIB + 512));
    attached.detach(&["--drain"]);
    assert!(read_at(&volume.backing, 15 * MIB, MIB) == noise(1, MIB), "written before it grew");
    assert!(
        read_at(&volume.backing, 23 * MIB, MIB + 512) == noise(2, MIB + 512),
        "written in what it grew by"
    );
    assert_eq!(recorded_sectors(&volume), 24 * MIB / 512 + 1);
    attach_once(&volume);

    resize(&volume.backing, 16 * MIB);
    refuses(
        &volume,
        "the cache was made for one of 49153 sectors, this one has only 32768; if it was shrunk",
    );
}

#[test]
fn what_is_refused_is_not_changed_although_the_backing_device_has_grown() {
    needs_serving!();
    let volume = Volume::corrupt(16, 16 * MIB);
    resize(&volume.backing, 24 * MIB);
    refuses_to(&volume, &[vec!["attach", volume.name.as_str(), "--grown"]], "the log is corrupt");
    assert_eq!(recorded_sectors(&volume), 32768);
}

#[test]
fn a_filesystem_grows_with_its_backing_device() {
    needs_serving!("mkfs.ext4", "e2fsck", "resize2fs");
    let volume = Volume::created(16, 32 * MIB);
    let mut attached = volume.attach_with(&[]);
    Filesystem::Ext4.make(&attached.device);
    std::fs::write(attached.mount().join("old"), noise(1, MIB)).unwrap();
    attached.unmount();
    attached.detach(&[]);
    resize(&volume.backing, 64 * MIB);
    let mut attached = volume.attach_with(&["--grown"]);
    // Not mounted: that needs more rights than a container has.
    wb_tests::succeeds(Command::new("e2fsck").args(["-f", "-p"]).arg(&attached.device));
    wb_tests::succeeds(Command::new("resize2fs").arg(&attached.device));
    let on = attached.mount();
    std::fs::write(on.join("new"), noise(2, 40 * MIB)).unwrap();
    attached.unmount();
    Filesystem::Ext4.check(&attached.device);
    attached.detach(&["--drain"]);
    Filesystem::Ext4.with_image(&volume.backing, |on| {
        assert!(std::fs::read(on.join("old")).is_ok_and(|data| data == noise(1, MIB)));
        assert!(std::fs::read(on.join("new")).is_ok_and(|data| data == noise(2, 40 * MIB)));
    });
}

/// The recipe of wb(7).
#[test]
fn a_cache_device_is_replaced_by_a_larger_one() {
    needs_serving!();
    let mut volume = Volume::created(8, 16 * MIB);
    let attached = volume.attach_with(&[]);
    overwrite(&attached.device, 4096, &noise(1, 3 * MIB));
    attached.detach(&["--drain"]);
    let name = volume.name.clone();
    volume.must(&["remove", &name]);
    volume.cache = zeros(&volume.dir, "larger.img", cache_bytes(28));
    volume.create(&[]);
    let attached = volume.attach_with(&[]);
    assert_eq!(volume.status()["live"]["log_bytes"], 14 * MIB);
    assert!(read_at(&attached.device, 4096, 3 * MIB) == noise(1, 3 * MIB));
    attached.detach(&[]);
}
