//! `wbcheck --repair`: what a power cut or wear has left is put right, and no data is given up.

use libwb::device::IoBuf;
use libwb::format::{
    BlockNo, DirtyBits, EXTENSION_OFFSETS, Metablock, SegmentId, SuperblockExtension, to_u64,
};
use nix::libc::O_DIRECT;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use wb_tests::sim::module;
use wb_tests::{
    GOLDEN, MIB, Outcome, Volume, flip_bit, golden_volume_sha256, needs_serving, noise, overwrite,
    read_at, segment_offset, sha256, wb, write_record, write_segment,
};

fn check(cache: &Path) -> Outcome {
    wb!("wbcheck", cache)
}

/// Repairs a device that needs it, and checks that nothing is left to do, and that the volume is
/// the same.
fn repairs(volume: &Volume, written: &str) {
    let twin = Volume::blank(1, 1 << 20);
    std::fs::copy(&volume.cache, &twin.cache).expect("room for an image");
    std::fs::copy(&volume.backing, &twin.backing).expect("room for an image");
    let outcome = wb!("wbcheck", &volume.cache, "--repair");
    assert_eq!(outcome.code, 1, "{outcome:?}");
    assert_eq!(
        outcome.first_line(),
        format!("{}: repaired, and sound now", volume.cache.display())
    );
    assert!(outcome.stdout.contains(written), "{written:?} is not in {outcome:?}");
    assert_eq!(check(&volume.cache).first_line(), format!("{}: sound", volume.cache.display()));
    let repaired = sha256(&volume.cache);
    assert_eq!(wb!("wbcheck", &volume.cache, "--repair").code, 0, "nothing is left");
    assert_eq!(sha256(&volume.cache), repaired);
    for pair in [volume, &twin] {
        pair.must(&[&["replay"], &pair.pair()[..]].concat());
    }
    assert_eq!(sha256(&volume.backing), sha256(&twin.backing), "the volume has changed");
}

#[test]
fn a_sound_device_is_left_as_it_is() {
    for name in GOLDEN {
        let volume = Volume::golden(name);
        if ["sbrecord-1", "cleaned-1"].contains(&name) {
            // With a record, the kernel module may take old data for new from its own devices, too.
            repairs(&volume, "from which the kernel module may take old data for new");
            continue;
        }
        let before = sha256(&volume.cache);
        let outcome = wb!("wbcheck", &volume.cache, "--repair", "--backing", &volume.backing);
        assert_eq!((outcome.code, sha256(&volume.cache)), (0, before), "{name}: {outcome:?}");
    }
}

#[test]
fn the_first_bytes_of_a_cache_are_written_anew() {
    for torn in [false, true] {
        let volume = Volume::created(8, 16 * MIB);
        let sound = std::fs::read(&volume.cache).unwrap();
        overwrite(&volume.cache, 0, &[0x5a; 512]);
        if torn {
            write_record(&volume.cache, u64::MAX);
        }
        let refused = check(&volume.cache);
        assert!(refused.code == 8 && refused.stderr.contains("wbcheck --repair"), "{refused:?}");
        let repaired = wb!("wbcheck", &volume.cache, "--repair");
        assert!(repaired.stdout.contains("  - the magic, in the first block"), "{repaired:?}");
        assert_eq!(repaired.code, if torn { 4 } else { 1 }, "{repaired:?}");
        assert!(torn || std::fs::read(&volume.cache).unwrap() == sound);
    }
    let lost = Volume::created(8, 16 * MIB);
    overwrite(&lost.cache, 0, &[0x5a; 512]);
    let json = wb!("wbcheck", &lost.cache, "--repair", "--json").json();
    assert_eq!(json["repair"]["verdict_before"], "damaged");
}

#[test]
fn what_was_put_on_a_cache_is_not_written_over() {
    let volume = Volume::created(8, 16 * MIB);
    // An MBR partition table.
    overwrite(&volume.cache, 0, &[0; 512]);
    overwrite(&volume.cache, 446, &[0, 0, 2, 0, 0x83, 0, 3, 0, 1, 0, 0, 0, 64, 0, 0, 0]);
    overwrite(&volume.cache, 510, &[0x55, 0xaa]);
    let before = sha256(&volume.cache);
    let refused = wb!("wbcheck", &volume.cache, "--repair");
    assert!(refused.code == 8 && refused.stderr.contains("wipefs"), "{refused:?}");
    assert_eq!(sha256(&volume.cache), before);
}

#[test]
fn what_a_power_cut_left_is_put_right() {
    let torn = Volume::golden("few-1");
    flip_bit(&torn.cache, segment_offset(&torn.cache, 7) + 4096);
    repairs(&torn, "zeros over slot 6");

    let overwritten = Volume::golden("lapped-1");
    overwrite(&overwritten.cache, segment_offset(&overwritten.cache, 34) + 512, &[0x5a; 9000]);
    repairs(&overwritten, "the superblock record: segment 34 is the last written back");

    let hole = Volume::golden("few-1");
    let block = Metablock { block: BlockNo(3), dirty: DirtyBits(0xff), crc: None, lost: false };
    write_segment(&hole.cache, 9, &[block], 1);
    repairs(&hole, "zeros over slot 8");
}

#[test]
fn rot_in_what_is_written_back_is_written_over() {
    let volume = Volume::golden("sbrecord-1");
    flip_bit(&volume.cache, segment_offset(&volume.cache, 3) + 4096);
    assert_eq!(check(&volume.cache).code, 4);
    repairs(&volume, "empty segments in the places of segment 3");
}

#[test]
fn a_damaged_copy_of_the_superblock_extension_is_found_and_restored() {
    for copy in EXTENSION_OFFSETS {
        let volume = Volume::created(8, 4 << 20);
        flip_bit(&volume.cache, copy + 70);
        let found = check(&volume.cache);
        assert_eq!(
            (found.code, found.stdout.contains("one of the two copies")),
            (4, true),
            "{found:?}"
        );
        repairs(&volume, "the damaged copy of the superblock extension");
    }
}

/// As a power cut leaves a page whose write was under way at detach: its first sector is the old
/// one or the new.
#[test]
fn a_torn_copy_of_the_superblock_extension_is_no_error_and_is_restored() {
    for first_is_new in [false, true] {
        let volume = Volume::created(8, 4 << 20);
        let old = read_at(&volume.cache, EXTENSION_OFFSETS[0], 4096);
        let page = SuperblockExtension::decode(old.first_chunk().unwrap()).expect("a sound page");
        let next = SuperblockExtension { generation: 2, clean: Some(SegmentId(3)), ..page };
        let mut block = [0; 4096];
        next.encode(&mut block);
        let part = if first_is_new { 0..512 } else { 512..4096 };
        overwrite(&volume.cache, EXTENSION_OFFSETS[0] + to_u64(part.start), &block[part]);
        let found = check(&volume.cache);
        assert_eq!(
            (found.code, found.stdout.contains("extension is torn")),
            (0, true),
            "{found:?}"
        );
        assert!(found.first_line().contains("sound after a power cut"), "{found:?}");
        let json = wb!("wbcheck", &volume.cache, "--json").json();
        let [damaged, torn] =
            ["superblock_copy_damaged", "superblock_copy_torn"].map(|name| &json[name]);
        assert_eq!((damaged, torn), (&false.into(), &true.into()), "{json}");
        let shown = wb!("wbdump", "super", &volume.cache);
        assert!(shown.stderr.contains("torn by a power cut"), "{shown:?}");
        repairs(&volume, "the torn copy of the superblock extension");
    }
}

#[test]
fn a_segment_that_is_cut_short_is_closed_with_the_last_commit_that_stands() {
    needs_serving!();
    let volume = Volume::created(8, 4 << 20);
    let mut attached = volume.attach();
    let device = std::fs::File::options().write(true).open(&attached.device).unwrap();
    for nth in 0..3 {
        device.write_all_at(&noise(nth, 4096), 8192 * nth).unwrap();
        device.sync_all().unwrap();
    }
    attached.kill();
    drop((device, attached));
    assert_eq!(check(&volume.cache).first_line(), format!("{}: sound", volume.cache.display()));
    // What the last commit added, and had not been flushed when the power went.
    flip_bit(&volume.cache, segment_offset(&volume.cache, 1) + 3 * 4096);
    let found = check(&volume.cache);
    assert!(found.code == 0 && found.stdout.contains("Segment 1 is cut short"), "{found:?}");
    let one = wb!("wbcheck", &volume.cache, "--segment", "1");
    assert!(one.code == 0 && one.stdout.contains("up to the last flush"), "{one:?}");
    for shown in
        [wb!("wbdump", "segments", &volume.cache), wb!("wbdump", "segment", &volume.cache, "1")]
    {
        assert!(
            shown.stdout.contains("up to its last flush; what came after is torn"),
            "{shown:?}"
        );
    }
    repairs(&volume, "the header of segment 1, which ends with the last flush");
    let kept = read_at(&volume.backing, 0, 5 * 4096);
    assert!(kept[..4096] == noise(0, 4096) && kept[8192..][..4096] == noise(1, 4096));
    assert!(kept[4 * 4096..] == [0; 4096]);
}

/// Without the repair, the kernel module would show older data than was flushed.
#[test]
fn after_a_crash_the_kernel_module_reads_the_volume_from_what_a_repair_leaves() {
    needs_serving!();
    let volume = Volume::created(8, MIB);
    let attached = volume.attach();
    // Past the page cache, which would make whole blocks of it.
    let write = |device: &Path, seed, bytes| {
        let device =
            std::fs::File::options().write(true).custom_flags(O_DIRECT).open(device).unwrap();
        device.write_all_at(&IoBuf::copy_of(&noise(seed, bytes)), 0).unwrap();
        device.sync_all().unwrap();
        volume.must(&["drain", &volume.name]);
    };
    write(&attached.device, 1, 4096);
    write(&attached.device, 2, 512);
    let want = [&noise(2, 512)[..], &noise(1, 4096)[512..]].concat();
    attached.crash();
    let for_module = || {
        let [cache, backing] =
            [&volume.cache, &volume.backing].map(|path| std::fs::read(path).unwrap());
        module::volume(&cache, backing).unwrap()[..4096] == want
    };
    assert!(!for_module());
    let found = check(&volume.cache);
    assert_eq!(found.first_line(), format!("{}: sound", volume.cache.display()), "{found:?}");
    assert!(found.stdout.contains("The kernel module may take old data in segment 1"), "{found:?}");
    assert_eq!(
        wb!("wbcheck", &volume.cache, "--json").json()["misleading_segments"],
        serde_json::json!([1])
    );
    let outcome = wb!("wbcheck", &volume.cache, "--repair");
    assert!(
        outcome.code == 1
            && outcome.stdout.contains("empty segments in the places of segment 1, from"),
        "{outcome:?}"
    );
    assert!(for_module());
    assert!(!check(&volume.cache).stdout.contains("kernel module"));

    // A detach leaves nothing to repair.
    let attached = volume.attach();
    write(&attached.device, 3, 512);
    attached.detach(&[]);
    let before = sha256(&volume.cache);
    assert_eq!(
        (wb!("wbcheck", &volume.cache, "--repair").code, sha256(&volume.cache)),
        (0, before)
    );
}

#[test]
fn a_corrupt_log_needs_salvage_and_is_left_as_it_is_without() {
    let volume = Volume::golden("few-1");
    flip_bit(&volume.cache, segment_offset(&volume.cache, 3) + 4096);
    let before = sha256(&volume.cache);
    let outcome = wb!("wbcheck", &volume.cache, "--repair");
    assert_eq!((outcome.code, outcome.stdout.contains("--salvage=skip")), (4, true), "{outcome:?}");
    assert_eq!(sha256(&volume.cache), before);
    let report = wb!("wbcheck", &volume.cache, "--repair", "--salvage=stop", "--json");
    let json = report.json();
    assert_eq!((report.code, &json["verdict"]), (1, &"sound".into()), "{json}");
    assert_eq!(
        json["repair"]["salvage"]["segments_given_up"],
        serde_json::json!([3, 4, 5, 6, 7]),
        "{json}"
    );
    assert_eq!(json["repair"]["verdict_before"], "corrupt", "{json}");
    volume.must(&[&["replay"], &volume.pair()[..]].concat());
}

#[test]
fn with_quiet_the_verdict_alone_is_printed_when_errors_are_left() {
    let volume = Volume::created(8, 4 << 20);
    let beyond =
        Metablock { block: BlockNo(1 << 20), dirty: DirtyBits(0xff), crc: None, lost: false };
    write_segment(&volume.cache, 1, &[beyond], 1);
    flip_bit(&volume.cache, EXTENSION_OFFSETS[0] + 70);
    let outcome = wb!("wbcheck", "--repair", "--quiet", &volume.cache);
    assert_eq!((outcome.code, outcome.stdout.lines().count()), (4, 1), "{outcome:?}");
    assert!(outcome.stdout.contains("CORRUPT: segment 1 holds data for sector"), "{outcome:?}");
    assert!(
        !check(&volume.cache).stdout.contains("one of the two copies"),
        "the copy was repaired"
    );
}

#[test]
fn a_record_that_is_garbage_is_salvaged_without_loss() {
    let volume = Volume::golden("few-1");
    write_record(&volume.cache, u64::MAX);
    assert_eq!(wb!("wbcheck", &volume.cache, "--repair").code, 4);
    let outcome = wb!("wbcheck", &volume.cache, "--repair", "--salvage");
    assert_eq!(
        (outcome.code, outcome.stdout.contains("It gives up nothing")),
        (1, true),
        "{outcome:?}"
    );
    volume.must(&[&["replay"], &volume.pair()[..]].concat());
    assert_eq!(sha256(&volume.backing), golden_volume_sha256("few-1"));
}

#[test]
fn a_device_that_is_attached_is_not_repaired() {
    needs_serving!();
    let volume = Volume::created(8, 4 << 20);
    let attached = volume.attach();
    let outcome = wb!("wbcheck", &volume.cache, "--repair");
    assert_eq!((outcome.code, outcome.stderr.contains("in use")), (8, true), "{outcome:?}");
    attached.detach(&[]);
}
