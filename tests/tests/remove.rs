//! A volume is forgotten, unless something would be lost by that.

use wb_tests::{MIB, Volume, flip_bit, needs_serving, noise, overwrite, segment_offset};

fn refuses(volume: &Volume, why: &str) {
    let refused = volume.wbctl(&["remove", &volume.name]);
    assert_eq!((refused.code, refused.stderr.lines().count()), (1, 1), "{refused:?}");
    assert!(refused.stderr.contains(why), "{refused:?}");
    assert!(volume.record().exists(), "{refused:?}");
}

/// A volume whose record names the devices of a golden pair.
fn recorded(golden: &str) -> Volume {
    let mut volume = Volume::golden(golden);
    let pair = Volume::created(8, 8 * MIB);
    std::fs::create_dir(volume.path("config")).expect("what the test needs");
    let record = std::fs::read_to_string(pair.record()).expect("what the test needs");
    let record = record.replace(
        pair.dir.path().to_str().expect("what the test needs"),
        volume.dir.path().to_str().expect("it works"),
    );
    volume.name = "golden".into();
    std::fs::write(volume.path("config/golden.toml"), record).expect("what the test needs");
    volume
}

#[test]
fn a_clean_volume_is_forgotten_and_its_devices_are_left_as_they_are() {
    let volume = Volume::created(8, 8 * MIB);
    let before = volume.images();
    volume.must(&["remove", &volume.name]);
    assert_eq!(volume.must(&["list"]), "no volumes; see wbctl create\n");
    assert_eq!(volume.images(), before);
    let again = volume.wbctl(&["remove", &volume.name]);
    assert!(again.code == 1 && again.stderr.contains("is recorded in"), "{again:?}");
}

#[test]
fn an_attached_volume_is_not_forgotten_nor_a_dirty_one() {
    needs_serving!();
    let volume = Volume::created(16, 16 * MIB);
    let mut attached = volume.attach_with(&[]);
    overwrite(&attached.device, 0, &noise(1, MIB));
    std::fs::File::open(&attached.device).unwrap().sync_all().unwrap();
    refuses(&volume, "is attached; first run: wbctl detach");
    attached.kill();
    assert!(volume.link().is_symlink() && volume.socket().exists(), "what a killed daemon leaves");
    refuses(&volume, "refused: 1 MiB (256 blocks) of");
    volume.must(&[&["replay"], &volume.pair()[..]].concat());
    volume.must(&["remove", &volume.name]);
    assert!(!volume.link().is_symlink() && !volume.path("run").join(&volume.name).exists());
}

#[test]
fn a_dirty_cache_of_the_kernel_module_is_not_forgotten() {
    refuses(&recorded("few-1"), "wbctl replay --cache");
}

#[test]
fn a_cache_that_cannot_be_judged_is_only_forgotten_by_force() {
    let damaged = recorded("few-1");
    flip_bit(&damaged.cache, segment_offset(&damaged.cache, 3) + 100_000);
    refuses(
        &damaged,
        "cannot tell whether the cache of 'golden' is clean (--force forgets the volume anyway)",
    );
    let gone = Volume::created(8, 8 * MIB);
    std::fs::remove_file(&gone.cache).unwrap();
    refuses(&gone, "No such file");
    for volume in [damaged, gone] {
        volume.must(&["remove", "--force", &volume.name]);
        assert_eq!(volume.must(&["list"]), "no volumes; see wbctl create\n");
    }
}
