//! `wbctl replay` and `wbctl attach` on devices that the kernel module wrote: the volume is the one that the module
//! itself recovers.

use nix::sys::signal::Signal;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use wb_tests::{
    GOLDEN, Outcome, Volume, golden_volume_sha256, needs_serving, overwrite, sha256, sha256_direct, wb,
};

const NOBODY: u32 = 65534;

/// Runs wbctl as an ordinary user, who owns the volume's files.
fn as_ordinary_user(volume: &Volume, args: &[&str]) -> Outcome {
    let mut command = volume.command(args);
    if nix::unistd::geteuid().is_root() {
        for path in [volume.dir.path(), &volume.cache, &volume.backing] {
            chown(path, Some(NOBODY), Some(NOBODY)).expect("files to give away");
        }
        command.uid(NOBODY).gid(NOBODY);
    }
    Outcome::of(command)
}

fn replay(volume: &Volume) -> Outcome {
    as_ordinary_user(volume, &[&["replay"], &volume.pair()[..]].concat())
}

fn images(volume: &Volume) -> [String; 2] {
    [sha256(&volume.cache), sha256(&volume.backing)]
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
        let before = images(&volume);
        let again = replay(&volume);
        assert_eq!(again.stdout, "nothing to write back: the cache is clean\n", "{name}: {again:?}");
        assert_eq!(images(&volume), before, "{name}");
    }
}

#[test]
fn attaching_serves_the_volume_that_the_kernel_module_recovers() {
    needs_serving!();
    for name in GOLDEN {
        let volume = Volume::golden(name);
        let attached = volume.attach();
        assert_eq!(sha256_direct(&attached.device), golden_volume_sha256(name), "{name}");
        assert_eq!(sha256(&attached.device), golden_volume_sha256(name), "{name}, through the page cache");
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
    assert_eq!((&report["segments"], &report["recovery_point"]), (&7.into(), &7.into()), "{report}");
    let again = volume.wbctl(&args).json();
    assert_eq!((&again["dirty_blocks"], &again["written_back_bytes"]), (&0.into(), &0.into()), "{again}");
}

#[test]
fn a_replayed_cache_gives_the_same_volume_over_a_backing_device_that_was_written_since() {
    needs_serving!();
    let volume = Volume::golden("partial-1");
    volume.must(&[&["replay"], &volume.pair()[..]].concat());
    overwrite(&volume.backing, 0, &[7; 1 << 20]);
    let attached = volume.attach();
    assert_eq!(sha256_direct(&attached.device), sha256(&volume.backing), "no block of the cache is stale");
}

#[test]
fn a_file_that_may_only_be_read_is_refused_and_left_as_it_is() {
    let volume = Volume::golden("few-1");
    let before = images(&volume);
    let readable = std::fs::Permissions::from_mode(0o444);
    std::fs::set_permissions(&volume.backing, readable).unwrap();
    if nix::unistd::geteuid().is_root() {
        std::fs::set_permissions(volume.dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let outcome = replay(&volume);
    assert_eq!(outcome.code, 1, "{outcome:?}");
    assert_eq!(outcome.stderr.lines().count(), 1, "{outcome:?}");
    assert!(outcome.stderr.contains("Permission denied"), "{outcome:?}");
    assert_eq!(images(&volume), before);
    assert!(Path::new(&volume.cache).exists());
}
