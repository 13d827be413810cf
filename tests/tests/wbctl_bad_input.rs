//! What wbctl refuses: with one clear line, the right exit code, and nothing changed on any device.

use libwb::format::{BlockNo, DirtyBits, Metablock};
use std::ffi::OsStr;
use std::fs::Permissions;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use wb_tests::{
    Filesystem, MIB, Outcome, Volume, as_nobody, bin, cache_bytes, flip_bit, has_program,
    needs_serving, overwrite, segment_offset, sha256, skip, write_segment,
};

fn content(volume: &Volume) -> [Option<String>; 2] {
    [&volume.cache, &volume.backing].map(|path| path.is_file().then(|| sha256(path)))
}

/// Runs wbctl, which must refuse with exit code `code` and say `why`, and change nothing.
fn refuses(volume: &Volume, args: &[&str], code: i32, why: &str) -> Outcome {
    let before = content(volume);
    let outcome = volume.wbctl(args);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (code, ""), "{args:?}: {outcome:?}");
    assert!(outcome.stderr.contains(why), "{args:?}: {why:?} is not in {outcome:?}");
    assert!(!outcome.stderr.contains("panicked"), "{outcome:?}");
    // Clap adds a hint on usage, and the daemon may have logged something.
    let errors = outcome.stderr.lines().filter(|line| !line.starts_with([' ', '\u{1b}'])).count();
    assert!(code == 2 || errors == 1, "{args:?}: {outcome:?}");
    assert_eq!(content(volume), before, "{args:?}");
    assert!(!volume.link().is_symlink(), "{args:?}");
    outcome
}

/// What create, attach and replay must all refuse alike.
fn all_refuse(volume: &Volume, why: &str) {
    create_refuses(volume, &[], why);
    attach_and_replay_refuse(volume, why);
}

fn create_refuses(volume: &Volume, more: &[&str], why: &str) {
    let args = [&["create", volume.name.as_str()], &volume.pair()[..], more].concat();
    let refused = refuses(volume, &args, 1, why);
    assert!(refused.stderr.starts_with("wbctl: "), "by the program that was typed: {refused:?}");
    assert!(!volume.record().exists(), "nothing is recorded");
}

fn attach_and_replay_refuse(volume: &Volume, why: &str) {
    refuses(volume, &[&["replay"], &volume.pair()[..]].concat(), 1, why);
    if nix::unistd::geteuid().is_root() {
        refuses(volume, &[&["attach", volume.name.as_str()], &volume.pair()[..]].concat(), 1, why);
    }
}

fn resize(path: &Path, bytes: u64) {
    let file = std::fs::File::options().write(true).open(path).expect("a file");
    file.set_len(bytes).expect("a file to resize");
}

#[test]
fn a_device_that_is_not_there_or_no_device_is_refused() {
    for bad in ["/no/such/file", "/tmp", "/dev/null"] {
        let why = if bad.starts_with("/no") {
            "No such file"
        } else {
            "neither a block device nor a regular file"
        };
        let why = format!("{bad}: {why}").replace(": No", ": cannot open: No");
        let mut volume = Volume::blank(4, 8 * MIB);
        volume.cache = bad.into();
        all_refuse(&volume, &why);
        let mut volume = Volume::blank(4, 8 * MIB);
        volume.backing = bad.into();
        all_refuse(&volume, &why);
    }
}

#[test]
fn a_cache_device_of_a_wrong_size_is_refused() {
    for (bytes, why) in [
        (0, "too small for a cache device: 0 bytes"),
        (cache_bytes(1) - 512, "too small for a cache device"),
        (cache_bytes(4) - 100, "is no multiple of 512; was it truncated?"),
    ] {
        let volume = Volume::golden("few-1");
        resize(&volume.cache, bytes);
        all_refuse(&volume, why);
    }
}

#[test]
fn a_wrapped_log_on_a_device_that_was_cut_off_is_refused() {
    let volume = Volume::golden("lapped-1");
    resize(&volume.cache, cache_bytes(9));
    attach_and_replay_refuse(&volume, "corrupt");
}

#[test]
fn a_backing_device_of_no_whole_sectors_or_none_is_refused() {
    for (bytes, why) in [(8 * MIB + 1, "is no multiple of 512"), (0, "the backing device is empty")]
    {
        let volume = Volume::golden("few-1");
        resize(&volume.backing, bytes);
        all_refuse(&volume, why);
    }
}

#[test]
fn a_backing_device_smaller_than_the_log_needs_is_refused() {
    let volume = Volume::golden("few-1");
    resize(&volume.backing, MIB);
    attach_and_replay_refuse(&volume, "is it the right backing device?");
    let volume = Volume::golden("fresh");
    let far = Metablock { block: BlockNo(1 << 40), dirty: DirtyBits(0xff), crc: None, lost: false };
    write_segment(&volume.cache, 1, &[far], 1);
    attach_and_replay_refuse(&volume, "holds data for sector 8796093022208");
}

#[test]
fn what_is_no_cache_is_not_attached_or_replayed() {
    let volume = Volume::blank(4, 8 * MIB);
    attach_and_replay_refuse(&volume, volume.cache.to_str().unwrap());
    let volume = Volume::golden("few-1");
    flip_bit(&volume.cache, 2);
    attach_and_replay_refuse(&volume, "magic");
}

#[test]
fn a_log_with_rot_in_its_middle_is_refused() {
    let volume = Volume::golden("few-1");
    flip_bit(&volume.cache, segment_offset(&volume.cache, 3) + 100_000);
    let check = wb_tests::wb!("wbcheck", &volume.cache);
    assert_eq!(check.code, 4, "{check:?}");
    attach_and_replay_refuse(&volume, "the log is corrupt: ");
}

#[test]
fn one_device_cannot_be_cache_and_backing_by_whatever_name() {
    let volume = Volume::golden("fresh");
    let (link, hard_link) = (volume.path("link"), volume.path("hard-link"));
    std::os::unix::fs::symlink(&volume.cache, &link).unwrap();
    std::fs::hard_link(&volume.cache, &hard_link).unwrap();
    let mut same = volume;
    for name in [same.cache.clone(), link, hard_link] {
        same.backing = name;
        all_refuse(&same, "are the same device; cache and backing must be two");
    }
}

#[test]
fn a_foreign_filesystem_is_not_formatted_over_unasked() {
    if !has_program("mkfs.ext4") {
        skip!("needs mkfs.ext4");
    }
    let volume = Volume::blank(16, 16 * MIB);
    Filesystem::Ext4.make(&volume.cache);
    create_refuses(&volume, &[], "it holds: ext4");
    attach_and_replay_refuse(&volume, volume.cache.to_str().unwrap());
    volume.create(&["--force"]);
}

#[test]
fn dirty_blocks_are_not_given_up_unasked() {
    let volume = Volume::golden("few-1");
    create_refuses(&volume, &[], "dirty blocks that may be nowhere else");
    create_refuses(&volume, &["--force"], "dirty blocks that may be nowhere else");
    volume.create(&["--discard-dirty"]);
}

#[test]
fn a_name_cannot_lead_out_of_its_folder() {
    let volume = Volume::blank(4, 8 * MIB);
    for name in ["a/b", "../a", "..", "", ".a", "a b", &"a".repeat(65)] {
        refuses(&volume, &[&["create", name], &volume.pair()[..]].concat(), 2, "a volume name is");
        refuses(&volume, &[&["attach", name], &volume.pair()[..]].concat(), 2, "a volume name is");
        for verb in ["status", "detach", "flush", "drain"] {
            refuses(&volume, &[verb, name], 2, "a volume name is");
        }
    }
}

#[test]
fn a_senseless_command_line_is_a_usage_error() {
    let volume = Volume::blank(4, 8 * MIB);
    for args in [
        &[][..],
        &["explode"],
        &["create", "x"],
        &["replay"],
        &["attach"],
        &["attach", "--cache", "x"],
    ] {
        let outcome = volume.wbctl(args);
        assert_eq!((outcome.code, outcome.stdout.as_str()), (2, ""), "{args:?}: {outcome:?}");
    }
    let size = [&["create", "x", "--sector-size", "1024"], &volume.pair()[..]].concat();
    refuses(&volume, &size, 2, "[possible values: 512, 4096]");
}

#[test]
fn an_unknown_volume_is_named() {
    let volume = Volume::blank(4, 8 * MIB);
    refuses(&volume, &["attach", "nobody"], 1, "no volume 'nobody' is recorded in");
    refuses(&volume, &["status", "nobody"], 1, "no volume 'nobody' is attached or recorded");
    for verb in ["detach", "flush", "drain"] {
        refuses(&volume, &[verb, "nobody"], 1, "volume 'nobody' is not attached; see wbctl list");
    }
    for args in [&["set", "nobody", "writeback_threshold=0"][..], &["get", "nobody"]] {
        refuses(&volume, args, 1, "no volume 'nobody' is attached or recorded");
    }
}

#[test]
fn how_to_attach_a_recorded_volume_is_said() {
    let volume = Volume::created(4, 8 * MIB);
    let advice = format!("is not attached; attach it with: wbctl attach {}", volume.name);
    refuses(&volume, &["flush", &volume.name], 1, &advice);
    refuses(&volume, &["status", "--dm", &volume.name], 3, &advice);
    refuses(
        &volume,
        &["set", &volume.name, "writeback_threshold=0"],
        1,
        "is not attached; with --save",
    );
}

#[test]
fn a_filter_of_the_log_that_makes_no_sense_is_told_of() {
    let volume = Volume::created(4, 8 * MIB);
    std::fs::remove_file(&volume.cache).unwrap();
    let mut attach = volume.command(&["attach", &volume.name]);
    attach.env("WB_LOG", "libwb=loud");
    let refused = Outcome::of(attach);
    assert_eq!(refused.code, 1, "{refused:?}");
    assert!(refused.stderr.contains("WB_LOG=libwb=loud: "), "{refused:?}");
    assert!(refused.stderr.contains("the default is used"), "{refused:?}");
}

#[test]
fn an_ordinary_user_is_not_told_that_an_attached_volume_is_detached() {
    needs_serving!();
    let volume = Volume::created(4, 8 * MIB);
    std::fs::set_permissions(volume.dir.path(), Permissions::from_mode(0o755)).unwrap();
    let attached = volume.attach_with(&[]);
    let name = volume.name.as_str();
    for args in [&["status", name][..], &["get", name], &["list"], &["status"]] {
        let refused = Outcome::of(as_nobody(&volume, args));
        assert_eq!((refused.code, refused.stdout.as_str()), (1, ""), "{refused:?}");
        assert!(refused.stderr.ends_with("(root is needed): Permission denied\n"), "{refused:?}");
    }
    attached.detach(&[]);
}

#[test]
fn a_tunable_that_is_unknown_or_out_of_range_is_refused() {
    let volume = Volume::golden("fresh");
    for (pair, why) in [
        (
            "colour=red",
            "unknown tunable 'colour'; known: writeback_threshold, nr_max_batched_writeback",
        ),
        ("nr_max_batched_writeback=0", "must be a number from 1 to"),
        ("nr_max_batched_writeback=-1", "must be a number from 1 to"),
        ("nr_max_batched_writeback=99999999999999999999", "must be a number from 1 to"),
        ("nr_max_batched_writeback", "must be KEY=VALUE"),
    ] {
        create_refuses(&volume, &["--", pair], why);
        refuses(
            &volume,
            &[&["attach", &volume.name], &volume.pair()[..], &["--", pair]].concat(),
            1,
            why,
        );
    }
}

#[test]
fn a_volume_is_not_created_twice() {
    let volume = Volume::created(4, 8 * MIB);
    let args = [&["create", volume.name.as_str()], &volume.pair()[..]].concat();
    refuses(&volume, &args, 1, "exists already: it is recorded in");
}

#[test]
fn a_device_of_another_volume_is_refused_until_that_is_removed() {
    let volume = Volume::created(4, 8 * MIB);
    let spare = volume.cache.with_file_name("spare");
    std::fs::copy(&volume.cache, &spare).unwrap();
    let [cache, backing, spare] =
        [&volume.cache, &volume.backing, &spare].map(|path| path.to_str().unwrap());
    let why = format!(
        "belongs to the volume '{0}'; to give that up, first run: wbctl remove {0}",
        volume.name
    );
    for [cache, backing] in [[spare, backing], [cache, spare]] {
        refuses(&volume, &["create", "other", "--cache", cache, "--backing", backing], 1, &why);
    }
    volume.must(&["remove", &volume.name]);
    volume.must(&["create", "other", "--cache", spare, "--backing", backing]);
}

#[test]
fn a_record_that_makes_no_sense_is_refused_by_line() {
    let volume = Volume::created(4, 8 * MIB);
    let record = volume.record();
    let good = std::fs::read_to_string(&record).unwrap();
    for (more, why) in [
        ("colour = \"red\"\n", "line 3: unknown field `colour`"),
        ("sector_size = \"big\"\n", "line 3: "),
        ("sector_size = 1024\n", "1024"),
        ("sector_size = 0\n", "sector"),
        ("[tunables]\ncolour = 1\n", "unknown tunable 'colour'"),
        ("[tunables]\nnr_max_batched_writeback = 5000\n", "must be a number from 1 to"),
        ("[tunables\n", "line 3: "),
    ] {
        std::fs::write(&record, format!("{good}{more}")).unwrap();
        refuses(&volume, &["attach", &volume.name], 1, why);
        refuses(&volume, &["status", &volume.name], 1, record.to_str().unwrap());
    }
    let nul = good.replacen("cache = \"", "cache = \"\\u0000", 1);
    assert_ne!(nul, good);
    std::fs::write(&record, nul).unwrap();
    refuses(
        &volume,
        &["attach", &volume.name],
        1,
        "is not the path of a device: it contains a NUL",
    );
    std::fs::write(&record, &good).unwrap();
    overwrite(&record, 0, b"\xff\xfe");
    refuses(&volume, &["attach", &volume.name], 1, record.to_str().unwrap());
}

#[test]
fn an_attached_volume_is_in_use() {
    needs_serving!();
    let volume = Volume::created(4, 8 * MIB);
    let attached = volume.attach_with(&[]);
    let pair = volume.pair();
    for args in [
        [&["replay"], &pair[..]].concat(),
        [&["create", "other"], &pair[..]].concat(),
        [&["create", "other", "--force", "--discard-dirty"], &pair[..]].concat(),
    ] {
        let outcome = volume.wbctl(&args);
        assert_eq!((outcome.code, outcome.stderr.lines().count()), (1, 1), "{args:?}: {outcome:?}");
        let whose = format!(
            "it is attached as volume '{0}'; to release it: wbctl detach {0}\n",
            volume.name
        );
        assert!(outcome.stderr.ends_with(&whose), "{outcome:?}");
    }
    for program in ["wbcheck", "wbformat"] {
        let mut command = Command::new(bin(program));
        command.arg(&volume.cache).env("WB_RUN_DIR", volume.path("run"));
        let refused = Outcome::of(command);
        assert!(
            refused.stderr.contains(&format!("in use: it is attached as volume '{}'", volume.name))
        );
    }
    attached.detach(&[]);
}

#[test]
fn a_create_that_is_refused_leaves_neither_a_record_nor_a_formatted_cache() {
    let volume = Volume::blank(4, 8 * MIB);
    let before = sha256(&volume.cache);
    let odd = volume.dir.path().join(OsStr::from_bytes(b"backing\xff"));
    std::fs::copy(&volume.backing, &odd).unwrap();
    let create = |backing: &Path| {
        let mut create = volume.command(&["create", &volume.name, "--cache"]);
        create.arg(&volume.cache).arg("--backing").arg(backing);
        let refused = Outcome::of(create);
        assert_eq!((refused.code, refused.stderr.lines().count()), (1, 1), "{refused:?}");
        assert_eq!(sha256(&volume.cache), before, "{refused:?}");
        refused.stderr
    };
    let why = create(&odd);
    assert!(why.contains("cannot record the volume in") && why.contains("UTF-8"), "{why}");
    let config = volume.path("config");
    let left = std::fs::read_dir(&config).map_or(0, |entries| entries.count());
    assert_eq!((left, volume.must(&["list"])), (0, "no volumes; see wbctl create\n".into()));
    // There is no folder for records, and none can be made.
    let _ = std::fs::remove_dir(&config);
    std::fs::write(&config, "a file").unwrap();
    assert!(create(&volume.backing).contains("Not a directory"));
    std::fs::remove_file(&config).unwrap();
    volume.create(&[]);
    assert_eq!(std::fs::read_dir(&config).unwrap().count(), 1, "the record alone");
}
