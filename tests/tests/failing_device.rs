//! Devices that fail below a real daemon: what cannot be kept is never acknowledged, what is on the
//! other device is still read, and the daemon goes on.

use libwb::device::IoBuf;
use libwb::format::to_usize;
use nix::libc::O_DIRECT;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use wb_tests::{
    Attached, FailingFile, FileFaults, LoopDevice, MIB, Volume, needs_serving, noise, read_at,
    wait_for,
};

const ALL: std::ops::Range<u64> = 0..u64::MAX;
const EIO: Option<i32> = Some(nix::libc::EIO);

/// Writes past the page cache, so that each answer is the daemon's.
fn write(device: &Path, at: u64, data: &[u8]) -> io::Result<()> {
    let file = File::options().write(true).custom_flags(O_DIRECT).open(device)?;
    file.write_all_at(&IoBuf::copy_of(data), at)
}

fn flush(device: &Path) -> io::Result<()> {
    File::options().write(true).open(device)?.sync_all()
}

fn read(device: &Path, at: u64, bytes: u64) -> io::Result<Vec<u8>> {
    let file = File::options().read(true).custom_flags(O_DIRECT).open(device)?;
    let mut buf = IoBuf::zeroed(to_usize(bytes));
    file.read_exact_at(&mut buf, at)?;
    Ok(buf.to_vec())
}

fn errno<T>(result: &io::Result<T>) -> Option<i32> {
    result.as_ref().err().and_then(io::Error::raw_os_error)
}

/// A new volume of 32 MiB of noise, on a backing device that can fail.
fn on_failing_backing() -> (Volume, FailingFile) {
    let mut volume = Volume::blank(16, 32 * MIB);
    std::fs::write(&volume.backing, noise(0, 32 * MIB)).expect("room for an image");
    let backing = FailingFile::over(&volume.backing, &volume.path("failing"));
    volume.backing = backing.path.clone();
    volume.create(&[]);
    (volume, backing)
}

/// A new volume, on a cache device that can fail: a file, or a block device.
fn on_failing_cache(is_block: bool) -> (Volume, FailingFile, Option<LoopDevice>) {
    let mut volume = Volume::blank(16, 32 * MIB);
    let cache = FailingFile::over(&volume.cache, &volume.path("failing"));
    let block = is_block.then(|| LoopDevice::attach(&cache.path).expect("a loop device"));
    volume.cache = block.as_ref().map_or_else(|| cache.path.clone(), |device| device.path.clone());
    volume.create(&[]);
    (volume, cache, block)
}

#[test]
fn write_back_that_fails_keeps_the_data_dirty_and_goes_on_later() {
    needs_serving!();
    for faults in [
        FileFaults { writes: true, ..FileFaults::default() },
        FileFaults { flushes: true, ..FileFaults::default() },
    ] {
        let (volume, backing) = on_failing_backing();
        let mut attached = volume.attach_with(&[]);
        backing.fail(faults);
        write(&attached.device, 8 * MIB, &noise(1, 2 * MIB)).unwrap();
        flush(&attached.device).expect("a flush needs the cache device alone");
        let drained = volume.wbctl(&["drain", &volume.name]);
        assert_eq!((drained.code, drained.stderr.lines().count()), (1, 1), "{drained:?}");
        let says = ["device.img", "I/O error"];
        assert!(says.iter().all(|part| drained.stderr.contains(part)), "{drained:?}");
        let live = &volume.status()["live"];
        assert_eq!(
            (&live["dirty_bytes"], &live["failure"]),
            (&(2 * MIB).into(), &().into()),
            "{live}"
        );
        assert!(live["writeback_error"].is_string(), "{live}");
        assert!(attached.is_running());
        assert_eq!(read(&attached.device, 8 * MIB, 2 * MIB).unwrap(), noise(1, 2 * MIB));

        backing.heal();
        volume.must(&["drain", &volume.name]);
        let live = &volume.status()["live"];
        assert_eq!(
            (&live["dirty_bytes"], &live["writeback_error"]),
            (&0.into(), &().into()),
            "{live}"
        );
        assert!(read_at(&volume.backing, 8 * MIB, 2 * MIB) == noise(1, 2 * MIB));
        attached.detach(&["--drain"]);
    }
}

#[test]
fn a_bad_sector_of_the_backing_device_fails_reads_of_it_alone_and_only_while_it_is_bad() {
    needs_serving!();
    let (volume, backing) = on_failing_backing();
    let mut attached = volume.attach_with(&[]);
    let device = attached.device.clone();
    let old = noise(0, 32 * MIB);
    let old = |at: u64, bytes: u64| &old[to_usize(at)..to_usize(at + bytes)];
    backing.fail(FileFaults { reads: 8 * MIB..8 * MIB + 512, ..FileFaults::default() });
    assert_eq!(errno(&read(&device, 8 * MIB, 512)), EIO);
    assert_eq!(errno(&read(&device, 8 * MIB - 4096, 8192)), EIO);
    assert_eq!(read(&device, 8 * MIB - 4096, 4096).unwrap(), old(8 * MIB - 4096, 4096));
    assert_eq!(read(&device, 8 * MIB + 512, MIB).unwrap(), old(8 * MIB + 512, MIB));
    assert_eq!(errno(&read(&device, 8 * MIB, 512)), EIO, "it is still bad");
    backing.heal();
    assert_eq!(read(&device, 8 * MIB, 512).unwrap(), old(8 * MIB, 512));
    // What the cache holds is not read from there.
    backing.fail(FileFaults { reads: 8 * MIB..8 * MIB + 512, ..FileFaults::default() });
    write(&device, 8 * MIB, &noise(2, 4096)).unwrap();
    assert_eq!(read(&device, 8 * MIB, 4096).unwrap(), noise(2, 4096));
    assert!(attached.is_running());
    assert_eq!(volume.status()["state"], "attached");
    attached.detach(&["--drain"]);
}

/// Writes are refused from now on, and reads of what is on the cache device and on the backing
/// device go on.
fn only_reads_go_on(volume: &Volume, attached: &mut Attached<'_>, kept: &[u8]) {
    let device = attached.device.clone();
    assert_eq!(errno(&write(&device, 0, &noise(9, 4096))), EIO);
    assert_eq!(errno(&flush(&device)), EIO);
    assert_eq!(read(&device, 4 * MIB, MIB).expect("data on the cache device"), kept);
    assert_eq!(read(&device, 20 * MIB, MIB).expect("data on the backing device"), vec![0; 1 << 20]);
    assert!(attached.is_running());
    let status = volume.status();
    assert_eq!(status["state"], "failed", "{status}");
    let cache = volume.cache.to_str().expect("UTF-8");
    assert!(status["live"]["failure"].as_str().is_some_and(|why| why.contains(cache)), "{status}");
    let drained = volume.wbctl(&["drain", &volume.name]);
    assert_eq!((drained.code, drained.stderr.lines().count()), (1, 1), "{drained:?}");
    let detached = volume.wbctl(&["detach", &volume.name]);
    assert_eq!((detached.code, detached.stderr.lines().count()), (1, 1), "{detached:?}");
    assert!(detached.stderr.contains("detached, but not all data could be kept"), "{detached:?}");
    assert_eq!(attached.wait().code(), Some(1), "{}", attached.stderr());
}

#[test]
fn a_cache_device_that_fails_writes_or_flushes_acknowledges_nothing_more_and_reads_go_on() {
    needs_serving!();
    let writes = FileFaults { writes: true, ..FileFaults::default() };
    let flushes = FileFaults { flushes: true, ..FileFaults::default() };
    for (faults, is_block) in
        [(writes.clone(), false), (flushes.clone(), false), (writes, true), (flushes, true)]
    {
        let (volume, cache, _block) = on_failing_cache(is_block);
        let mut attached = volume.attach_with(&[]);
        let kept = noise(3, MIB);
        write(&attached.device, 4 * MIB, &kept).unwrap();
        flush(&attached.device).unwrap();
        cache.fail(faults);
        // In memory, it is acknowledged as by any disk with a volatile write cache. The flush
        // tells.
        write(&attached.device, 8 * MIB, &noise(4, 64 * 1024)).unwrap();
        assert_eq!(errno(&flush(&attached.device)), EIO);
        // The device works again, but what it lost in the failure is unknown.
        cache.heal();
        only_reads_go_on(&volume, &mut attached, &kept);
        drop(attached);

        let attached = volume.attach_with(&[]);
        assert_eq!(read(&attached.device, 4 * MIB, MIB).unwrap(), kept);
        attached.detach(&["--drain"]);
        assert!(read_at(&volume.backing, 4 * MIB, MIB) == kept);
    }
}

#[test]
fn blocks_that_the_cache_device_cannot_read_come_from_the_backing_device_unless_dirty() {
    needs_serving!();
    let (volume, cache, _block) = on_failing_cache(false);
    let mut attached = volume.attach_with(&[]);
    let device = attached.device.clone();
    write(&device, 4 * MIB, &noise(5, MIB)).unwrap();
    flush(&device).unwrap();
    volume.must(&["drain", &volume.name]);
    cache.fail(FileFaults { reads: ALL, ..FileFaults::default() });
    write(&device, 8 * MIB, &noise(6, MIB)).unwrap();
    flush(&device).unwrap();
    // Written back again and again in vain; meanwhile it is in the cache alone.
    assert_eq!(read(&device, 4 * MIB, MIB).unwrap(), noise(5, MIB));
    assert!(
        wait_for(|| volume.status()["live"]["writeback_error"].is_string()),
        "{}",
        volume.status()
    );
    assert_eq!(errno(&read(&device, 8 * MIB, 4096)), EIO);
    assert!(attached.is_running());
    let status = volume.status();
    assert_eq!(
        (&status["state"], &status["live"]["dirty_bytes"]),
        (&"degraded".into(), &MIB.into()),
        "{status}"
    );
    assert!(status["live"]["counters"]["cache_read_errors"].as_u64() > Some(1), "{status}");

    cache.heal();
    assert_eq!(read(&device, 8 * MIB, MIB).unwrap(), noise(6, MIB));
    attached.detach(&["--drain"]);
    assert!(read_at(&volume.backing, 8 * MIB, MIB) == noise(6, MIB));
}
