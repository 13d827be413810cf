//! What the backing device alone holds when the cache device dies: everything written back, and any
//! part of the batch under way. The simulator checks this after every crash
//! (tests/src/sim/backing_history.rs).

use std::fs::File;
use std::path::Path;
use wb_tests::{MIB, Volume, needs_serving, noise, overwrite, read_at, wait_for};

const SECTOR: usize = 512;

/// Writes, and makes it durable on the cache device.
fn write(device: &Path, offset: u64, data: &[u8]) {
    overwrite(device, offset, data);
    File::open(device).and_then(|device| device.sync_all()).expect("a device that takes writes");
}

#[test]
fn the_backing_device_alone_holds_what_was_written_back_and_of_what_was_on_its_way_any_part() {
    needs_serving!();
    let volume = Volume::created(64, 16 * MIB);
    let name = volume.name.as_str();
    let attached = volume.attach_with(&["nr_max_batched_writeback=2"]);
    let before = noise(1, 16 * MIB);
    write(&attached.device, 0, &before);
    volume.must(&["drain", name]);
    volume.must(&["pause", name]);
    let status = volume.status()["live"].clone();
    assert_eq!(status["written_back_segment"], status["newest_segment"], "{status}");
    let after = noise(2, 8 * MIB);
    write(&attached.device, 4 * MIB, &after);
    // As if the cache device died now: nothing of it is needed for what was drained, and nothing
    // newer is there.
    assert!(read_at(&volume.backing, 0, 16 * MIB) == before);
    // The cache device dies while all this is being written back.
    let written_back = || {
        volume.status()["live"]["counters"]["written_back_bytes"].as_u64().expect("a number")
            > 16 * MIB
    };
    volume.must(&["resume", name]);
    assert!(wait_for(written_back), "{}", volume.status());
    attached.crash();
    std::fs::remove_file(&volume.cache).expect("a cache device to lose");
    let left = read_at(&volume.backing, 0, 16 * MIB);
    let mut newer = before.clone();
    newer[4 << 20..12 << 20].copy_from_slice(&after);
    let sectors = |data: &[u8]| data.chunks(SECTOR).map(<[u8]>::to_vec).collect::<Vec<_>>();
    let all = sectors(&left).into_iter().zip(sectors(&before)).zip(sectors(&newer));
    for (sector, ((left, before), newer)) in all.enumerate() {
        assert!(
            left == before || left == newer,
            "sector {sector} holds neither its old nor its new data"
        );
    }
    assert!(left != before, "something was written back");
}
