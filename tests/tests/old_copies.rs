//! wb refuses to write an older copy of a cache over newer data. It also refuses a second cache in
//! front of a backing device while the first one still holds dirty data.

use nix::sys::signal::Signal;
use std::fs::{File, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use wb_tests::{
    Attached, MIB, Outcome, Volume, bin, cache_bytes, flip_bit, golden, needs_serving, overwrite,
    read_at, sha256, wait_for, wb, zeros,
};

/// Writes a block through an attached volume, so that it survives a power cut.
fn write(attached: &Attached<'_>, block: u64, fill: u8) {
    overwrite(&attached.device, block * 4096, &[fill; 4096]);
    File::open(&attached.device)
        .and_then(|device| device.sync_all())
        .expect("a device that takes writes");
}

fn copy(volume: &Volume, name: &str) -> PathBuf {
    let copy = volume.path(name);
    std::fs::copy(&volume.cache, &copy).expect("room for a copy");
    copy
}

/// The options that name a cache and the backing device of a volume.
fn pair<'a>(cache: &'a Path, volume: &'a Volume) -> [&'a str; 4] {
    let [cache, backing] = [cache, &volume.backing].map(|path| path.to_str().expect("UTF-8"));
    ["--cache", cache, "--backing", backing]
}

/// Every command that uses a cache refuses this one, says why, and changes nothing.
fn is_refused(volume: &Volume, cache: &Path, why: &[&str]) {
    let pair = pair(cache, volume);
    let before = [sha256(cache), sha256(&volume.backing)];
    for verb in [
        &["replay"][..],
        &["replay", "--dry-run"],
        &["replay", "--until", "1"],
        &["replay", "--salvage"],
        &["attach", "other"],
    ] {
        let refused = volume.wbctl(&[verb, &pair[..]].concat());
        assert_eq!(refused.code, 1, "{verb:?}: {refused:?}");
        for why in why {
            assert!(refused.stderr.contains(why), "{verb:?}: {why}: {refused:?}");
        }
        assert_eq!([sha256(cache), sha256(&volume.backing)], before, "{verb:?}");
    }
}

fn replays(volume: &Volume, cache: &Path, more: &[&str]) -> String {
    volume.must(&[&["replay"], &pair(cache, volume)[..], more].concat())
}

/// The only note in the volume's folder, and the file that it is in.
fn note(volume: &Volume) -> (serde_json::Value, PathBuf) {
    let files = std::fs::read_dir(volume.path("state")).expect("a folder");
    let mut files: Vec<_> = files.map(|entry| entry.expect("an entry").path()).collect();
    // A new one may be under way.
    files.retain(|file| file.extension().is_some_and(|ending| ending == "json"));
    assert_eq!(files.len(), 1, "{files:?}");
    let text = std::fs::read_to_string(&files[0]).expect("a note");
    (serde_json::from_str(&text).expect("JSON"), files.remove(0))
}

/// A volume that was drained after a copy of its dirty cache was made, and that copy.
fn drained() -> (Volume, PathBuf) {
    let volume = Volume::created(16, 16 * MIB);
    let attached = volume.attach_with(&[]);
    write(&attached, 0, 1);
    attached.detach(&[]);
    let copy = copy(&volume, "copy.img");
    let attached = volume.attach_with(&[]);
    write(&attached, 0, 2);
    attached.detach(&["--drain"]);
    (volume, copy)
}

#[test]
fn a_copy_from_before_the_last_detach_is_refused_whatever_the_volume_is_called() {
    needs_serving!();
    let (volume, copy) = drained();
    let when = format!("as {} of volume '{}')", volume.cache.display(), volume.name);
    is_refused(
        &volume,
        &copy,
        &[
            "is older than this cache was",
            "generation 2, but was of generation 3",
            &when,
            "--older",
        ],
    );
    // Nothing is written when it is only looked at, but it would show old data.
    let looked =
        volume.wbctl(&[&["attach", "other", "--read-only"], &pair(&copy, &volume)[..]].concat());
    assert!(looked.code == 1 && looked.stderr.contains("is older"), "{looked:?}");
    assert_eq!(read_at(&volume.backing, 0, 1), [2]);
    replays(&volume, &copy, &["--older", "--dry-run"]);
    replays(&volume, &copy, &["--older"]);
    assert_eq!(read_at(&volume.backing, 0, 1), [1], "as it was asked for");
    // This one is the cache now.
    assert_eq!(note(&volume).0["generation"], 2);
    volume.attach_with(&pair(&copy, &volume)).detach(&[]);
}

#[test]
fn a_copy_of_a_running_volume_is_refused_by_what_its_log_lacks() {
    needs_serving!();
    let volume = Volume::created(16, 16 * MIB);
    let attached = volume.attach_with(&[]);
    volume.must(&["pause", &volume.name]);
    write(&attached, 0, 1);
    let dirty = copy(&volume, "dirty.img");
    volume.must(&["drain", &volume.name]);
    let empty = copy(&volume, "empty.img");
    write(&attached, 0, 2);
    attached.crash();
    // The killed daemon is back, and notes what it finds.
    let attached = volume.attach_with(&[]);
    attached.crash();
    let known = "durable up to segment 2, written back up to segment 1 (";
    is_refused(
        &volume,
        &dirty,
        &["its log is durable up to segment 1, written back up to segment 0, but was ", known],
    );
    is_refused(
        &volume,
        &empty,
        &["its log is durable up to segment 1, written back up to segment 1, but was ", known],
    );
    volume.attach_with(&[]).end(Signal::SIGTERM);
}

#[test]
fn a_daemon_notes_now_and_again_how_far_its_cache_has_come() {
    needs_serving!();
    let volume = Volume::created(16, 16 * MIB);
    let attached = volume.attach_with(&[]);
    let (first, file) = note(&volume);
    assert_eq!(
        (&first["durable"], &first["closed"], &first["version"]),
        (&0.into(), &false.into(), &1.into())
    );
    assert_eq!(
        (&first["volume"], &first["cache"]),
        (&volume.name.as_str().into(), &volume.cache.to_str().into())
    );
    assert_eq!(
        first["uuid"],
        wb!("wbdump", "super", &volume.cache, "--json").json()["extension"]["uuid"]
    );
    let mode = |path: &Path| std::fs::metadata(path).expect("a file").mode() & 0o777;
    assert_eq!([mode(&file), mode(&volume.path("state"))], [0o600, 0o755]);
    write(&attached, 0, 1);
    // A whole segment is durable.
    volume.must(&["drain", &volume.name]);
    assert!(wait_for(|| note(&volume).0["written_back"] == 1), "{:?}", note(&volume));
    assert_eq!(note(&volume).0["closed"], false);
    attached.detach(&[]);
    assert_eq!(
        (&note(&volume).0["closed"], &note(&volume).0["durable"]),
        (&true.into(), &1.into())
    );
}

#[test]
fn a_replay_notes_what_it_leaves_and_one_until_a_point_or_one_that_only_looks_does_not() {
    needs_serving!();
    let volume = Volume::created(16, 16 * MIB);
    let attached = volume.attach_with(&[]);
    write(&attached, 0, 1);
    attached.crash();
    let (copy, before) = (copy(&volume, "copy.img"), note(&volume));
    replays(&volume, &volume.cache, &["--dry-run"]);
    replays(&volume, &volume.cache, &["--until", "1"]);
    volume.attach_with(&["--read-only"]).detach(&[]);
    assert_eq!(note(&volume), before);
    replays(&volume, &volume.cache, &[]);
    let (after, _) = note(&volume);
    assert_eq!(
        (&after["written_back"], &after["volume"], &after["closed"]),
        (&1.into(), &().into(), &true.into())
    );
    is_refused(&volume, &copy, &["is older than this cache was", "generation"]);
    replays(&volume, &volume.cache, &[]);
}

#[test]
fn a_cache_that_was_salvaged_is_not_older() {
    needs_serving!();
    let volume = Volume::corrupt(16, 16 * MIB);
    let refused = volume.wbctl(&["attach", &volume.name]);
    assert!(refused.code == 1 && refused.stderr.contains("corrupt"), "{refused:?}");
    volume.attach_with(&["--salvage=stop"]).end(Signal::SIGTERM);
    volume.attach_with(&[]).end(Signal::SIGTERM);
}

#[test]
fn a_damaged_page_of_the_superblock_does_not_make_a_cache_older() {
    needs_serving!();
    let (volume, _) = drained();
    // The newer of the two pages, that of generation 3.
    flip_bit(&volume.cache, 128 * 1024 + 100);
    replays(&volume, &volume.cache, &["--dry-run"]);
    volume.attach_with(&[]).detach(&[]);
    let older = copy(&volume, "older.img");
    let attached = volume.attach_with(&[]);
    write(&attached, 0, 3);
    attached.detach(&[]);
    // Its log tells: the page that is left may be the older one of the cache.
    flip_bit(&older, 64 * 1024 + 100);
    is_refused(
        &volume,
        &older,
        &["a page of its superblock is damaged, and its log is durable up to segment 2"],
    );
}

#[test]
fn what_cannot_be_noted_or_read_is_told_and_the_volume_is_served_all_the_same() {
    needs_serving!();
    let (volume, copy) = drained();
    let (_, file) = note(&volume);
    for (garbage, why) in [
        (&b"\x00\xff garbage"[..], "cannot read"),
        (br#"{"version": 7}"#, "it was written by a newer version of wb"),
        (&vec![b'x'; 1 << 20], "longer than"),
    ] {
        std::fs::write(&file, garbage).unwrap();
        let looked = volume.wbctl(&[&["replay", "--dry-run"], &pair(&copy, &volume)[..]].concat());
        assert_eq!((looked.code, looked.stderr.lines().count()), (0, 1), "{looked:?}");
        assert!(looked.stderr.contains(why) && looked.stderr.contains("older copy"), "{looked:?}");
    }
    let attached = volume.attach_with(&[]);
    assert!(attached.stderr().contains("older copy"), "{}", attached.stderr());
    attached.detach(&[]);
    assert_eq!(note(&volume).0["version"], 1, "a new one");

    let start = |folder: &str| {
        let mut command = volume.command(&["attach", &volume.name]);
        command.env("WB_STATE_DIR", folder);
        volume.start(command)
    };
    let attached = start("/dev/null/state");
    let said = attached.stderr();
    assert_eq!(said.matches("cannot note in /dev/null/state").count(), 1, "{said}");
    attached.detach(&[]);
    let attached = start("");
    assert!(!attached.stderr().contains("note"), "{}", attached.stderr());
    attached.detach(&[]);
    assert!(!Path::new("state").exists());
}

#[test]
fn a_second_cache_is_refused_while_the_recorded_one_is_dirty() {
    needs_serving!();
    let volume = Volume::created(16, 16 * MIB);
    let attached = volume.attach_with(&[]);
    write(&attached, 0, 1);
    attached.crash();
    let second = zeros(&volume.dir, "second.img", cache_bytes(16));
    assert_eq!(wb!("wbformat", &second, "--backing", &volume.backing).code, 0);
    let whose = format!(
        "it belongs to the volume '{}', whose cache {} ",
        volume.name,
        volume.cache.display()
    );
    let remove = format!("wbctl remove --force {}", volume.name);
    is_refused(&volume, &second, &[&format!("{whose}holds 1 dirty block. "), &remove]);
    let anyway = volume.wbctl(&[&["replay", "--older"], &pair(&second, &volume)[..]].concat());
    assert!(anyway.code == 1 && anyway.stderr.contains(&whose), "{anyway:?}");
    // A record of that one does not help either.
    let record = std::fs::read_to_string(volume.record()).unwrap();
    let record = record.replace(volume.cache.to_str().unwrap(), second.to_str().unwrap());
    std::fs::write(volume.path("config/second.toml"), record).unwrap();
    let refused = volume.wbctl(&["attach", "second"]);
    assert!(refused.code == 1 && refused.stderr.contains(&whose), "{refused:?}");
    std::fs::remove_file(volume.path("config/second.toml")).unwrap();

    // Its device is not there, but it was seen.
    let away = volume.path("away.img");
    std::fs::rename(&volume.cache, &away).unwrap();
    is_refused(
        &volume,
        &second,
        &[&format!("{whose}is not there, and may hold dirty data (last seen 2")],
    );
    // What is there is the same cache, by another name.
    replays(&volume, &away, &[]);
    assert_eq!(read_at(&volume.backing, 0, 1), [1]);
    replays(&volume, &second, &[]);
    std::fs::rename(&away, &volume.cache).unwrap();
    replays(&volume, &second, &[]);
}

#[test]
fn a_second_cache_is_refused_while_the_recorded_one_cannot_be_judged() {
    let volume = Volume::created(16, 16 * MIB);
    let second = zeros(&volume.dir, "second.img", cache_bytes(16));
    assert_eq!(wb!("wbformat", &second, "--backing", &volume.backing).code, 0);
    replays(&volume, &second, &[]);
    overwrite(&volume.cache, 0, &[0; 4096]);
    is_refused(
        &volume,
        &second,
        &["cannot tell whether the cache of that volume is clean", "not a cache device"],
    );
    volume.must(&["remove", "--force", &volume.name]);
    replays(&volume, &second, &[]);
}

#[test]
fn an_ordinary_user_replays_without_notes() {
    let pair = golden("few-1");
    let folder = pair.cache.parent().unwrap();
    assert_eq!(wb!("wbctl", "upgrade", "--cache", &pair.cache, "--backing", &pair.backing).code, 0);
    let mut command = Command::new(bin("wbctl"));
    command.args(["replay", "--cache"]).arg(&pair.cache).arg("--backing").arg(&pair.backing);
    // A folder in which only root may write.
    command.env("WB_STATE_DIR", folder.join("state"));
    if nix::unistd::geteuid().is_root() {
        use std::os::unix::process::CommandExt;
        for path in [&pair.cache, &pair.backing] {
            std::os::unix::fs::chown(path, Some(wb_tests::NOBODY), Some(wb_tests::NOBODY)).unwrap();
        }
        std::fs::set_permissions(folder, Permissions::from_mode(0o755)).unwrap();
        command.uid(wb_tests::NOBODY).gid(wb_tests::NOBODY);
    }
    let replayed = Outcome::of(command);
    assert_eq!((replayed.code, replayed.stderr.as_str()), (0, ""), "{replayed:?}");
    assert!(!nix::unistd::geteuid().is_root() || !folder.join("state").exists());
}
