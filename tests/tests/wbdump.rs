//! Looking into the log.

use libwb::device::{Device, MemDevice};
use libwb::format::{
    EXTENSION_OFFSETS, MAGIC, RECORD_BLOCK_OFFSET, SUPERBLOCK_OFFSET, SuperblockExtension,
};
use libwb::log::pairing::{BackingFacts, check_pairing};
use std::path::Path;
use std::sync::Arc;
use tempfile::TempDir;
use wb_tests::{
    FailingFile, FileFaults, Volume, cache_bytes, entry, flip_bit, golden, needs_serving,
    overwrite, read_at, segment_offset, sha256, wb, write_record, write_segment, zeros,
};

fn json_lines(text: &str) -> Vec<serde_json::Value> {
    text.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect()
}

/// Three segments. The first and the last hold block 7; segment 3 is torn.
fn small_log(dir: &TempDir) -> std::path::PathBuf {
    let cache = zeros(dir, "cache", cache_bytes(8));
    assert_eq!(wb!("wbformat", &cache).code, 0);
    write_segment(&cache, 1, &[entry(7, 0x01), entry(9, 0xff)], b'a');
    write_segment(&cache, 2, &[entry(7, 0x03)], b'b');
    write_segment(&cache, 3, &[entry(8, 0), entry(7, 0xff)], b'c');
    flip_bit(&cache, segment_offset(&cache, 3) + 4096);
    cache
}

#[test]
fn the_superblock_is_shown_with_totals() {
    let pair = golden("sbrecord-1");
    let before = sha256(&pair.cache);
    let text = wb!("wbdump", "super", &pair.cache);
    assert_eq!(text.code, 0);
    assert!(text.stdout.contains(" superblock record     6\n"), "{text:?}");
    let json = wb!("wbdump", "super", &pair.cache, "--json").json();
    for (key, want) in [
        ("record_segment", 6),
        ("segments", 14),
        ("slots_valid", 8),
        ("dirty_blocks", 133),
        ("newest_segment", 8),
    ] {
        assert_eq!(json[key], want, "{key} in {json}");
    }
    assert_eq!(sha256(&pair.cache), before);
}

/// Such a text would colour a terminal, fake a line, and show its end from right to left.
#[test]
fn texts_that_stand_on_a_device_are_shown_without_harm() {
    const TEXT: &str = "a\u{1b}[31m\nb\u{202e}c";
    const SHOWN: &str = "a\\u{1b}[31m\\nb\\u{202e}c";
    let volume = Volume::created(8, 4 << 20);
    let block = read_at(&volume.cache, EXTENSION_OFFSETS[1], 4096);
    let page = SuperblockExtension::decode(block.first_chunk().unwrap()).expect("a sound page");
    let page = SuperblockExtension { label: TEXT.into(), backing_id: TEXT.into(), ..page.next() };
    let mut block = [0; 4096];
    page.encode(&mut block);
    overwrite(&volume.cache, EXTENSION_OFFSETS[0], &block);
    let shown = wb!("wbdump", "super", &volume.cache).stdout;
    assert_eq!((shown.matches(SHOWN).count(), shown.contains('\u{1b}')), (2, false), "{shown:?}");
    let json = wb!("wbdump", "super", "--json", &volume.cache).json();
    assert_eq!(
        (&json["extension"]["label"], &json["extension"]["backing_id"]),
        (&TEXT.into(), &TEXT.into())
    );
    let identity = wb!("wbdump", "identity", &volume.cache).stdout;
    assert!(
        identity.ends_with("\nID_FS_LABEL_ENC=a\\x1b\\x5b31m\\x0ab\\xe2\\x80\\xaec\n"),
        "{identity:?}"
    );
    assert!(identity.contains("\nID_FS_LABEL=a_1b_5b31m_0ab_e2_80_aec\n"), "{identity:?}");
    let device: Device = Arc::new(MemDevice::new("cache", 0));
    let backing =
        BackingFacts { name: "backing", sectors: page.backing_sectors, identity: "b\u{9b}2J" };
    let refused = check_pairing(&device, &page, &backing).expect_err("another device").to_string();
    assert!(
        refused.ends_with(&format!("made for '{SHOWN}', this one is 'b\\u{{9b}}2J'")),
        "{refused:?}"
    );
}

#[test]
fn segments_are_listed_in_log_order() {
    let pair = golden("lapped-1");
    let rows = json_lines(&wb!("wbdump", "segments", &pair.cache, "--json").stdout);
    let ids: Vec<_> = rows.iter().map(|row| row["id"].as_u64().unwrap()).collect();
    assert_eq!(ids, (34..=47).collect::<Vec<_>>());
    let text = wb!("wbdump", "segments", &pair.cache);
    assert_eq!((text.code, text.stdout.lines().count()), (0, 15), "{text:?}");
}

#[test]
fn empty_slots_are_counted_and_come_last_in_json() {
    let dir = TempDir::new().unwrap();
    let cache = small_log(&dir);
    let text = wb!("wbdump", "segments", &cache).stdout;
    assert_eq!(
        (text.lines().count(), text.lines().last()),
        (1 + 3 + 1, Some("5 empty slots")),
        "{text}"
    );
    let rows = json_lines(&wb!("wbdump", "segments", &cache, "--json").stdout);
    let slots: Vec<_> = rows.iter().map(|row| row["slot"].as_u64().unwrap()).collect();
    assert_eq!(slots, (0..8).collect::<Vec<_>>());
    assert!(rows[3..].iter().all(|row| row["state"] == "empty" && row["id"].is_null()), "{rows:?}");
    let chosen = wb!("wbdump", "segments", &cache, "--live").stdout;
    assert!(!chosen.contains("empty"), "{chosen}");
}

/// A table of all slots of such a cache would take half a gigabyte.
#[test]
fn an_empty_cache_of_100_gb_is_listed_in_little_memory() {
    let dir = TempDir::new().unwrap();
    let cache = zeros(&dir, "cache", 100 << 30);
    overwrite(&cache, 0, &MAGIC.to_le_bytes());
    let limited = r#"ulimit -d 100000; exec "$0" segments "$@""#;
    for option in [None, Some("--json")] {
        let mut command = std::process::Command::new("sh");
        command.args(["-c", limited]).arg(wb_tests::bin("wbdump")).arg(&cache).args(option);
        let outcome = wb_tests::Outcome::of(command);
        assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""), "{:?}", outcome.first_line());
    }
}

#[test]
fn live_and_bad_choose_rows() {
    let dir = TempDir::new().unwrap();
    let cache = small_log(&dir);
    let states = |option: &str| -> Vec<(u64, String)> {
        let rows = json_lines(&wb!("wbdump", "segments", &cache, "--json", option).stdout);
        rows.iter()
            .map(|r| (r["id"].as_u64().unwrap(), r["state"].as_str().unwrap().into()))
            .collect()
    };
    assert_eq!(states("--live"), [(1, "live".into()), (2, "live".into())]);
    assert_eq!(states("--bad"), [(3, "damaged".into())]);
    assert_eq!(wb!("wbdump", "segments", &cache, "--bad", "--live").code, 2);
}

#[test]
fn a_segment_is_shown_with_its_metablocks_even_when_it_is_damaged() {
    let dir = TempDir::new().unwrap();
    let cache = small_log(&dir);
    let whole = wb!("wbdump", "segment", &cache, "1");
    assert!(whole.stdout.lines().any(|line| line.ends_with("1 (valid)")), "{whole:?}");
    let json = wb!("wbdump", "segment", &cache, "3", "--json").json();
    assert_eq!((&json["valid"], &json["length_blocks"]), (&false.into(), &2.into()));
    assert_eq!(json["metablocks"][1]["block"], 7);
    assert_eq!(json["metablocks"][1]["sector"], 56);

    let other_lap = wb!("wbdump", "segment", &cache, "9");
    assert_eq!(
        (other_lap.code, other_lap.stderr.contains("holds segment 1")),
        (1, true),
        "{other_lap:?}"
    );
    let unwritten = wb!("wbdump", "segment", &cache, "5");
    assert_eq!(
        (unwritten.code, unwritten.stderr.contains("never written")),
        (1, true),
        "{unwritten:?}"
    );
    overwrite(&cache, segment_offset(&cache, 3) + 12, &[200]);
    let garbage = wb!("wbdump", "segment", &cache, "3");
    assert_eq!(
        (garbage.code, garbage.stderr.contains("garbage length 200")),
        (1, true),
        "{garbage:?}"
    );
}

#[test]
fn every_version_of_a_block_is_listed_oldest_first() {
    let dir = TempDir::new().unwrap();
    let cache = small_log(&dir);
    let rows = json_lines(&wb!("wbdump", "block", &cache, "7", "--json").stdout);
    let got: Vec<_> = rows
        .iter()
        .map(|r| {
            (
                r["id"].as_u64().unwrap(),
                r["dirty_bits"].as_u64().unwrap(),
                r["state"].as_str().unwrap(),
            )
        })
        .collect();
    assert_eq!(got, [(1, 1, "live"), (2, 3, "live"), (3, 255, "damaged")]);
    let text = wb!("wbdump", "block", &cache, "7", "--data");
    for part in ["6161 6161", "6262 6262", "6363 6363", "aaaaaaaaaaaaaaaa", "\n*\n1000\n"] {
        assert!(text.stdout.contains(part), "{part:?} is not in {text:?}");
    }
    let none = wb!("wbdump", "block", &cache, "12345");
    assert_eq!((none.code, none.first_line()), (0, "the log holds no version of block 12345"));
}

#[test]
fn the_newest_version_that_counts_is_written_out_raw() {
    let dir = TempDir::new().unwrap();
    let cache = small_log(&dir);
    let raw = wb!("wbdump", "block", &cache, "7", "--raw");
    assert_eq!((raw.code, raw.stdout), (0, "b".repeat(4096)));
    let none = wb!("wbdump", "block", &cache, "8", "--raw");
    assert_eq!((none.code, none.stdout.as_str()), (1, ""), "{none:?}");

    let pair = golden("few-1");
    let metablock = &wb!("wbdump", "segment", &pair.cache, "7", "--json").json()["metablocks"][0];
    let at = metablock["data_offset_bytes"].as_u64().unwrap();
    let block = metablock["block"].to_string();
    let dumped = assert_cmd::Command::new(wb_tests::bin("wbdump"))
        .args([Path::new("block"), &pair.cache, block.as_ref(), "--raw".as_ref()])
        .output()
        .unwrap();
    assert!(dumped.stdout == read_at(&pair.cache, at, 4096));
}

#[test]
fn a_device_without_a_sane_superblock_is_shown_with_a_warning() {
    let dir = TempDir::new().unwrap();
    let cache = small_log(&dir);
    overwrite(&cache, 0, &[0; 4]);
    write_record(&cache, u64::MAX);
    for verb in ["super", "segments"] {
        let outcome = wb!("wbdump", verb, &cache);
        assert_eq!(outcome.code, 0, "{outcome:?}");
        assert_eq!(outcome.stderr.lines().count(), 2, "{outcome:?}");
        assert!(outcome.stderr.contains("not a cache device"), "{outcome:?}");
        assert!(outcome.stderr.contains("record at byte 1048064 is garbage"), "{outcome:?}");
    }
    assert_eq!(wb!("wbdump", "super", &cache, "--json").json()["live_segments"], 2);
}

#[test]
fn a_superblock_of_which_a_block_cannot_be_read_is_shown_without_it() {
    needs_serving!();
    let volume = Volume::created(8, 4 << 20);
    let cache = FailingFile::over(&volume.cache, &volume.path("failing"));
    for (offset, why) in [
        (SUPERBLOCK_OFFSET, "at byte 0 failed"),
        (
            EXTENSION_OFFSETS[0],
            "one copy of two: a superblock extension that the device cannot read",
        ),
        (
            EXTENSION_OFFSETS[1],
            "one copy of two: a superblock extension that the device cannot read",
        ),
        (RECORD_BLOCK_OFFSET, "at byte 1044480 failed"),
    ] {
        cache.fail(FileFaults { reads: offset..offset + 4096, ..FileFaults::default() });
        let shown = wb!("wbdump", "super", &cache.path, "--json");
        assert_eq!((shown.code, shown.stderr.lines().count()), (0, 1), "{shown:?}");
        assert!(shown.stderr.contains(why), "{why:?} is not in {shown:?}");
        let (json, is_copy) = (shown.json(), EXTENSION_OFFSETS.contains(&offset));
        assert_eq!(json["extension"]["sound_copies"], if is_copy { 1 } else { 2 }, "{json}");
        assert_eq!(json["record_segment"].is_null(), offset == RECORD_BLOCK_OFFSET, "{json}");
        let checked = wb!("wbcheck", &cache.path);
        let sign = if is_copy { "one of the two copies" } else { "failed: " };
        assert_eq!(checked.code, if is_copy { 4 } else { 8 }, "{checked:?}");
        assert!(checked.stdout.contains(sign) || checked.stderr.contains(sign), "{checked:?}");
        let identity = wb!("wbdump", "identity", &cache.path);
        assert_eq!(identity.code, i32::from(offset == SUPERBLOCK_OFFSET), "{identity:?}");
    }
}

#[test]
fn a_device_that_was_resized_is_shown_with_a_warning() {
    let dir = TempDir::new().unwrap();
    let cache = small_log(&dir);
    std::fs::File::options().write(true).open(&cache).unwrap().set_len(cache_bytes(5)).unwrap();
    let outcome = wb!("wbdump", "segments", &cache);
    assert_eq!((outcome.code, outcome.stderr.lines().count()), (0, 1), "{outcome:?}");
    assert!(outcome.stderr.contains("truncated or resized"), "{outcome:?}");
}

#[test]
fn dirty_blocks_are_listed_with_their_newest_live_version() {
    let dir = TempDir::new().unwrap();
    let cache = small_log(&dir);
    let rows = json_lines(&wb!("wbdump", "blocks", &cache, "--json").stdout);
    let shown: Vec<_> = rows
        .iter()
        .map(|r| {
            [&r["block"], &r["id"], &r["dirty_bits"], &r["versions"]].map(|n| n.as_u64().unwrap())
        })
        .collect();
    assert_eq!(shown, [[7, 2, 3, 2], [9, 1, 255, 1]]);
    let text = wb!("wbdump", "blocks", &cache);
    assert_eq!((text.code, text.stdout.lines().count()), (0, 3), "{text:?}");
}

#[test]
fn a_map_shows_the_state_of_each_segment_in_characters_and_as_a_picture() {
    let dir = TempDir::new().unwrap();
    let cache = small_log(&dir);
    let before = sha256(&cache);
    let text = wb!("wbdump", "map", &cache);
    assert_eq!((text.code, text.stdout.lines().nth(1)), (0, Some("█▶X·····")), "{text:?}");
    assert!(text.stdout.contains("2 blocks dirty, 8 KiB"), "{text:?}");
    let picture = dir.path().join("map.svg");
    let drawn = wb!("wbdump", "map", &cache, "--svg", &picture);
    assert_eq!((drawn.code, drawn.stdout.as_str()), (0, ""), "{drawn:?}");
    let svg = std::fs::read_to_string(&picture).unwrap();
    assert!(svg.contains("damaged: 1") && svg.contains("recovery point: segment 2"), "{svg}");
    assert_eq!(sha256(&cache), before);
    let nowhere = wb!("wbdump", "map", &cache, "--svg", dir.path().join("no/map.svg"));
    assert!(nowhere.code == 1 && nowhere.stderr.contains("cannot write"), "{nowhere:?}");
}

#[test]
fn the_map_and_the_totals_mean_the_same_by_the_same_word() {
    let dir = TempDir::new().unwrap();
    let cache = small_log(&dir);
    write_segment(&cache, 4, &[entry(9, 0xff)], b'd');
    let totals = wb!("wbdump", "super", &cache);
    let rows: Vec<Vec<&str>> =
        totals.stdout.lines().map(|line| line.split_whitespace().collect()).collect();
    for row in [["newest", "segment", "4"], ["recovery", "point", "2"]] {
        assert!(rows.iter().any(|words| words[..] == row), "{totals:?}");
    }
    let map = wb!("wbdump", "map", &cache);
    assert!(map.stdout.contains("  ▶ recovery point segment 2"), "{map:?}");
    assert!(!map.stdout.contains("newest"), "{map:?}");
}
