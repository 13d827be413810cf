//! A corrupt log: what is said of it, and both ways on.

use futures_lite::future::block_on;
use libwb::cache::Cache;
use libwb::device::{Device, IoBuf, MemDevice};
use libwb::format::{BLOCK_BYTES, SEGMENT_BYTES, SUPERBLOCK_REGION_BYTES, to_u64, to_usize};
use libwb::log::Use;
use libwb::log::salvage::{SalvageMode, Scanned};
use libwb::log::{LogError, LogErrorKind};
use nix::libc::O_DIRECT;
use proptest::prelude::*;
use std::collections::HashSet;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;
use wb_tests::{
    GOLDEN, MIB, Volume, flip_bit, golden_bytes, golden_volume_sha256, needs_serving, noise,
    overwrite, read_at, segment_offset, sha256, sha256_direct, wait_for, wb,
};

/// A golden volume with rot in its second segment.
fn rotten() -> Volume {
    let volume = Volume::golden("few-1");
    flip_bit(&volume.cache, segment_offset(&volume.cache, 2) + 8192);
    volume
}

fn replay(volume: &Volume, more: &[&str]) -> wb_tests::Outcome {
    volume.wbctl(&[&["replay"], &volume.pair()[..], more].concat())
}

/// The numbers of the blocks in which two files differ.
fn different_blocks(a: &[u8], b: &[u8]) -> HashSet<u64> {
    let pairs = a.chunks(BLOCK_BYTES).zip(b.chunks(BLOCK_BYTES)).enumerate();
    pairs.filter(|(_, (a, b))| a != b).map(|(nth, _)| to_u64(nth)).collect()
}

fn numbers(list: &serde_json::Value) -> HashSet<u64> {
    list.as_array().expect("a list").iter().map(|n| n.as_u64().expect("a number")).collect()
}

#[test]
fn a_corrupt_log_is_refused_with_both_ways_on_and_nothing_is_changed() {
    let volume = rotten();
    let before = volume.images();
    let mut commands = vec![vec!["replay"], vec!["replay", "--dry-run"]];
    if wb_tests::what_is_missing(&[]).is_none() {
        commands.push(vec!["attach", volume.name.as_str()]);
    }
    for command in commands {
        let outcome = volume.wbctl(&[&command[..], &volume.pair()[..]].concat());
        assert_eq!((outcome.code, outcome.stdout.as_str()), (1, ""), "{outcome:?}");
        for part in [
            "segment 2 is missing or damaged",
            "Neither device was changed. Copy the cache device",
            "--salvage=skip keeps every valid segment; lost blocks fall back to older versions. \
             It gives up segment 2: 123 dirty blocks",
            "--salvage=stop goes back to segment 1, the last consistent point. It gives up \
             segments 2 to 7: 334 dirty blocks",
        ] {
            assert!(outcome.stderr.contains(part), "{part:?} is not in {outcome:?}");
        }
        assert_eq!(volume.images(), before, "{command:?}");
    }
    let check = wb!("wbcheck", &volume.cache);
    assert_eq!(
        (check.code, check.stdout.contains("--repair --salvage=stop goes back")),
        (4, true),
        "{check:?}"
    );
    let json = wb!("wbcheck", &volume.cache, "--json").json();
    assert_eq!(json["salvage"][0]["dirty_blocks_given_up"], 123, "{json}");
    assert_eq!(
        json["salvage"][1]["segments_given_up"],
        serde_json::json!([2, 3, 4, 5, 6, 7]),
        "{json}"
    );
    assert_eq!(volume.images(), before);
}

#[test]
fn skip_loses_nothing_but_the_blocks_it_names() {
    let volume = rotten();
    let whole = Volume::golden("few-1");
    whole.must(&[&["replay"], &whole.pair()[..]].concat());
    let report = replay(&volume, &["--salvage", "--json"]).json();
    let salvage = &report["salvage"];
    assert_eq!(
        (&salvage["way"], &salvage["segments_given_up"]),
        (&"skip".into(), &serde_json::json!([2]))
    );
    let [with, without] = [&volume, &whole].map(|v| std::fs::read(&v.backing).unwrap());
    let lost = numbers(&salvage["blocks_given_up"]);
    let different = different_blocks(&with, &without);
    assert!(!different.is_empty() && different.is_subset(&lost), "{different:?} {lost:?}");
    assert_eq!(
        wb!("wbcheck", &volume.cache, "--backing", &volume.backing).first_line(),
        format!("{}: sound", volume.cache.display())
    );
}

#[test]
fn stop_gives_the_volume_of_the_log_before_the_damage() {
    let volume = rotten();
    let before = Volume::golden("few-1");
    for id in 2..=7 {
        overwrite(&before.cache, segment_offset(&before.cache, id), &[0; BLOCK_BYTES]);
    }
    before.must(&[&["replay"], &before.pair()[..]].concat());
    let outcome = replay(&volume, &["--salvage=stop"]);
    assert_eq!(
        (outcome.code, outcome.stdout.contains("gives up segments 2 to 7")),
        (0, true),
        "{outcome:?}"
    );
    assert_eq!(sha256(&volume.backing), sha256(&before.backing));
    let again = replay(&volume, &["--salvage=stop"]);
    assert_eq!(again.stdout, "nothing to write back: the cache is clean\n");
}

#[test]
fn a_sound_log_is_treated_as_without_salvage() {
    for name in GOLDEN {
        let (volume, other) = (Volume::golden(name), Volume::golden(name));
        let outcome = replay(&volume, &["--salvage"]);
        assert_eq!(outcome.stdout, replay(&other, &[]).stdout, "{name}");
        assert_eq!(volume.images(), other.images(), "{name}");
        assert_eq!(sha256(&volume.backing), golden_volume_sha256(name), "{name}");
    }
}

#[test]
fn salvage_does_not_help_against_what_is_no_corruption() {
    let resized = Volume::golden("lapped-1");
    let file = std::fs::File::options().write(true).open(&resized.cache).unwrap();
    file.set_len(wb_tests::cache_bytes(9)).unwrap();
    let small = rotten();
    let file = std::fs::File::options().write(true).open(&small.backing).unwrap();
    file.set_len(MIB).unwrap();
    for (volume, way, why) in [
        (&resized, "--salvage=skip", "Give it its old size back"),
        (&resized, "--salvage=stop", "Give it its old size back"),
        (&small, "--salvage=skip", "is it the right backing device?"),
    ] {
        let before = volume.images();
        let outcome = replay(volume, &[way]);
        assert_eq!((outcome.code, outcome.stderr.contains(why)), (1, true), "{outcome:?}");
        assert_eq!(volume.images(), before);
    }
}

#[test]
fn a_way_that_there_is_not_is_a_usage_error() {
    let volume = rotten();
    for args in [&["--salvage=all"][..], &["--salvage", "--dry-run"]] {
        assert_eq!(replay(&volume, args).code, 2, "{args:?}");
    }
    assert_eq!(wb!("wbcheck", &volume.cache, "--salvage").code, 2, "only with --repair");
}

#[test]
fn of_a_volume_of_wb_a_rotten_block_is_all_that_skip_loses() {
    needs_serving!();
    let volume = Volume::created(32, 8 * MIB);
    let (old, new) = (noise(1, 4 * MIB), noise(2, 4 * MIB));
    for data in [&old, &new] {
        let mut attached = volume.attach_with(&["--", "nr_max_batched_writeback=1"]);
        let file = std::fs::File::options().write(true).open(&attached.device).unwrap();
        file.write_all_at(data, 0).unwrap();
        file.sync_all().unwrap();
        drop(file);
        if data == &old {
            attached.end(nix::sys::signal::Signal::SIGTERM);
            volume.must(&[&["replay"], &volume.pair()[..]].concat());
        } else {
            attached.kill();
        }
    }
    assert!(volume.is_gone());
    // The newest version of the third block that is only in the cache.
    let dump = wb!("wbdump", "segments", &volume.cache, "--live", "--json").stdout;
    let live: serde_json::Value =
        serde_json::from_str(dump.lines().next().expect("a live segment")).unwrap();
    let id = live["id"].as_u64().unwrap_or_else(|| panic!("{live}"));
    let block = read_at(&volume.cache, segment_offset(&volume.cache, id) + 512 + 2 * 16, 8);
    let lost = u64::from_le_bytes(block.try_into().unwrap()) / 8;
    flip_bit(&volume.cache, segment_offset(&volume.cache, id) + 3 * 4096 + 100);

    let refused = volume.wbctl(&[&["replay", "--dry-run"], &volume.pair()[..]].concat());
    assert_eq!(
        (refused.code, refused.stderr.contains("1 dirty block (126 more")),
        (1, true),
        "{refused:?}"
    );
    // Attach looks at the headers alone. The block cannot be read, all others can, and status says
    // what to do.
    let attached = volume.attach_with(&volume.pair());
    let direct =
        std::fs::File::options().read(true).custom_flags(O_DIRECT).open(&attached.device).unwrap();
    let mut block = IoBuf::zeroed(BLOCK_BYTES);
    assert!(direct.read_exact_at(&mut block, lost * to_u64(BLOCK_BYTES)).is_err());
    direct.read_exact_at(&mut block, (lost ^ 1) * to_u64(BLOCK_BYTES)).unwrap();
    assert!(wait_for(|| volume.status()["live"]["writeback_error"].is_string()));
    let advice = "run wbcheck on its cache device, then attach it with --salvage";
    let degraded = volume.wbctl(&["status", &volume.name]);
    assert_eq!(degraded.code, 5, "{degraded:?}");
    let told = degraded.stdout + &attached.stderr();
    assert_eq!(told.matches(advice).count().min(2), 2, "{told}");
    drop(direct);
    attached.end(nix::sys::signal::Signal::SIGTERM);
    let attached = volume.attach_with(&[&volume.pair()[..], &["--salvage"]].concat());
    assert!(attached.stderr().contains("the log was corrupt"), "{}", attached.stderr());
    let mut want = new;
    let range = to_usize(lost) * BLOCK_BYTES..(to_usize(lost) + 1) * BLOCK_BYTES;
    want[range.clone()].copy_from_slice(&old[range]);
    assert_eq!(different_blocks(&read_at(&attached.device, 0, 4 * MIB), &want), HashSet::new());
    let served = sha256_direct(&attached.device);
    attached.detach(&["--drain"]);
    assert_eq!(sha256(&volume.backing), served);
}

/// Bytes over part of an image.
fn damage() -> impl Strategy<Value = (usize, Vec<u8>)> {
    let region = to_usize(SUPERBLOCK_REGION_BYTES);
    let at = prop_oneof![
        region - 512..region - 500,
        (0..14usize, 0..16usize).prop_map(move |(slot, at)| region + slot * SEGMENT_BYTES + at),
        (0..14usize, 512..BLOCK_BYTES)
            .prop_map(move |(slot, at)| region + slot * SEGMENT_BYTES + at),
        region..8usize << 20,
    ];
    (at, prop::collection::vec(any::<u8>(), 1..40))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn after_any_damage_the_volume_can_be_attached_or_salvaged_and_attached(
        name in 0..GOLDEN.len(),
        damage in prop::collection::vec(damage(), 1..12),
    ) {
        let mut image = golden_bytes(GOLDEN[name], "cache.img");
        for (at, bytes) in damage {
            let end = image.len().min(at + bytes.len());
            image[at..end].copy_from_slice(&bytes[..end - at]);
        }
        for way in SalvageMode::ALL {
            let cache: Device = Arc::new(MemDevice::with_content("cache", image.clone()));
            let backing: Device = Arc::new(MemDevice::new("backing", 16 * MIB));
            let scanning = Scanned::read(&cache, Use::Write, |_| ());
            let scanned = block_on(scanning).expect("a superblock");
            match block_on(scanned.salvage(&cache, way)) {
                Ok(Some(plan)) => block_on(plan.apply(&cache)).expect("a device in memory"),
                Ok(None) => {}
                Err(LogError { kind: LogErrorKind::Misplaced, .. }) => continue,
                Err(error) => panic!("{error}"),
            }
            let opened = block_on(Cache::examine(&cache, &backing, None));
            prop_assert!(opened.is_ok(), "{way}: {:?}", opened.err());
        }
    }
}
