//! Filesystems on a volume whose cache is far smaller than what is written, so that write-back runs
//! all the time.

use wb_tests::{Filesystem, MIB, Volume, Writer, check_files, fio_verify, needs_serving, wait_for};

fn fio_finds_its_data_again(filesystem: Filesystem, sector_size: &str) {
    let volume = Volume::blank(24, 512 * MIB);
    volume.create(&["--sector-size", sector_size]);
    let mut attached = volume.attach_with(&[]);
    filesystem.make(&attached.device);
    let on = attached.mount();
    fio_verify(&on, 224 * MIB, sector_size);
    attached.unmount();
    filesystem.check(&attached.device);
    let live = volume.status()["live"].clone();
    assert!(live["counters"]["written_back_bytes"].as_u64() > Some(100 * MIB), "{live}");
    assert!(live["failure"].is_null() && live["writeback_error"].is_null(), "{live}");
    attached.detach(&["--drain"]);
    filesystem.check(&volume.backing);
}

#[test]
fn ext4_keeps_what_fio_writes() {
    needs_serving!("mkfs.ext4", "e2fsck", "fio");
    fio_finds_its_data_again(Filesystem::Ext4, "512");
}

#[test]
fn xfs_keeps_what_fio_writes() {
    needs_serving!("mkfs.xfs", "xfs_repair", "fio");
    fio_finds_its_data_again(Filesystem::Xfs, "512");
}

#[test]
fn xfs_keeps_what_fio_writes_on_sectors_of_4096_bytes() {
    needs_serving!("mkfs.xfs", "xfs_repair", "fio");
    fio_finds_its_data_again(Filesystem::Xfs, "4096");
}

fn the_backing_device_alone_is_the_filesystem(filesystem: Filesystem) {
    let volume = Volume::created(24, 512 * MIB);
    let mut attached = volume.attach_with(&[]);
    filesystem.make(&attached.device);
    let on = attached.mount();
    let writer = Writer::start(&on);
    assert!(wait_for(|| writer.durable() >= 200), "{}", attached.stderr());
    let count = writer.end();
    attached.unmount();
    attached.detach(&["--drain"]);
    filesystem.check(&volume.backing);
    filesystem.with_image(&volume.backing, |on| check_files(on, count));
}

#[test]
fn a_drained_backing_device_alone_is_a_clean_ext4() {
    needs_serving!("mkfs.ext4", "e2fsck");
    the_backing_device_alone_is_the_filesystem(Filesystem::Ext4);
}

#[test]
fn a_drained_backing_device_alone_is_a_clean_xfs() {
    needs_serving!("mkfs.xfs", "xfs_repair");
    the_backing_device_alone_is_the_filesystem(Filesystem::Xfs);
}
