//! Checking cache devices: sound ones, ones that lost power, damaged ones, and what is none.

use std::fs::OpenOptions;
use std::path::Path;
use tempfile::TempDir;
use wb_tests::{
    GOLDEN, Golden, MIB, Outcome, Volume, cache_bytes, entry, flip_bit, golden, needs_serving,
    noise, overwrite, run, segment_offset, sha256, skip, system, wb, write_record, write_segment,
    zeros,
};

/// Checks a device as text and as JSON, and makes sure that neither changed it and both agree.
fn check(cache: &Path) -> Outcome {
    let before = sha256(cache);
    let text = wb!("wbcheck", cache);
    let json = wb!("wbcheck", cache, "--json");
    assert_eq!(sha256(cache), before, "the device was changed");
    assert_eq!(text.code, json.code);
    let in_words = match json.json()["verdict"].as_str().expect("a verdict") {
        "sound" => ": sound",
        "sound-after-power-cut" => ": sound after a power cut",
        "damaged" => ": DAMAGED, but no data is at risk",
        "corrupt" => ": CORRUPT: ",
        other => panic!("{other}"),
    };
    assert!(text.first_line().starts_with(&format!("{}{in_words}", cache.display())), "{text:?}");
    text
}

fn formatted(dir: &TempDir, segments: u32) -> std::path::PathBuf {
    let cache = zeros(dir, "cache", cache_bytes(segments));
    assert_eq!(wb!("wbformat", &cache).code, 0);
    cache
}

#[test]
fn every_device_of_the_kernel_module_is_sound() {
    for name in GOLDEN {
        let Golden { cache, backing, .. } = &golden(name);
        let before = (sha256(cache), sha256(backing));
        let outcome = wb!("wbcheck", cache, "--backing", backing);
        assert_eq!(outcome.code, 0, "{name}: {outcome:?}");
        assert_eq!(outcome.first_line(), format!("{}: sound", cache.display()));
        assert!(outcome.stderr.is_empty(), "{outcome:?}");
        assert_eq!((sha256(cache), sha256(backing)), before);
    }
}

#[test]
fn the_report_counts_what_is_on_the_device() {
    let pair = golden("sbrecord-1");
    let report = wb!("wbcheck", &pair.cache, "--backing", &pair.backing, "--json").json();
    for (key, want) in [
        ("slots", 14),
        ("slots_valid", 8),
        ("slots_empty", 6),
        ("slots_damaged", 0),
        ("record_segment", 6),
        ("written_back_segment", 6),
        ("recovery_point", 8),
        ("live_segments", 2),
        ("dirty_blocks", 133),
        ("entries_beyond_backing", 0),
    ] {
        assert_eq!(report[key], want, "{key} in {report}");
    }
}

#[test]
fn what_was_durable_was_not_being_written_when_the_power_went() {
    needs_serving!();
    let volume = Volume::created(32, 32 * MIB);
    let attached = volume.attach_with(&["writeback_threshold=0"]);
    overwrite(&attached.device, 0, &noise(1, 6 * MIB));
    attached.detach(&[]);
    flip_bit(&volume.cache, segment_offset(&volume.cache, 3) + 5000);
    overwrite(&volume.cache, segment_offset(&volume.cache, 6) + 1000, &[0xff; 2000]);
    let report = wb!("wbcheck", &volume.cache, "--json").json();
    let damage = report["damage"].as_array().unwrap();
    let found = damage.iter().map(|d| (d["expected_segment"].as_u64(), d["explanation"].as_str()));
    let expected = [3, 6].map(|id| (Some(id), Some("unexplained")));
    assert_eq!(found.collect::<Vec<_>>(), expected, "{report}");
}

#[test]
fn a_torn_newest_segment_is_what_a_power_cut_leaves() {
    let pair = golden("few-1");
    flip_bit(&pair.cache, segment_offset(&pair.cache, 7) + 4096);
    let outcome = check(&pair.cache);
    assert_eq!(outcome.code, 0);
    assert!(outcome.stdout.contains("segment 7 has a wrong checksum"), "{outcome:?}");
    assert!(outcome.stdout.contains("recovery point  segment 6"), "{outcome:?}");
}

#[test]
fn what_follows_a_hole_is_dropped_and_reported() {
    let dir = TempDir::new().unwrap();
    let cache = formatted(&dir, 14);
    for id in [1, 2, 3, 4, 6, 7] {
        write_segment(&cache, id, &[entry(id, 0xff)], 1);
    }
    let outcome = check(&cache);
    assert_eq!(outcome.code, 0);
    assert!(outcome.stdout.contains("After a gap come segments 6 to 7"), "{outcome:?}");
    assert_eq!(
        wb!("wbcheck", &cache, "--json").json()["dropped_segments"],
        serde_json::json!([6, 7])
    );
}

#[test]
fn a_torn_overwrite_of_the_oldest_segment_is_what_a_power_cut_leaves() {
    let pair = golden("lapped-1");
    // Segment 48 was being written over segment 34, and its first sector had not reached the
    // device.
    overwrite(&pair.cache, segment_offset(&pair.cache, 34) + 512, &[0x5a; 9000]);
    let outcome = check(&pair.cache);
    assert_eq!(outcome.code, 0, "{outcome:?}");
    assert!(outcome.stdout.contains("Segment 34 need not be applied"), "{outcome:?}");
}

#[test]
fn rot_in_the_middle_of_the_log_is_an_error_that_names_the_blocks_at_risk() {
    let pair = golden("few-1");
    flip_bit(&pair.cache, segment_offset(&pair.cache, 2) + 8192);
    let outcome = check(&pair.cache);
    assert_eq!(outcome.code, 4);
    for part in [
        "segment 2 is missing or damaged",
        "slot 1 (at byte 1572864): segment 2 has a wrong checksum",
        "At risk",
        "What to do",
    ] {
        assert!(outcome.stdout.contains(part), "{part:?} is not in {outcome:?}");
    }
    let report = wb!("wbcheck", &pair.cache, "--json").json();
    let damage = &report["damage"][0];
    assert_eq!(
        (&damage["data_at_risk"], &damage["explanation"]),
        (&true.into(), &"unexplained".into())
    );
    assert!(!damage["blocks_at_risk"].as_array().unwrap().is_empty());
}

#[test]
fn rot_in_a_segment_that_was_written_back_puts_no_data_at_risk() {
    let pair = golden("sbrecord-1");
    flip_bit(&pair.cache, segment_offset(&pair.cache, 3) + 4096);
    let outcome = check(&pair.cache);
    assert_eq!(outcome.code, 4);
    assert!(outcome.first_line().contains("DAMAGED, but no data is at risk"), "{outcome:?}");
    assert!(outcome.stdout.contains("Its data had been written back"), "{outcome:?}");
}

#[test]
fn garbage_in_a_header_is_found_and_named() {
    let damage: [(u64, &[u8], &str); 4] = [
        (0, &[0xff; 8], "garbage id"),
        (12, &[128], "garbage length 128"),
        (512, &[1], "is no multiple of 8"),
        (0, &[3], "does not belong in this slot"),
    ];
    for (at, bytes, says) in damage {
        let pair = golden("few-1");
        overwrite(&pair.cache, segment_offset(&pair.cache, 2) + at, bytes);
        let outcome = check(&pair.cache);
        assert_eq!((outcome.code, outcome.stdout.contains(says)), (4, true), "{says}: {outcome:?}");
    }
}

#[test]
fn a_record_that_no_log_can_have_reached_is_corruption() {
    for (record, says) in [(u64::MAX, "is garbage"), (99, "says that segment 99 is written back")] {
        let pair = golden("few-1");
        write_record(&pair.cache, record);
        let outcome = check(&pair.cache);
        assert_eq!((outcome.code, outcome.stdout.contains(says)), (4, true), "{outcome:?}");
    }
}

#[test]
fn a_device_that_was_cut_short_is_noticed() {
    let pair = golden("lapped-1");
    OpenOptions::new().write(true).open(&pair.cache).unwrap().set_len(cache_bytes(10)).unwrap();
    let outcome = check(&pair.cache);
    assert_eq!(outcome.code, 4);
    assert!(outcome.stdout.contains("the device was truncated or resized"), "{outcome:?}");
}

#[test]
fn data_beyond_the_end_of_the_backing_device_is_an_error() {
    let dir = TempDir::new().unwrap();
    let cache = formatted(&dir, 14);
    // The last possible block, with only its first sectors dirty; and a clean block, which does not
    // matter.
    write_segment(&cache, 1, &[entry(3, 0x0f), entry(1 << 40, 0)], 1);
    let exact = zeros(&dir, "exact", (3 * 8 + 4) * 512);
    let short = zeros(&dir, "short", (3 * 8 + 3) * 512);
    assert_eq!(wb!("wbcheck", &cache, "--backing", &exact).code, 0);
    let outcome = wb!("wbcheck", &cache, "--backing", &short);
    assert_eq!(outcome.code, 4);
    assert!(outcome.stdout.contains("segment 1 holds data for sector 27"), "{outcome:?}");
    assert!(outcome.stdout.contains("has only 27 sectors"), "{outcome:?}");

    write_segment(&cache, 2, &[entry(u64::MAX / 8, 0x80)], 1);
    let outcome = wb!("wbcheck", &cache, "--backing", &exact);
    assert!(outcome.stdout.contains(&format!("sector {}", u64::MAX)), "{outcome:?}");
    assert_eq!(wb!("wbcheck", &cache, "--segment", "2", "--backing", &exact).code, 4);
    assert_eq!(
        wb!("wbcheck", &cache).code,
        0,
        "without a backing device there is nothing to compare with"
    );
}

#[test]
fn every_tool_names_the_same_sector_beyond_the_end() {
    let dir = TempDir::new().unwrap();
    let cache = zeros(&dir, "cache", cache_bytes(14));
    assert_eq!(wb!("wbformat", "--compat", &cache).code, 0);
    write_segment(&cache, 1, &[entry(1, 0xff), entry(3, 0xff), entry(9, 0xff)], 1);
    let backing = zeros(&dir, "backing", (3 * 8 + 3) * 512);
    let pair = |verb: &'static str| {
        run(
            "wbctl",
            [
                verb.as_ref(),
                "--cache".as_ref(),
                cache.as_os_str(),
                "--backing".as_ref(),
                backing.as_ref(),
            ],
        )
    };
    for outcome in [wb!("wbcheck", &cache, "--backing", &backing), pair("replay"), pair("upgrade")]
    {
        let says = format!("{}{}", outcome.stdout, outcome.stderr);
        assert!(
            outcome.code != 0 && says.contains("segment 1 holds data for sector 27, but "),
            "{outcome:?}"
        );
        assert!(says.contains(" has only 27 sectors"), "{outcome:?}");
    }
}

#[test]
fn one_segment_is_checked_in_the_light_of_the_others() {
    let pair = golden("few-1");
    let cache = pair.cache.as_path();
    let sound = wb!("wbcheck", cache, "--segment", "2");
    assert_eq!((sound.code, sound.stdout.contains("): sound: ")), (0, true), "{sound:?}");

    let absent = wb!("wbcheck", cache, "--segment", "9");
    assert_eq!(
        (absent.code, absent.stderr.contains("segment 9 is not in the log")),
        (8, true),
        "{absent:?}"
    );

    flip_bit(cache, segment_offset(cache, 7) + 4096);
    let torn = wb!("wbcheck", cache, "--segment", "7");
    assert_eq!((torn.code, torn.stdout.contains("when the power went")), (0, true), "{torn:?}");

    flip_bit(cache, segment_offset(cache, 2) + 4096);
    let rotten = wb!("wbcheck", cache, "--segment", "2");
    assert_eq!((rotten.code, rotten.stdout.contains("CORRUPT")), (4, true), "{rotten:?}");
    assert_eq!(wb!("wbcheck", cache, "--segment", "3", "--json").json()["verdict"], "sound");
}

#[test]
fn headers_only_does_not_notice_rot_in_data_and_says_so() {
    let pair = golden("few-1");
    flip_bit(&pair.cache, segment_offset(&pair.cache, 2) + 4096);
    let outcome = wb!("wbcheck", &pair.cache, "--headers-only");
    assert_eq!(
        (outcome.code, outcome.stdout.contains("not read (--headers-only)")),
        (0, true),
        "{outcome:?}"
    );
    overwrite(&pair.cache, segment_offset(&pair.cache, 2) + 12, &[255]);
    assert_eq!(wb!("wbcheck", &pair.cache, "--headers-only").code, 4);
}

#[test]
fn quiet_prints_only_what_is_wrong() {
    let pair = golden("few-1");
    let sound = wb!("wbcheck", &pair.cache, "--quiet");
    assert_eq!((sound.code, sound.stdout.as_str(), sound.stderr.as_str()), (0, "", ""));
    flip_bit(&pair.cache, segment_offset(&pair.cache, 2) + 4096);
    let corrupt = wb!("wbcheck", &pair.cache, "--quiet");
    assert_eq!((corrupt.code, corrupt.stdout.lines().count()), (4, 1), "{corrupt:?}");
}

#[test]
fn what_is_no_cache_device_cannot_be_checked() {
    let dir = TempDir::new().unwrap();
    let file = zeros(&dir, "disk", 8 << 20);
    let outcome = run("wbcheck", [&file]);
    assert_eq!(
        (outcome.code, outcome.stderr.contains("not a cache device")),
        (8, true),
        "{outcome:?}"
    );
    let cache = formatted(&dir, 3);
    overwrite(&cache, 0, &[0; 512]);
    let was_one = wb!("wbcheck", &cache);
    assert_eq!(
        (was_one.code, was_one.stderr.contains("yet it was formatted as one, so its first bytes")),
        (8, true),
        "{was_one:?}"
    );

    let pair = golden("few-1");
    let same = wb!("wbcheck", &pair.cache, "--backing", &pair.cache);
    assert_eq!((same.code, same.stderr.contains("are the same device")), (8, true), "{same:?}");
    let missing = wb!("wbcheck", &pair.cache, "--backing", "/no/such/file");
    assert_eq!((missing.code, missing.stderr.contains("/no/such/file")), (8, true), "{missing:?}");
}

#[test]
fn a_filesystem_that_is_there_instead_of_a_cache_is_named() {
    let dir = TempDir::new().unwrap();
    let file = zeros(&dir, "filesystem", 8 << 20);
    if system("mkfs.ext4", &["-q", "-F", file.to_str().unwrap()]).is_none() {
        skip!("no mkfs.ext4");
    }
    let outcome = wb!("wbcheck", &file);
    assert_eq!((outcome.code, outcome.stderr.lines().count()), (8, 1), "{outcome:?}");
    assert!(outcome.stderr.ends_with("it holds: ext4 filesystem\n"), "{outcome:?}");
}
