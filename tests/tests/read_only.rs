//! A volume that is attached read-only: reads show what a recovery would leave, and no byte of
//! either device changes.

use std::fs::File;
use std::os::unix::fs::FileExt;
use wb_tests::{
    GOLDEN, MIB, Volume, golden_volume_sha256, needs_serving, noise, overwrite, read_at,
    sha256_direct, wait_for,
};

#[test]
fn every_volume_of_the_kernel_module_is_shown_and_left_as_it_is() {
    needs_serving!();
    for name in GOLDEN {
        let volume = Volume::golden(name);
        let before = volume.images();
        let attached = volume.attach_with(&[&volume.pair()[..], &["--read-only"]].concat());
        assert_eq!(sha256_direct(&attached.device), golden_volume_sha256(name), "{name}");
        attached.detach(&[]);
        assert_eq!(volume.images(), before, "{name}");
    }
}

#[test]
fn a_volume_with_dirty_data_takes_no_write_and_nothing_that_leads_to_one() {
    needs_serving!();
    let volume = Volume::created(16, 8 * MIB);
    let name = volume.name.as_str();
    let attached = volume.attach_with(&[]);
    volume.must(&["pause", name]);
    overwrite(&attached.device, 4096, &noise(5, 3 * MIB));
    File::open(&attached.device)
        .and_then(|device| device.sync_all())
        .expect("a device that takes writes");
    attached.crash();
    let before = volume.images();
    let attached = volume.attach_with(&["--read-only"]);
    assert_eq!(volume.status()["state"], "attached read-only");
    assert!(read_at(&attached.device, 4096, 3 * MIB) == noise(5, 3 * MIB));
    let written = File::options()
        .write(true)
        .open(&attached.device)
        .and_then(|file| file.write_all_at(&[1; 512], 0));
    assert!(written.is_err(), "the device takes a write");
    for refused in [
        &["flush", name][..],
        &["drain", name],
        &["pause", name],
        &["set", name, "writeback_threshold=5"],
        &["detach", "--drain", name],
    ] {
        let refused = volume.wbctl(refused);
        assert_eq!(refused.code, 1, "{refused:?}");
        assert!(
            refused.stderr.contains(&format!("'{name}' is attached read-only; detach it")),
            "{refused:?}"
        );
    }
    // An idle volume is written back after a second, if it is.
    std::thread::sleep(std::time::Duration::from_millis(1500));
    assert!(read_at(&attached.device, 4096, 3 * MIB) == noise(5, 3 * MIB));
    attached.detach(&[]);
    assert!(wait_for(|| volume.is_gone()));
    assert_eq!(volume.images(), before);
    // As an ordinary one, it has it all.
    let attached = volume.attach_with(&[]);
    assert!(read_at(&attached.device, 4096, 3 * MIB) == noise(5, 3 * MIB));
    attached.detach(&["--drain"]);
    assert!(read_at(&volume.backing, 4096, 3 * MIB) == noise(5, 3 * MIB));
}
