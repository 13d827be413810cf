//! Making cache devices.

use libwb::format::SUPERBLOCK_REGION_BYTES;
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;
use wb_tests::{
    LoopDevice, MIB, Outcome, Volume, bin, cache_bytes, flip_bit, golden, golden_bytes, noise,
    overwrite, run, segment_offset, sha256, skip, system, wb, write_record, zeros,
};

#[test]
fn a_new_cache_of_the_base_format_is_bit_for_bit_what_the_kernel_module_makes() {
    let dir = TempDir::new().unwrap();
    let want = golden_bytes("fresh", "cache.img");
    let file = zeros(&dir, "cache", u64::try_from(want.len()).unwrap());
    let outcome = wb!("wbformat", &file, "--compat");
    assert_eq!(outcome.code, 0, "{outcome:?}");
    assert!(
        outcome.first_line().ends_with("formatted as a cache of 7 MiB (14 segments of 512 KiB)")
    );
    assert!(std::fs::read(&file).unwrap() == want);
}

#[test]
fn the_extension_changes_nothing_that_the_kernel_module_reads() {
    let dir = TempDir::new().unwrap();
    let want = golden_bytes("fresh", "cache.img");
    let file = zeros(&dir, "cache", u64::try_from(want.len()).unwrap());
    assert_eq!(run("wbformat", [&file]).code, 0);
    let content = std::fs::read(&file).unwrap();
    // The kernel module reads the first block, the first eight bytes of the record's sector, and
    // the segments.
    let record = (1 << 20) - 512;
    for range in [0..64 << 10, 132 << 10..record + 8, 1 << 20..want.len()] {
        assert!(content[range.clone()] == want[range]);
    }
}

#[test]
fn identity_and_pairing_are_kept_and_another_backing_device_is_refused() {
    let dir = TempDir::new().unwrap();
    let (cache, backing) = (zeros(&dir, "cache", 8 << 20), zeros(&dir, "backing", 16 << 20));
    let uuid = "6d3c2f52-7bb5-4a5e-9d3f-0123456789ab";
    let outcome =
        wb!("wbformat", &cache, "--backing", &backing, "--label", "data", "--uuid", uuid, "--json");
    assert_eq!(outcome.json()["uuid"], uuid);
    let shown = wb!("wbdump", "super", &cache, "--json").json();
    let extension = &shown["extension"];
    assert_eq!((&extension["uuid"], &extension["label"]), (&uuid.into(), &"data".into()));
    assert_eq!(extension["backing_sectors"], 32768);

    let other = zeros(&dir, "other", 17 << 20);
    let before = sha256(&cache);
    for outcome in [
        wb!("wbcheck", &cache, "--backing", &other),
        wb!("wbctl", "replay", "--cache", &cache, "--backing", &other),
    ] {
        assert_ne!(outcome.code, 0);
        assert!(outcome.stderr.contains("belongs to another backing device"), "{outcome:?}");
    }
    assert_eq!(sha256(&cache), before);
}

#[test]
fn a_cache_device_that_was_truncated_or_resized_is_refused() {
    let dir = TempDir::new().unwrap();
    let (cache, backing) = (zeros(&dir, "cache", 8 << 20), zeros(&dir, "backing", 16 << 20));
    assert_eq!(run("wbformat", [&cache]).code, 0);
    for size in [7 << 20, 9 << 20] {
        std::fs::OpenOptions::new().write(true).open(&cache).unwrap().set_len(size).unwrap();
        let outcome = wb!("wbctl", "replay", "--cache", &cache, "--backing", &backing);
        assert_eq!(outcome.code, 1);
        assert!(outcome.stderr.contains("truncated or resized"), "{outcome:?}");
        assert_eq!(run("wbcheck", [&cache]).code, 8);
    }
}

#[test]
fn what_contradicts_itself_is_a_usage_error() {
    let long = "x".repeat(65);
    assert_eq!(wb!("wbformat", "cache", "--compat", "--label", "data").code, 2);
    assert_eq!(wb!("wbformat", "cache", "--label", &long).code, 2);
    assert_eq!(wb!("wbformat", "cache", "--uuid", "seven").code, 2);
}

#[test]
fn a_cache_without_dirty_blocks_may_be_formatted_again() {
    for name in ["fresh", "cleaned-1", "readcache-1", "around-1"] {
        let pair = golden(name);
        assert_eq!(run("wbformat", [&pair.cache]).code, 0, "{name}");
        assert_eq!(wb!("wbcheck", &pair.cache, "--json").json()["slots_empty"], 14);
    }
}

#[test]
fn dirty_blocks_are_given_up_only_when_that_is_asked_for() {
    let pair = golden("few-1");
    let before = sha256(&pair.cache);
    for options in [&[][..], &["--force"], &["--compat"], &["--dry-run"]] {
        let cache = pair.cache.to_str().unwrap();
        let outcome = run("wbformat", [&[cache], options].concat());
        assert_eq!(outcome.code, 1, "{outcome:?}");
        assert!(outcome.stderr.contains("a cache with 334 dirty blocks"), "{outcome:?}");
        assert!(outcome.stderr.contains("--discard-dirty"), "{outcome:?}");
        assert_eq!(sha256(&pair.cache), before);
    }
    assert_eq!(wb!("wbformat", &pair.cache, "--discard-dirty").code, 0);
    let checked = wb!("wbcheck", &pair.cache, "--json").json();
    assert_eq!((&checked["verdict"], &checked["slots_empty"]), (&"sound".into(), &14.into()));
}

#[test]
fn a_cache_too_damaged_to_tell_counts_as_dirty() {
    let damage: [fn(&std::path::Path); 2] = [
        |cache| flip_bit(cache, segment_offset(cache, 2) + 5000),
        |cache| write_record(cache, u64::MAX),
    ];
    for damage in damage {
        let pair = golden("few-1");
        damage(&pair.cache);
        let before = sha256(&pair.cache);
        let outcome = wb!("wbformat", &pair.cache, "--force");
        assert_eq!(
            (outcome.code, outcome.stderr.contains("too damaged to tell")),
            (1, true),
            "{outcome:?}"
        );
        assert_eq!(sha256(&pair.cache), before);
        assert_eq!(wb!("wbformat", &pair.cache, "--discard-dirty").code, 0);
    }
}

#[test]
fn a_cache_whose_first_bytes_are_damaged_is_not_taken_for_garbage() {
    let dir = TempDir::new().unwrap();
    let cache = zeros(&dir, "cache", 16 << 20);
    assert_eq!(wb!("wbformat", &cache).code, 0);
    flip_bit(&cache, 1);
    for options in [&[][..], &["--force"], &["--dry-run"]] {
        let outcome = run("wbformat", [&[cache.to_str().unwrap()], options].concat());
        assert_eq!(
            (outcome.code, outcome.stderr.contains("too damaged to tell")),
            (1, true),
            "{outcome:?}"
        );
    }
    assert_eq!(wb!("wbformat", &cache, "--discard-dirty").code, 0);
}

#[test]
fn a_filesystem_is_formatted_over_only_by_force() {
    let dir = TempDir::new().unwrap();
    let file = zeros(&dir, "disk", 16 << 20);
    if system("mkfs.ext4", &["-q", "-F", "-L", "photos", file.to_str().unwrap()]).is_none() {
        skip!("no mkfs.ext4");
    }
    let before = sha256(&file);
    for options in [&[][..], &["--discard-dirty"], &["--dry-run"]] {
        let outcome = run("wbformat", [&[file.to_str().unwrap()], options].concat());
        assert_eq!(outcome.code, 1);
        assert!(
            outcome.stderr.contains("it holds: ext4 filesystem labelled \"photos\""),
            "{outcome:?}"
        );
        assert!(outcome.stderr.contains("--force"), "{outcome:?}");
        assert_eq!(sha256(&file), before);
    }
    assert_eq!(wb!("wbformat", &file, "--force").code, 0);
    assert_eq!(run("wbformat", [&file]).code, 0, "the filesystem is gone");
}

#[test]
fn a_partition_table_is_noticed() {
    let dir = TempDir::new().unwrap();
    let file = zeros(&dir, "disk", 16 << 20);
    // One partition of type Linux from sector 2048 on, 8192 sectors long.
    overwrite(&file, 446, &[0, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 0x20, 0, 0]);
    overwrite(&file, 510, &[0x55, 0xaa]);
    let outcome = run("wbformat", [&file]);
    assert_eq!(
        (outcome.code, outcome.stderr.contains("dos partition table")),
        (1, true),
        "{outcome:?}"
    );
}

#[test]
fn several_signatures_at_once_are_refused_too() {
    let dir = TempDir::new().unwrap();
    let file = zeros(&dir, "disk", 16 << 20);
    if system("mkfs.ext2", &["-q", "-F", file.to_str().unwrap()]).is_none() {
        skip!("no mkfs.ext2");
    }
    // A swap header shares its version field with the filesystem's inode count.
    overwrite(&file, 1024, &1u32.to_le_bytes());
    overwrite(&file, 4086, b"SWAPSPACE2");
    let outcome = run("wbformat", [&file]);
    assert_eq!(
        (outcome.code, outcome.stderr.contains("signatures of several")),
        (1, true),
        "{outcome:?}"
    );
}

#[test]
fn a_dry_run_says_what_would_be_done_and_does_nothing() {
    let dir = TempDir::new().unwrap();
    let file = zeros(&dir, "cache", cache_bytes(3));
    let before = sha256(&file);
    let outcome = wb!("wbformat", &file, "--dry-run");
    assert_eq!(
        (outcome.code, outcome.stdout.contains("would be formatted")),
        (0, true),
        "{outcome:?}"
    );
    assert_eq!(sha256(&file), before);
    let json = wb!("wbformat", &file, "--dry-run", "--json").json();
    assert_eq!((&json["formatted"], &json["segments"]), (&false.into(), &3.into()));
}

#[test]
fn what_lay_on_the_device_before_is_no_longer_part_of_any_log() {
    let pair = golden("lapped-1");
    write_record(&pair.cache, 5);
    assert_eq!(wb!("wbformat", &pair.cache, "--discard-dirty", "--compat").code, 0);
    let content = std::fs::read(&pair.cache).unwrap();
    let region = usize::try_from(SUPERBLOCK_REGION_BYTES).unwrap();
    assert!(content[4..region].iter().all(|&b| b == 0));
    let json = wb!("wbcheck", &pair.cache, "--json").json();
    assert_eq!((&json["newest_segment"], &json["record_segment"]), (&0.into(), &0.into()));
}

#[test]
fn a_block_device_is_formatted_as_a_file_is() {
    let dir = TempDir::new().unwrap();
    let file = zeros(&dir, "disk", 8 << 20);
    let Some(device) = LoopDevice::attach(&file) else { skip!("cannot attach a loop device") };
    let outcome = wb!("wbformat", &device.path, "--compat");
    assert_eq!(outcome.code, 0, "{outcome:?}");
    assert_eq!(run("wbcheck", [&device.path]).code, 0);
    assert!(std::fs::read(&device.path).unwrap() == golden_bytes("fresh", "cache.img"));
}

#[test]
fn a_mounted_device_is_in_use() {
    let dir = TempDir::new().unwrap();
    let file = zeros(&dir, "disk", 16 << 20);
    let Some(device) = LoopDevice::attach(&file) else { skip!("cannot attach a loop device") };
    let path = device.path.to_str().unwrap();
    let mount = dir.path().join("mount");
    std::fs::create_dir(&mount).unwrap();
    let mounted = system("mkfs.ext4", &["-q", "-F", path])
        .and_then(|_| system("mount", &[path, mount.to_str().unwrap()]));
    if mounted.is_none() {
        skip!("cannot make and mount a filesystem");
    }
    let outcomes = [run("wbformat", [path, "--force", "--discard-dirty"]), run("wbcheck", [path])];
    system("umount", &[mount.to_str().unwrap()]).expect("a filesystem to unmount");
    for (outcome, code) in outcomes.iter().zip([1, 8]) {
        assert_eq!((outcome.code, outcome.stderr.contains("in use")), (code, true), "{outcome:?}");
    }
}

#[test]
fn a_device_of_a_recorded_volume_is_formatted_only_by_force() {
    let volume = Volume::created(8, 8 * MIB);
    let link = volume.path("link");
    std::os::unix::fs::symlink(&volume.cache, &link).unwrap();
    let format = |device: &Path, more: &[&str]| {
        let mut command = Command::new(bin("wbformat"));
        command.arg(device).args(more).env("WB_CONFIG_DIR", volume.path("config"));
        Outcome::of(command)
    };
    let before = volume.images();
    for device in [&volume.cache, &volume.backing, &link] {
        for options in [&[][..], &["--discard-dirty"], &["--dry-run"]] {
            let refused = format(device, options);
            let whose = format!("refused: it belongs to the volume '{}'", volume.name);
            assert_eq!((refused.code, refused.stderr.contains(&whose)), (1, true), "{refused:?}");
            assert!(
                refused.stderr.contains("wbctl remove") && refused.stderr.contains("--force"),
                "{refused:?}"
            );
        }
    }
    assert_eq!(volume.images(), before);
    assert_eq!(format(&link, &["--force"]).code, 0);
    assert_ne!(volume.images()[0], before[0]);
    std::fs::write(volume.path("config/other.toml"), "cache = 7").unwrap();
    volume.must(&["remove", &volume.name]);
    assert_eq!(format(&volume.cache, &[]).code, 0, "a record that cannot be read names no device");
}

#[test]
fn a_cache_whose_first_mib_was_zeroed_is_not_taken_for_garbage() {
    let region = usize::try_from(SUPERBLOCK_REGION_BYTES).unwrap();
    let extended = golden("few-1");
    assert_eq!(
        wb!("wbctl", "upgrade", "--cache", &extended.cache, "--backing", &extended.backing).code,
        0
    );
    for pair in [golden("few-1"), golden("lapped-1"), extended] {
        for fill in [0, 0xff] {
            overwrite(&pair.cache, 0, &vec![fill; region]);
            let before = sha256(&pair.cache);
            for options in [&[][..], &["--force"], &["--dry-run"], &["--compat"]] {
                let refused = run("wbformat", [&[pair.cache.to_str().unwrap()], options].concat());
                let why = "its segments are still there, such as segment ";
                assert_eq!((refused.code, refused.stderr.contains(why)), (1, true), "{refused:?}");
                assert!(refused.stderr.contains("--discard-dirty"), "{refused:?}");
            }
            assert_eq!(sha256(&pair.cache), before);
        }
        assert_eq!(wb!("wbformat", &pair.cache, "--discard-dirty").code, 0);
        overwrite(&pair.cache, 0, &vec![0; region]);
        assert_eq!(wb!("wbformat", &pair.cache).code, 0, "it is empty");
    }
}

#[test]
fn a_disk_full_of_anything_else_is_formatted_unasked() {
    let dir = TempDir::new().unwrap();
    let disk = zeros(&dir, "disk", cache_bytes(20));
    for content in [noise(7, cache_bytes(20)), vec![0xff; 64 << 10]] {
        overwrite(&disk, 0, &content);
        assert_eq!(wb!("wbformat", &disk).code, 0);
        overwrite(&disk, 0, &vec![0; 1 << 20]);
    }
}
