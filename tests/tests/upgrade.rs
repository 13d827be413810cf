//! `wbctl upgrade`: a device of the kernel module gets wb's extension, and keeps its volume.

use libwb::format::{BlockNo, DirtyBits, Metablock};
use std::os::unix::fs::FileExt;
use wb_tests::{
    GOLDEN, Outcome, Volume, flip_bit, golden_volume_sha256, needs_serving, noise, overwrite,
    segment_offset, sha256, sha256_direct, wb, write_segment, zeros,
};

fn upgrade(volume: &Volume, more: &[&str]) -> Outcome {
    volume.wbctl(&[&["upgrade"], &volume.pair()[..], more].concat())
}

fn refuses(volume: &Volume, why: &str) {
    let before = volume.images();
    let outcome = upgrade(volume, &[]);
    assert_eq!(
        (outcome.code, outcome.stderr.contains(why)),
        (1, true),
        "{why:?} is not in {outcome:?}"
    );
    assert_eq!(volume.images(), before);
}

#[test]
fn every_device_of_the_kernel_module_can_be_upgraded_and_keeps_its_volume() {
    for name in GOLDEN {
        let volume = Volume::golden(name);
        let before = sha256(&volume.cache);
        let dry = upgrade(&volume, &["--dry-run"]);
        assert_eq!((dry.code, sha256(&volume.cache)), (0, before), "{name}: {dry:?}");
        let outcome = upgrade(&volume, &["--label", "attic"]);
        assert_eq!(outcome.code, 0, "{name}: {outcome:?}");
        assert!(
            outcome.stdout.contains("paired with a backing device of 32768 sectors"),
            "{outcome:?}"
        );
        let check = wb!("wbcheck", &volume.cache, "--backing", &volume.backing);
        assert_eq!(
            (check.code, check.first_line()),
            (0, format!("{}: sound", volume.cache.display()).as_str())
        );
        assert!(wb!("wbdump", "super", &volume.cache).stdout.contains("attic"));
        refuses(&volume, "nothing to upgrade");
        volume.must(&[&["replay"], &volume.pair()[..]].concat());
        assert_eq!(sha256(&volume.backing), golden_volume_sha256(name), "{name}");
    }
}

#[test]
fn a_device_that_lost_power_is_settled_first() {
    let volume = Volume::golden("lapped-1");
    overwrite(&volume.cache, segment_offset(&volume.cache, 34) + 512, &[0x5a; 9000]);
    let twin = Volume::golden("lapped-1");
    std::fs::copy(&volume.cache, &twin.cache).unwrap();
    let outcome = upgrade(&volume, &[]);
    assert!(outcome.stdout.contains("segment 34 is the last written back"), "{outcome:?}");
    for pair in [&volume, &twin] {
        pair.must(&[&["replay"], &pair.pair()[..]].concat());
    }
    assert_eq!(sha256(&volume.backing), sha256(&twin.backing));
}

#[test]
fn another_backing_device_is_refused_from_then_on() {
    let mut volume = Volume::golden("few-1");
    assert_eq!(upgrade(&volume, &[]).code, 0);
    volume.backing = zeros(&volume.dir, "other", 32 << 20);
    let outcome = volume.wbctl(&[&["replay"], &volume.pair()[..]].concat());
    assert_eq!(
        (outcome.code, outcome.stderr.contains("belongs to another backing device")),
        (1, true),
        "{outcome:?}"
    );
}

#[test]
fn what_is_corrupt_or_does_not_fit_is_refused() {
    let corrupt = Volume::golden("few-1");
    flip_bit(&corrupt.cache, segment_offset(&corrupt.cache, 3) + 4096);
    refuses(&corrupt, "salvage the log first");
    let far = Volume::golden("fresh");
    let entry =
        Metablock { block: BlockNo(1 << 40), dirty: DirtyBits(0xff), crc: None, lost: false };
    write_segment(&far.cache, 1, &[entry], 1);
    refuses(&far, "is it the right backing device?");
    refuses(&Volume::created(4, 4 << 20), "nothing to upgrade");
}

#[test]
fn an_upgraded_volume_is_served_and_written_as_any_other() {
    needs_serving!();
    let volume = Volume::golden("partial-1");
    assert_eq!(upgrade(&volume, &[]).code, 0);
    let attached = volume.attach();
    assert_eq!(sha256_direct(&attached.device), golden_volume_sha256("partial-1"));
    let data = noise(3, 12 << 20);
    let file = std::fs::File::options().write(true).open(&attached.device).unwrap();
    file.write_all_at(&data, 1 << 20).unwrap();
    file.sync_all().unwrap();
    drop(file);
    let served = sha256_direct(&attached.device);
    attached.detach(&[]);
    assert_eq!(wb!("wbcheck", &volume.cache, "--backing", &volume.backing).code, 0);
    volume.must(&[&["replay"], &volume.pair()[..]].concat());
    assert_eq!(sha256(&volume.backing), served);
}
