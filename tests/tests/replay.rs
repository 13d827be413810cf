//! `wbctl replay` and `wbctl attach` on devices that the kernel module wrote: the volume is the one
//! that the module itself recovers.

use libwb::format::{BlockNo, DirtyBits, Metablock};
use nix::sys::signal::Signal;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use wb_tests::{
    GOLDEN, LoopDevice, NOBODY, Outcome, Volume, as_nobody, golden_volume_sha256, needs_serving,
    overwrite, read_at, sha256, sha256_direct, wb, write_segment,
};

/// Runs wbctl as an ordinary user, who owns the volume's files.
fn as_ordinary_user(volume: &Volume, args: &[&str]) -> Outcome {
    if nix::unistd::geteuid().is_root() {
        for path in [volume.dir.path(), &volume.cache, &volume.backing] {
            chown(path, Some(NOBODY), Some(NOBODY)).expect("files to give away");
        }
    }
    Outcome::of(as_nobody(volume, args))
}

fn replay(volume: &Volume) -> Outcome {
    as_ordinary_user(volume, &[&["replay"], &volume.pair()[..]].concat())
}

fn is_sound(volume: &Volume) {
    let check = wb!("wbcheck", &volume.cache, "--backing", &volume.backing);
    assert_eq!(check.code, 0, "{check:?}");
}

#[test]
fn an_ordinary_user_gets_the_volume_that_the_kernel_module_recovers() {
    for name in GOLDEN {
        let volume = Volume::golden(name);
        is_sound(&volume);
        let outcome = replay(&volume);
        assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""), "{name}: {outcome:?}");
        assert_eq!(outcome.stdout.lines().count(), 1, "{name}: {outcome:?}");
        assert_eq!(sha256(&volume.backing), golden_volume_sha256(name), "{name}");
        is_sound(&volume);
    }
}

#[test]
fn a_second_replay_changes_no_byte() {
    for name in GOLDEN {
        let volume = Volume::golden(name);
        assert_eq!(replay(&volume).code, 0, "{name}");
        let before = volume.images();
        let again = replay(&volume);
        assert_eq!(
            again.stdout, "nothing to write back: the cache is clean\n",
            "{name}: {again:?}"
        );
        assert_eq!(volume.images(), before, "{name}");
    }
}

#[test]
fn attaching_serves_the_volume_that_the_kernel_module_recovers() {
    needs_serving!();
    for name in GOLDEN {
        let volume = Volume::golden(name);
        let attached = volume.attach();
        assert_eq!(sha256_direct(&attached.device), golden_volume_sha256(name), "{name}");
        assert_eq!(
            sha256(&attached.device),
            golden_volume_sha256(name),
            "{name}, through the page cache"
        );
        attached.end(Signal::SIGTERM);
        is_sound(&volume);
        assert_eq!(replay(&volume).code, 0, "{name}");
        assert_eq!(sha256(&volume.backing), golden_volume_sha256(name), "{name}, replayed");
    }
}

#[test]
fn a_report_in_json_counts_what_was_written_back() {
    let volume = Volume::golden("few-1");
    let args = [&["replay", "--json"], &volume.pair()[..]].concat();
    let report = volume.wbctl(&args).json();
    let dirty = report["dirty_blocks"].as_u64().unwrap();
    assert!(dirty > 0, "{report}");
    assert_eq!(report["written_back_bytes"], dirty * 4096, "only whole blocks are in it: {report}");
    assert_eq!(report["cache"], volume.cache.to_str().unwrap());
    assert_eq!(report["backing"], volume.backing.to_str().unwrap());
    assert_eq!(
        (&report["segments"], &report["recovery_point"]),
        (&7.into(), &7.into()),
        "{report}"
    );
    let again = volume.wbctl(&args).json();
    assert_eq!(
        (&again["dirty_blocks"], &again["written_back_bytes"]),
        (&0.into(), &0.into()),
        "{again}"
    );
}

#[test]
fn a_replayed_cache_gives_the_same_volume_over_a_backing_device_that_was_written_since() {
    needs_serving!();
    let volume = Volume::golden("partial-1");
    volume.must(&[&["replay"], &volume.pair()[..]].concat());
    overwrite(&volume.backing, 0, &[7; 1 << 20]);
    let attached = volume.attach();
    assert_eq!(
        sha256_direct(&attached.device),
        sha256(&volume.backing),
        "no block of the cache is stale"
    );
}

#[test]
fn a_file_that_may_only_be_read_is_refused_and_left_as_it_is() {
    let volume = Volume::golden("few-1");
    let before = volume.images();
    let readable = std::fs::Permissions::from_mode(0o444);
    std::fs::set_permissions(&volume.backing, readable).unwrap();
    if nix::unistd::geteuid().is_root() {
        std::fs::set_permissions(volume.dir.path(), std::fs::Permissions::from_mode(0o755))
            .unwrap();
    }
    let outcome = replay(&volume);
    assert_eq!(outcome.code, 1, "{outcome:?}");
    assert_eq!(outcome.stderr.lines().count(), 1, "{outcome:?}");
    assert!(outcome.stderr.contains("Permission denied"), "{outcome:?}");
    assert_eq!(volume.images(), before);
    assert!(Path::new(&volume.cache).exists());
}

#[test]
fn a_dry_run_opens_for_reading_alone() {
    let volume = Volume::golden("few-1");
    let before = volume.images();
    for path in [&volume.cache, &volume.backing] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o444)).unwrap();
    }
    for more in [&[][..], &["--until", "5"]] {
        let looked = as_ordinary_user(
            &volume,
            &[&["replay", "--dry-run"], &volume.pair()[..], more].concat(),
        );
        assert!(looked.code == 0 && looked.stdout.starts_with("would write back"), "{looked:?}");
    }
    assert_eq!(volume.images(), before);
}

#[test]
fn a_dry_run_takes_block_devices_that_are_write_protected() {
    needs_serving!();
    let volume = Volume::golden("few-1");
    let devices = [&volume.cache, &volume.backing]
        .map(|file| LoopDevice::attach_read_only(file).expect("a loop device"));
    let [cache, backing] = devices.each_ref().map(|device| device.path.to_str().unwrap());
    let looked = wb!("wbctl", "replay", "--dry-run", "--cache", cache, "--backing", backing);
    assert!(looked.code == 0 && looked.stdout.starts_with("would write back"), "{looked:?}");
    let refused = wb!("wbctl", "replay", "--cache", cache, "--backing", backing);
    assert!(refused.code == 1 && refused.stderr.contains("write-protected"), "{refused:?}");
}

/// A log of three segments. Block 0 is in all of them, and in the last in part; block 1 in the
/// second alone.
fn three_segments() -> Volume {
    let volume = Volume::blank(8, 64 << 10);
    assert_eq!(wb!("wbformat", &volume.cache, "--compat").code, 0);
    let entry = |block, dirty| Metablock { block: BlockNo(block), dirty, crc: None, lost: false };
    let first_sector = DirtyBits::range(0, 1);
    write_segment(&volume.cache, 1, &[entry(0, DirtyBits::ALL)], 1);
    write_segment(&volume.cache, 2, &[entry(1, DirtyBits::ALL), entry(0, DirtyBits::ALL)], 2);
    write_segment(&volume.cache, 3, &[entry(0, first_sector)], 3);
    volume
}

fn replay_until(volume: &Volume, until: &str, more: &[&str]) -> Outcome {
    as_ordinary_user(volume, &[&["replay", "--until", until], &volume.pair()[..], more].concat())
}

/// What the first sector, the rest of block 0, and block 1 hold.
fn holds(volume: &Volume) -> [u8; 3] {
    let block = read_at(&volume.backing, 512, 3584);
    assert!(block.iter().all(|&byte| byte == block[0]), "all of it is from one segment");
    [read_at(&volume.backing, 0, 512)[511], block[0], read_at(&volume.backing, 4096, 4096)[4095]]
}

#[test]
fn a_log_is_replayed_until_an_earlier_point_and_stays_as_it_is_for_the_rest() {
    let volume = three_segments();
    let cache = sha256(&volume.cache);
    let dry = replay_until(&volume, "2", &["--dry-run"]);
    assert!(dry.code == 0 && dry.stdout.contains("would write back 2 dirty blocks"), "{dry:?}");
    assert_eq!(holds(&volume), [0, 0, 0]);
    for (until, after) in
        [("0", [0, 0, 0]), ("1", [1, 1, 0]), ("2", [2, 2, 2]), ("2", [2, 2, 2]), ("3", [3, 2, 2])]
    {
        let done = replay_until(&volume, until, &[]);
        assert_eq!((done.code, done.stderr.as_str()), (0, ""), "{done:?}");
        assert_eq!(holds(&volume), after, "until {until}: {done:?}");
        assert_eq!(sha256(&volume.cache), cache, "until {until}");
    }
    is_sound(&volume);
    let all = replay(&volume);
    assert!(
        all.code == 0 && all.stdout.contains("2 dirty blocks"),
        "the cache was still dirty: {all:?}"
    );
    assert_eq!(holds(&volume), [3, 2, 2]);
    // All is written back now, so there is nothing earlier left.
    let before = volume.images();
    let refused = replay_until(&volume, "2", &[]);
    assert_eq!(refused.code, 1, "{refused:?}");
    assert!(
        refused.stderr.contains("give a segment from 3 (all up to it is written back) to 3"),
        "{refused:?}"
    );
    assert_eq!(volume.images(), before);
}

#[test]
fn a_point_that_the_log_does_not_reach_is_refused_and_a_salvage_until_it_is_senseless() {
    let volume = three_segments();
    let before = volume.images();
    for until in ["4", "18446744073709551615"] {
        let refused = replay_until(&volume, until, &[]);
        assert_eq!(refused.code, 1, "{refused:?}");
        assert!(
            refused.stderr.contains("give a segment from 0 (all up to it is written back) to 3"),
            "{refused:?}"
        );
    }
    assert_eq!(replay_until(&volume, "2", &["--salvage"]).code, 2);
    assert_eq!(volume.images(), before);
}

#[test]
fn every_device_of_the_kernel_module_can_be_replayed_in_two_steps() {
    for name in GOLDEN {
        let volume = Volume::golden(name);
        let json = as_ordinary_user(
            &volume,
            &[&["replay", "--dry-run", "--json"], &volume.pair()[..]].concat(),
        );
        let last = json.json()["recovery_point"].as_u64().expect("a number");
        let segments = json.json()["segments"].as_u64().expect("a number");
        let cache = sha256(&volume.cache);
        let point = (last - segments / 2).to_string();
        // The module has written back more than it has recorded.
        let is_ahead = ["lapped-1"].contains(&name);
        let half = replay_until(&volume, &point, &[]);
        assert_eq!(
            (half.code, half.stderr.contains("already")),
            (i32::from(is_ahead), is_ahead),
            "{name}: {half:?}"
        );
        let half = replay_until(&volume, &point, if is_ahead { &["--older"] } else { &[] });
        assert_eq!((half.code, half.stderr.as_str()), (0, ""), "{name}: {half:?}");
        assert_eq!(sha256(&volume.cache), cache, "{name}");
        assert_eq!(replay(&volume).code, 0, "{name}");
        assert_eq!(sha256(&volume.backing), golden_volume_sha256(name), "{name}");
    }
}

#[test]
fn a_replay_until_an_earlier_point_than_the_last_is_refused_and_told_to_be_a_mixture() {
    let volume = three_segments();
    assert_eq!(replay_until(&volume, "3", &[]).code, 0);
    let before = volume.images();
    for options in [&[][..], &["--dry-run"]] {
        let refused = replay_until(&volume, "1", options);
        assert_eq!((refused.code, refused.stderr.lines().count()), (1, 1), "{refused:?}");
        for why in [
            "already holds what segment 2 wrote, which comes after segment 1",
            "a mixture of both",
            "--older",
        ] {
            assert!(refused.stderr.contains(why), "{refused:?}");
        }
    }
    let looked = replay_until(&volume, "1", &["--older", "--dry-run"]);
    assert!(
        looked.code == 0 && looked.stdout.contains("the result would be a mixture"),
        "{looked:?}"
    );
    assert_eq!(volume.images(), before);
    let mixed = replay_until(&volume, "1", &["--older"]);
    let said = "the backing device already held what segment 2 wrote: the result is a mixture";
    assert!(mixed.code == 0 && mixed.stdout.contains(said), "{mixed:?}");
    assert_eq!(holds(&volume), [1, 1, 2]);
    let json = replay_until(&volume, "0", &["--older", "--json"]).json();
    assert_eq!(
        (&json["mixed_with_segment"], &json["dirty_blocks"]),
        (&1.into(), &0.into()),
        "{json}"
    );
    // To its end, the log can be replayed at any time.
    assert_eq!(replay(&volume).code, 0);
    assert_eq!(holds(&volume), [3, 2, 2]);
}
