//! What a volume tells of its work, in each of the forms in which it is asked for.

use serde_json::Value;
use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use wb_tests::{Volume, needs_serving, noise};

const MIB: u64 = 1 << 20;

/// Writes past the page cache, and makes it durable.
fn write(device: &Path, at: u64, bytes: u64) {
    let file = File::options().write(true).custom_flags(nix::libc::O_DIRECT).open(device).expect("a device");
    let data = libwb::device::IoBuf::copy_of(&noise(at, bytes));
    file.write_all_at(&data, at).and_then(|()| file.sync_all()).expect("a write");
}

fn statistics(volume: &Volume) -> Value {
    volume.status()["live"]["statistics"].clone()
}

/// How many whole blocks were written of which the cache held a version, or none.
fn written_blocks(volume: &Volume, hit: bool) -> u64 {
    let accesses = statistics(volume)["accesses"].as_array().expect("a list").clone();
    let is_meant = |met: &&Value| met["request"] == "write" && met["hit"] == hit && met["whole"] == true;
    accesses.iter().filter(is_meant).map(|met| met["blocks"].as_u64().expect("a number")).sum()
}

#[test]
fn status_says_what_requests_found_how_long_they_took_and_what_they_cost_the_cache_device() {
    needs_serving!();
    let volume = Volume::created(8, 8 * MIB);
    let attached = volume.attach_with(&[]);
    assert_eq!(statistics(&volume)["write_amplification"], Value::Null);
    write(&attached.device, 0, MIB);
    write(&attached.device, MIB / 2, MIB);
    assert_eq!((written_blocks(&volume, true), written_blocks(&volume, false)), (128, 384));
    let told = statistics(&volume);
    assert_eq!(told["write_hit_ratio"], 0.25);
    let amplification = told["write_amplification"].as_f64().unwrap();
    assert!((1.0..1.1).contains(&amplification), "{told}");
    let latency = &told["latencies"]["write"];
    assert_eq!(latency["requests"], volume.status()["live"]["counters"]["writes"]);
    let buckets = latency["buckets"].as_array().unwrap();
    assert_eq!(buckets.iter().filter_map(Value::as_u64).sum::<u64>(), latency["requests"]);
    let [p50, p999] = ["p50_seconds", "p999_seconds"].map(|share| latency[share].as_f64().unwrap());
    assert!(0.0 < p50 && p50 <= p999, "{told}");
    assert!(told["latencies"]["flush"]["requests"].as_u64() >= Some(2), "{told}");
    volume.must(&["drain", &volume.name]);
    assert!(statistics(&volume)["writeback_bytes_per_second"].as_f64() > Some(0.0));
    let shown = volume.must(&["status", &volume.name]);
    for line in [
        "25.0 % of those written",
        "bytes to the cache device for each byte written",
        "MiB/s while it works, 0 µs left",
        "p99.9",
    ] {
        assert!(shown.contains(line), "{line}: {shown}");
    }
    attached.detach(&[]);
}

#[test]
fn counters_start_anew_when_told_to_and_nothing_else_changes() {
    needs_serving!();
    let volume = Volume::created(8, 8 * MIB);
    let attached = volume.attach_with(&[]);
    write(&attached.device, 0, MIB);
    let before = volume.status();
    volume.must(&["clear-stats", &volume.name]);
    let after = volume.status();
    for what in ["write_bytes", "flushes", "segments_written", "cache_write_bytes"] {
        assert!(before["live"]["counters"][what].as_u64() > Some(0), "{what}: {before}");
        assert_eq!(after["live"]["counters"][what], 0);
    }
    assert_eq!(statistics(&volume)["latencies"]["write"]["requests"], 0);
    assert_eq!(after["live"]["newest_segment"], before["live"]["newest_segment"]);
    write(&attached.device, 0, MIB);
    assert_eq!(volume.status()["live"]["counters"]["write_bytes"], MIB);
    assert_eq!((written_blocks(&volume, true), written_blocks(&volume, false)), (256, 0));
    attached.detach(&[]);
    let refused = volume.wbctl(&["clear-stats", &volume.name]);
    assert!(refused.code == 1 && refused.stderr.contains("is not attached"), "{refused:?}");
}
