//! Where writes go first: to the log, to the backing device and the cache, or around the cache; and
//! long sequences.

use libwb::format::to_usize;
use std::fs::File;
use std::process::Command;
use wb_tests::{
    MIB, Volume, needs_serving, noise, overwrite, read_at, sha256, sha256_direct, wait_for,
};

const BLOCK: u64 = 4096;

fn live(volume: &Volume) -> serde_json::Value {
    volume.status()["live"].clone()
}

fn counter(volume: &Volume, key: &str) -> u64 {
    live(volume)["counters"][key].as_u64().expect("a counter")
}

fn set(volume: &Volume, tunables: &[&str]) {
    volume.must(&[&["set", volume.name.as_str()], tunables].concat());
}

/// Writes past the page cache of the loop device, in pieces of a given size.
fn write_direct(device: &std::path::Path, offset: u64, bytes: &[u8], piece: u64) {
    let source = tempfile::NamedTempFile::new().expect("a temporary file");
    std::fs::write(source.path(), bytes).expect("a temporary file");
    let written = Command::new("dd")
        .arg(format!("if={}", source.path().display()))
        .arg(format!("of={}", device.display()))
        .arg(format!("bs={piece}"))
        .arg(format!("seek={offset}"))
        .args(["oflag=direct,seek_bytes", "conv=notrunc", "status=none"])
        .status()
        .expect("dd");
    assert!(written.success());
}

/// Reads, past the page cache of the loop device, which would read ahead.
fn read_direct(device: &std::path::Path, offset: u64, bytes: u64) -> Vec<u8> {
    let read = Command::new("dd")
        .arg(format!("if={}", device.display()))
        .arg(format!("bs={bytes}"))
        .arg(format!("skip={offset}"))
        .args(["count=1", "iflag=direct,skip_bytes", "status=none"])
        .output()
        .expect("dd");
    assert!(read.status.success());
    read.stdout
}

/// Writes and flushes.
fn write_synced(device: &std::path::Path, offset: u64, bytes: &[u8]) {
    overwrite(device, offset, bytes);
    File::open(device).and_then(|device| device.sync_all()).expect("a device that takes writes");
}

#[test]
fn around_the_cache_a_write_is_on_the_backing_device_when_it_is_acknowledged() {
    needs_serving!();
    let volume = Volume::created(8, 8 * MIB);
    let attached = volume.attach_with(&["write_mode=around"]);
    let data = noise(1, 64 * BLOCK);
    write_direct(&attached.device, 8 * BLOCK, &data, BLOCK);
    assert_eq!(read_at(&volume.backing, 8 * BLOCK, 64 * BLOCK), data);
    let live = live(&volume);
    assert_eq!(
        (live["dirty_bytes"].as_u64(), live["used_bytes"].as_u64()),
        (Some(0), Some(0)),
        "{live}"
    );
    assert_eq!(counter(&volume, "direct_write_bytes"), 64 * BLOCK);
    // And a cache device that is lost then takes nothing with it.
    drop(attached);
    std::fs::remove_file(&volume.cache).unwrap();
    assert_eq!(read_at(&volume.backing, 8 * BLOCK, 64 * BLOCK), data);
}

#[test]
fn around_the_cache_what_was_cached_for_reads_is_used_until_it_is_written() {
    needs_serving!();
    let volume = Volume::created(8, 8 * MIB);
    let attached = volume.attach_with(&[
        "write_mode=around",
        "read_cache_threshold=127",
        "nr_read_cache_cells=1",
    ]);
    let old = noise(2, MIB);
    write_direct(&attached.device, 0, &old, MIB);
    // Not as one sequence, and again and again: what is read once is not cached.
    let read_all = || {
        for at in (0..40).rev().map(|nth| 2 * nth * BLOCK) {
            assert_eq!(
                read_direct(&attached.device, at, BLOCK),
                old[to_usize(at)..][..to_usize(BLOCK)]
            );
        }
    };
    assert!(
        wait_for(|| {
            let before = counter(&volume, "backing_read_bytes");
            read_all();
            counter(&volume, "backing_read_bytes") == before
        }),
        "in the end, all of it is read from the cache: {}",
        live(&volume)
    );
    let before = counter(&volume, "backing_read_bytes");
    // Of a block that is cached, two sectors are written.
    let new = noise(3, 1024);
    write_direct(&attached.device, 40 * BLOCK + 512, &new, 512);
    let mut expected = old[to_usize(40 * BLOCK)..][..to_usize(BLOCK)].to_vec();
    expected[512..1536].copy_from_slice(&new);
    assert_eq!(read_direct(&attached.device, 40 * BLOCK, BLOCK), expected);
    assert!(counter(&volume, "backing_read_bytes") > before, "it is not cached any more");
    assert!(wait_for(|| live(&volume)["dirty_bytes"] == 0), "the log gives up what it still held");
    attached.detach(&[]);
    assert_eq!(read_at(&volume.backing, 40 * BLOCK, BLOCK), expected);
}

#[test]
fn through_the_cache_a_write_is_on_both_devices() {
    needs_serving!();
    let volume = Volume::created(8, 8 * MIB);
    let attached = volume.attach_with(&["write_mode=through"]);
    let data = noise(4, 2 * MIB);
    write_direct(&attached.device, 0, &data, 128 << 10);
    assert_eq!(read_at(&volume.backing, 0, 2 * MIB), data);
    assert!(wait_for(|| counter(&volume, "injected_blocks") >= 4 * 127), "{}", live(&volume));
    let before = counter(&volume, "backing_read_bytes");
    assert_eq!(
        read_direct(&attached.device, 0, 4 * 127 * BLOCK),
        data[..to_usize(4 * 127 * BLOCK)]
    );
    assert_eq!(counter(&volume, "backing_read_bytes"), before, "it is read from the cache");
    assert_eq!(live(&volume)["dirty_bytes"], 0);
}

#[test]
fn the_mode_changes_while_the_log_is_dirty_and_a_flush_then_empties_it() {
    needs_serving!();
    let volume = Volume::created(16, 16 * MIB);
    let attached = volume.attach_with(&["writeback_threshold=0"]);
    let mut expected = noise(5, 4 * MIB);
    write_synced(&attached.device, 0, &expected);
    assert!(live(&volume)["dirty_bytes"].as_u64() >= Some(4 * MIB));
    set(&volume, &["write_mode=around"]);
    // Over what the log holds, in parts of blocks, and where it holds nothing.
    let new = noise(6, 40 * BLOCK);
    write_direct(&attached.device, 3 * BLOCK + 512, &new, 40 * BLOCK);
    expected[to_usize(3 * BLOCK) + 512..][..new.len()].copy_from_slice(&new);
    write_direct(&attached.device, 10 * MIB, &new, 40 * BLOCK);
    assert_eq!(read_at(&volume.backing, 10 * MIB, 40 * BLOCK), new);
    volume.must(&["flush", &volume.name]);
    assert_eq!(
        read_at(&volume.backing, 0, 4 * MIB),
        expected,
        "a flush leaves nothing to the cache alone"
    );
    assert_eq!(live(&volume)["dirty_bytes"], 0);
    set(&volume, &["write_mode=back"]);
    write_synced(&attached.device, 0, &new);
    assert!(live(&volume)["dirty_bytes"].as_u64() > Some(0), "the log takes writes again");
    attached.detach(&["--drain"]);
    expected[..new.len()].copy_from_slice(&new);
    assert_eq!(read_at(&volume.backing, 0, 4 * MIB), expected);
}

#[test]
fn after_sigkill_in_any_mode_no_older_data_comes_back() {
    needs_serving!();
    let volume = Volume::created(8, 8 * MIB);
    let mut expected = vec![0; to_usize(2 * MIB)];
    for (round, mode) in ["back", "around", "back", "through", "around"].into_iter().enumerate() {
        let mut attached =
            volume.attach_with(&["writeback_threshold=0", &format!("write_mode={mode}")]);
        // Each round overlaps what the others have written.
        let at = round * 50_000 / 512 * 512;
        let data = noise(10 + round as u64, MIB);
        write_synced(&attached.device, at as u64, &data);
        expected[at..at + data.len()].copy_from_slice(&data);
        attached.kill();
    }
    let attached = volume.attach_with(&[]);
    assert!(read_at(&attached.device, 0, 2 * MIB) == expected);
    let whole = sha256_direct(&attached.device);
    attached.detach(&["--drain"]);
    assert_eq!(sha256(&volume.backing), whole);
}

#[test]
fn long_sequences_go_around_the_cache_where_that_is_set_and_nothing_else() {
    needs_serving!();
    let volume = Volume::created(16, 32 * MIB);
    let attached = volume.attach_with(&["sequential_cutoff=2048", "writeback_threshold=0"]);
    let data = noise(7, 8 * MIB);
    write_direct(&attached.device, MIB, &data, 512 << 10);
    let around = counter(&volume, "direct_write_bytes");
    assert!((5 * MIB..=6 * MIB + 512 * 1024).contains(&around), "{around}");
    for nth in 0..50 {
        write_direct(&attached.device, 20 * MIB + nth * 9 * BLOCK, &data[..to_usize(BLOCK)], BLOCK);
    }
    assert_eq!(counter(&volume, "direct_write_bytes"), around, "scattered blocks are cached");
    assert!(read_direct(&attached.device, MIB, 8 * MIB) == data);
    attached.detach(&["--drain"]);
    assert!(read_at(&volume.backing, MIB, 8 * MIB) == data);
}

#[test]
fn modes_are_set_by_the_modules_names_too_and_refused_where_they_break_a_promise() {
    needs_serving!();
    let volume = Volume::created(8, 8 * MIB);
    let name = volume.name.as_str();
    let _attached = volume.attach_with(&[]);
    assert_eq!(volume.must(&["set", "--save", name, "write_around_mode=1"]), "write_mode=around\n");
    assert_eq!(volume.must(&["get", name, "write_around_mode"]), "write_mode=around\n");
    set(&volume, &["update_sb_record_interval=60"]);
    assert!(volume.must(&["status", "--dm", name]).contains("update_sb_record_interval 60"));
    for (bad, why) in [
        ("write_around_mode=2", "must be a number from 0 to 1"),
        ("write_mode=sideways", "must be one of: back, through, around"),
        ("sequential_cutoff=-1", "must be a number from 0 to 1048576"),
        ("update_sb_record_interval=3601", "must be a number from 0 to 3600"),
        (
            "writeback_order=strict",
            "with writeback_order=strict all writes go through the log; set write_mode=back first",
        ),
    ] {
        let refused = volume.wbctl(&["set", name, bad]);
        assert_eq!((refused.code, refused.stdout.as_str()), (1, ""), "{refused:?}");
        assert!(refused.stderr.contains(why), "{refused:?}");
    }
    assert_eq!(volume.must(&["get", name, "writeback_order"]), "writeback_order=sorted\n");
}
