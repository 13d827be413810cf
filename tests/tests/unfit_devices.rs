//! wb refuses devices that cannot work or that others use, before it writes anything. The message
//! says what is wrong, where, and what to do.

use libwb::device::IoBuf;
use nix::libc::O_DIRECT;
use std::fs::{File, Permissions, set_permissions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use wb_tests::{
    FailingFile, FileFaults, LoopDevice, MIB, Outcome, Volume, bin, cache_bytes, golden,
    has_program, needs_serving, noise, read_at, sha256, skip, system, unmount, wait_for, wb, zeros,
};

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// Runs a command of wbctl that must refuse, say all this in one line, and change nothing.
fn refuses(volume: &Volume, args: &[&str], says: &[&str]) {
    let before = volume.images();
    is_refusal(&volume.wbctl(args), "wbctl", says);
    assert_eq!(volume.images(), before, "{args:?}");
}

fn is_refusal(outcome: &Outcome, program: &str, says: &[&str]) {
    assert_eq!((outcome.code, outcome.stdout.as_str()), (1, ""), "{outcome:?}");
    let last = outcome.stderr.lines().last().unwrap_or_default();
    assert!(last.starts_with(&format!("{program}: ")), "{outcome:?}");
    for part in says {
        assert!(last.contains(part), "{part:?} is not in {outcome:?}");
    }
}

fn create_refuses(volume: &Volume, more: &[&str], says: &[&str]) {
    refuses(volume, &[&["create", volume.name.as_str()], &volume.pair()[..], more].concat(), says);
    assert!(!volume.record().exists(), "nothing is recorded");
}

fn all_refuse(volume: &Volume, says: &[&str]) {
    create_refuses(volume, &["--force", "--discard-dirty"], says);
    refuses(volume, &[&["replay"], &volume.pair()[..]].concat(), says);
    if nix::unistd::geteuid().is_root() {
        refuses(volume, &[&["attach", &volume.name], &volume.pair()[..]].concat(), says);
    }
}

fn wbformat_refuses(device: &Path, says: &[&str]) {
    let before = sha256(device);
    is_refusal(&wb!("wbformat", device, "--force", "--discard-dirty"), "wbformat", says);
    assert_eq!(sha256(device), before);
}

/// A volume on loop devices over its files.
fn on_loop_devices(mut volume: Volume) -> (Volume, [LoopDevice; 2]) {
    let devices = [&volume.cache, &volume.backing]
        .map(|file| LoopDevice::attach(file).expect("a loop device"));
    [volume.cache, volume.backing] = devices.each_ref().map(|device| device.path.clone());
    (volume, devices)
}

#[test]
fn a_file_that_nobody_is_to_write_to_is_refused() {
    if !nix::unistd::geteuid().is_root() {
        skip!("needs root: the system itself refuses others");
    }
    let volume = Volume::golden("few-1");
    for device in [&volume.cache, &volume.backing] {
        set_permissions(device, Permissions::from_mode(0o444)).unwrap();
        let chmod = format!("chmod u+w {}", device.display());
        all_refuse(&volume, &[text(device), "write-protected", &chmod]);
        set_permissions(device, Permissions::from_mode(0o644)).unwrap();
    }
    set_permissions(&volume.cache, Permissions::from_mode(0o400)).unwrap();
    wbformat_refuses(&volume.cache, &["write-protected", "chmod u+w"]);
    set_permissions(&volume.cache, Permissions::from_mode(0o600)).unwrap();
    volume.must(&[&["replay"], &volume.pair()[..]].concat());
}

#[test]
fn a_block_device_that_takes_no_writes_is_refused() {
    needs_serving!();
    for which in 0..2 {
        let mut volume = Volume::golden("few-1");
        let device = if which == 0 { &mut volume.cache } else { &mut volume.backing };
        let read_only = LoopDevice::attach_read_only(device).expect("a loop device");
        device.clone_from(&read_only.path);
        let advice = format!("blockdev --setrw {}", read_only.path.display());
        let says = [text(&read_only.path), "write-protected", &advice];
        all_refuse(&volume, &says);
        wbformat_refuses(&read_only.path, &says);
    }
}

#[test]
fn a_file_that_a_loop_device_stands_on_is_in_use_by_whatever_name() {
    needs_serving!();
    let mut volume = Volume::golden("few-1");
    let (link, hard_link) = (volume.path("link"), volume.path("hard-link"));
    std::os::unix::fs::symlink(&volume.cache, &link).unwrap();
    std::fs::hard_link(&volume.cache, &hard_link).unwrap();
    let device = LoopDevice::attach(&volume.cache).expect("a loop device");
    let path = device.path.clone();
    let stands = format!("in use: the loop device {} uses it", path.display());
    let advice = format!("losetup --detach {}", path.display());
    for name in [volume.cache.clone(), link, hard_link] {
        wbformat_refuses(&name, &[text(&name), &stands, &advice]);
        volume.cache = name;
        all_refuse(&volume, &[&stands]);
    }
    // Who only looks is let in.
    assert_eq!(wb!("wbcheck", &volume.cache).code, 0);
    drop(device);
    let device = LoopDevice::attach(&volume.backing).expect("a loop device");
    all_refuse(&volume, &[text(&volume.backing), "uses it"]);
    drop(device);
    volume.must(&[&["replay"], &volume.pair()[..]].concat());
}

#[test]
fn a_block_device_that_a_loop_device_stands_on_is_in_use() {
    needs_serving!();
    let (volume, [cache, _backing]) = on_loop_devices(Volume::golden("few-1"));
    let device = LoopDevice::attach(&cache.path).expect("a loop device");
    let stands = format!("in use: the loop device {} uses it", device.path.display());
    wbformat_refuses(&cache.path, &[text(&cache.path), &stands]);
    all_refuse(&volume, &[&stands]);
    drop(device);
    volume.must(&[&["replay"], &volume.pair()[..]].concat());
}

#[test]
fn a_file_that_the_system_swaps_to_is_in_use() {
    needs_serving!("mkswap", "swapon", "swapoff");
    let dir = tempfile::TempDir::with_prefix("wb swap ").unwrap();
    // As small as swap can be, so that the system is not changed by it.
    let file = dir.path().join("swap file");
    std::fs::write(&file, vec![0; 64 << 10]).unwrap();
    set_permissions(&file, Permissions::from_mode(0o600)).unwrap();
    let path = text(&file);
    if system("mkswap", &[path]).and_then(|_| system("swapon", &[path])).is_none() {
        skip!("cannot swap to a file here");
    }
    let outcome = wb!("wbformat", &file, "--force");
    system("swapoff", &[path]).expect("a file that is swapped to");
    let advice = format!("swapoff {path}");
    is_refusal(&outcome, "wbformat", &[path, "in use: the system swaps to it", &advice]);
}

#[test]
fn a_cache_device_is_no_backing_device_unless_that_is_insisted_on() {
    let mut volume = Volume::blank(4, 8 * MIB);
    let other = golden("few-1");
    volume.backing = other.cache.clone();
    let says = [text(&other.cache), "it is a cache device of wb", "--force"];
    create_refuses(&volume, &[], &says);
    create_refuses(&volume, &["--compat"], &says);
    is_refusal(&wb!("wbformat", &volume.cache, "--backing", &other.cache), "wbformat", &says);
    assert_eq!(wb!("wbformat", &volume.cache, "--backing", &other.cache, "--force").code, 0);
    volume.create(&["--force"]);
}

#[test]
fn a_backing_device_smaller_than_its_cache_is_refused_unless_that_is_insisted_on() {
    let volume = Volume::blank(16, 8 * MIB);
    let says =
        [text(&volume.backing), "has 8388608 bytes, and its cache device 9437184", "--force"];
    create_refuses(&volume, &[], &says);
    is_refusal(&wb!("wbformat", &volume.cache, "--backing", &volume.backing), "wbformat", &says);
    volume.create(&["--force"]);
    let same = Volume::blank(14, 8 * MIB);
    same.create(&[]);
}

#[test]
fn a_backing_device_that_could_not_be_attached_is_refused_when_the_volume_is_created() {
    let mut volume = Volume::blank(4, 8 * MIB);
    let is_same = wb!("wbformat", &volume.cache, "--backing", &volume.cache);
    is_refusal(&is_same, "wbformat", &["are the same device"]);
    // Where a file can have such a size.
    let dir = tempfile::TempDir::new_in("/dev/shm");
    let Some(dir) = dir.ok() else { skip!("needs /dev/shm") };
    volume.backing = dir.path().join("huge");
    if File::create(&volume.backing).and_then(|file| file.set_len(5 << 50)).is_err() {
        skip!("needs a filesystem with files of 5 PiB at /dev/shm");
    }
    let args = [&["create", volume.name.as_str()], &volume.pair()[..]].concat();
    is_refusal(&volume.wbctl(&args), "wbctl", &["too large for a backing device"]);
    assert!(!volume.record().exists());
    let formatted = wb!("wbformat", &volume.cache, "--backing", &volume.backing);
    is_refusal(&formatted, "wbformat", &["too large for a backing device"]);
}

#[test]
fn sectors_of_4096_bytes_need_a_backing_device_that_ends_with_one() {
    let volume = Volume::blank(4, 8 * MIB + 512);
    let says =
        [text(&volume.backing), "8389120 bytes are not a multiple of 4096", "--sector-size 512"];
    create_refuses(&volume, &["--sector-size", "4096"], &says);
    volume.create(&[]);
    if nix::unistd::geteuid().is_root() {
        refuses(&volume, &["attach", &volume.name, "--sector-size", "4096"], &says);
    }
}

fn allocated(file: &Path) -> u64 {
    std::fs::metadata(file).expect("a file").blocks() * 512
}

#[test]
fn a_sparse_cache_file_is_allocated_unless_that_is_not_wanted() {
    let bytes = cache_bytes(16);
    type Make = fn(&Volume, &[&str]);
    let makes: [Make; 2] = [
        |volume, more| drop(volume.create(more)),
        |volume, more| {
            let formatted = wb_tests::run("wbformat", [&[text(&volume.cache)], more].concat());
            assert_eq!(formatted.code, 0, "{formatted:?}");
        },
    ];
    for make in makes {
        let volume = Volume::blank(16, 16 * MIB);
        make(&volume, &["--sparse"]);
        assert!(allocated(&volume.cache) < bytes, "as it was");
        let volume = Volume::blank(16, 16 * MIB);
        assert_eq!(wb!("wbformat", &volume.cache, "--dry-run").code, 0);
        assert!(allocated(&volume.cache) < bytes, "a dry run changes nothing");
        make(&volume, &[]);
        assert!(allocated(&volume.cache) >= bytes, "{} of {bytes}", allocated(&volume.cache));
        assert_eq!(std::fs::metadata(&volume.cache).unwrap().len(), bytes);
        assert_eq!(allocated(&volume.backing), 0, "the backing device is left as it is");
    }
}

#[test]
fn a_sparse_cache_file_that_its_filesystem_has_no_room_for_is_refused() {
    needs_serving!();
    let mut volume = Volume::blank(4, 64 * MIB);
    let on = volume.path("small");
    std::fs::create_dir(&on).unwrap();
    if system("mount", &["-t", "tmpfs", "-o", "size=8m", "none", text(&on)]).is_none() {
        skip!("cannot mount a tmpfs");
    }
    let unmounted = Unmount(&on);
    volume.cache = on.join("cache.img");
    File::create(&volume.cache).and_then(|file| file.set_len(32 * MIB)).unwrap();
    let says = [
        text(&volume.cache),
        "33554432 bytes of this file are not allocated",
        "has room for",
        "--sparse",
    ];
    create_refuses(&volume, &[], &says);
    assert_eq!(allocated(&volume.cache), 0, "none of the room is taken");
    wbformat_refuses(&volume.cache, &says);
    volume.create(&["--sparse"]);
    drop(unmounted);
}

/// Unmounts it, also when the test fails.
struct Unmount<'a>(&'a Path);

impl Drop for Unmount<'_> {
    fn drop(&mut self) {
        unmount(self.0);
    }
}

#[test]
fn a_cache_device_that_is_full_for_a_while_costs_nothing() {
    needs_serving!();
    let mut volume = Volume::blank(16, 16 * MIB);
    let cache = FailingFile::over(&volume.cache, &volume.path("failing"));
    volume.cache = cache.path.clone();
    volume.create(&[]);
    let attached = volume.attach_with(&[]);
    cache.fail(FileFaults { full: true, ..FileFaults::default() });
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| {
            let device =
                File::options().write(true).custom_flags(O_DIRECT).open(&attached.device)?;
            device.write_all_at(&IoBuf::copy_of(&noise(1, 2 * MIB)), MIB)?;
            device.sync_all()
        });
        // More often than an error of another kind is tried again.
        let tries = |said: String| said.matches("the filesystem below it is full").count();
        assert!(wait_for(|| tries(attached.stderr()) > 6), "{}", attached.stderr());
        cache.heal();
        writing.join().expect("no panic").expect("there is room again");
    });
    assert_eq!(volume.status()["live"]["failure"], serde_json::Value::Null);
    assert!(read_at(&attached.device, MIB, 2 * MIB) == noise(1, 2 * MIB));
    attached.detach(&["--drain"]);
    assert!(read_at(&volume.backing, MIB, 2 * MIB) == noise(1, 2 * MIB));
}

#[test]
fn a_file_beyond_the_limit_for_files_is_refused_and_no_program_is_killed() {
    let limited = |command: &Command| Outcome::of(wb_tests::after("ulimit -f 100", command));
    let volume = Volume::golden("few-1");
    let before = volume.images();
    let says = ["may write files of 51200 bytes at most", "ulimit -f"];
    let mut format = Command::new(bin("wbformat"));
    is_refusal(&limited(format.arg(&volume.cache).arg("--discard-dirty")), "wbformat", &says);
    let mut verbs = vec!["create", "replay"];
    if nix::unistd::geteuid().is_root() {
        verbs.push("attach");
    }
    for verb in verbs {
        let name = if verb == "replay" { &[][..] } else { &[volume.name.as_str()] };
        let command = volume.command(&[&[verb], name, &volume.pair()[..]].concat());
        is_refusal(&limited(&command), "wbctl", &says);
    }
    assert_eq!(volume.images(), before);
    // On block devices, which have no such limit, what is recorded meets it.
    needs_serving!();
    let (volume, _devices) = on_loop_devices(Volume::blank(4, 8 * MIB));
    let command = volume.command(&[&["create", volume.name.as_str()], &volume.pair()[..]].concat());
    let refused = Outcome::of(wb_tests::after("ulimit -f 0", &command));
    is_refusal(&refused, "wbctl", &[text(&volume.record()), "File too large"]);
    assert!(!volume.record().exists());
}

#[test]
fn a_filesystem_on_a_loop_device_is_not_formatted_over_through_its_file() {
    needs_serving!("mkfs.ext4");
    let dir = tempfile::TempDir::new().unwrap();
    let (file, on) = (zeros(&dir, "disk", 16 << 20), dir.path().join("mount"));
    std::fs::create_dir(&on).unwrap();
    if !has_program("mount") || system("mkfs.ext4", &["-q", "-F", text(&file)]).is_none() {
        skip!("cannot make a filesystem");
    }
    if system("mount", &["-o", "loop", text(&file), text(&on)]).is_none() {
        skip!("cannot mount a filesystem");
    }
    let outcome = wb!("wbformat", &file, "--force", "--discard-dirty");
    unmount(&on);
    is_refusal(&outcome, "wbformat", &[text(&file), "in use: the loop device /dev/loop"]);
}
