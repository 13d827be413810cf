//! What udev makes of a volume and of a cache device.

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use wb_tests::{LoopDevice, MIB, Outcome, Volume, dist, needs_serving, skip, wb};

/// Rules are tried in namespaces of their own, so that nothing of this machine changes.
const TRY_RULES: &str = r#"
set -e
mount -t tmpfs none /run
mkdir -p /run/udev/rules.d
cp "$1" /run/udev/rules.d/60-wb.rules
mkdir -p /run/wb
mount --bind "$5" /run/wb
mount -t tmpfs none /dev
mknod /dev/null c 1 3
mknod "$2" b "$3" "$4"
udevadm test --action=change "/sys/class/block/${2#/dev/}"
"#;

/// What udev makes of a block device with the rules, and with such daemons' files: the lines of its
/// properties.
fn udev(rules: &Path, device: &Path, run: &Path) -> Option<Vec<String>> {
    let number = std::fs::metadata(device).expect("what the test needs").rdev();
    let (major, minor) = (nix::sys::stat::major(number), nix::sys::stat::minor(number));
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation=private", "sh", "-c", TRY_RULES, "sh"]);
    command.arg(rules).arg(device).args([major.to_string(), minor.to_string()]).arg(run);
    let outcome = Outcome::of(command);
    (outcome.code == 0)
        .then(|| [outcome.stdout, outcome.stderr].concat().lines().map(String::from).collect())
}

fn links(properties: &[String]) -> &str {
    properties.iter().find_map(|line| line.strip_prefix("DEVLINKS=")).unwrap_or_default()
}

#[test]
fn udev_names_a_volume_and_knows_a_cache_device() {
    needs_serving!("udevadm", "unshare");
    let volume = Volume::created(16, 16 * MIB);
    let rules = volume.path("60-wb.rules");
    std::fs::write(&rules, dist("udev/60-wb.rules", &["wbdump"])).unwrap();
    let attached = volume.attach_with(&[]);
    let run = volume.path("run");
    let Some(found) = udev(&rules, &attached.device, &run) else {
        skip!("needs udevadm test in a mount namespace")
    };
    let link = volume.link().to_str().unwrap().to_string();
    assert!(links(&found).split(' ').any(|found| found == link), "{found:#?}");
    attached.detach(&[]);

    let cache = LoopDevice::attach(&volume.cache).unwrap();
    let found = udev(&rules, &cache.path, &run).unwrap();
    let uuid = wb!("wbdump", "super", &volume.cache, "--json").json()["extension"]["uuid"].clone();
    let uuid = uuid.as_str().unwrap();
    for line in [
        "ID_FS_TYPE=wb_cache",
        &format!("ID_FS_UUID={uuid}"),
        &format!("ID_FS_LABEL={}", volume.name),
    ] {
        assert!(found.iter().any(|found| found == line), "{line} is not in {found:#?}");
    }
    assert!(
        links(&found).split(' ').any(|found| found == format!("/dev/disk/by-uuid/{uuid}")),
        "{found:#?}"
    );

    let other = LoopDevice::attach(&volume.backing).unwrap();
    let found = udev(&rules, &other.path, &run).unwrap();
    assert!(!found.iter().any(|line| line.starts_with("ID_FS_")), "{found:#?}");
}

/// A mount that stands in no folder, as the daemon's, with a file of this name at its root.
fn file_at_the_root_of_a_mount(name: &str) -> File {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).expect("what the test needs");
    fsconfig_create(&context).expect("what the test needs");
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty());
    let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_CLOEXEC;
    let file = openat(mount.expect("what the test needs"), name, flags, Mode::S_IRWXU);
    let file = File::from(file.expect("what the test needs"));
    file.set_len(16 * MIB).expect("what the test needs");
    file
}

#[test]
fn udev_does_not_name_a_loop_device_after_a_volume_that_is_not_the_daemons() {
    needs_serving!("udevadm", "unshare", "losetup");
    let volume = Volume::created(16, 16 * MIB);
    let rules = volume.path("60-wb.rules");
    std::fs::write(&rules, dist("udev/60-wb.rules", &["wbdump"])).unwrap();
    let run = volume.path("run");
    std::fs::create_dir_all(&run).unwrap();
    let file = file_at_the_root_of_a_mount(&format!("{}.wb", volume.name));
    let forged = LoopDevice::attach(Path::new(&format!(
        "/proc/{}/fd/{}",
        std::process::id(),
        file.as_raw_fd()
    )));
    let forged = forged.expect("a loop device");
    let shows = Path::new("/sys/class/block")
        .join(forged.path.file_name().unwrap())
        .join("loop/backing_file");
    assert_eq!(std::fs::read_to_string(&shows).unwrap(), format!("/{}.wb\n", volume.name));
    let Some(found) = udev(&rules, &forged.path, &run) else {
        skip!("needs udevadm test in a mount namespace")
    };
    let link = volume.link().to_str().unwrap().to_string();
    let is_named = |found: &[String]| links(found).split(' ').any(|found| found == link);
    assert!(!is_named(&found), "the volume is not attached: {found:#?}");
    // The daemon has another device.
    let mut attached = volume.attach_with(&[]);
    let found = udev(&rules, &forged.path, &run).unwrap();
    assert!(!is_named(&found), "{found:#?}");
    assert!(is_named(&udev(&rules, &attached.device, &run).unwrap()));
    // It had this one, but was killed.
    let note = run.join(&volume.name).join("device");
    attached.kill();
    let name = forged.path.file_name().unwrap().to_str().unwrap();
    assert!(std::fs::read_to_string(&note).is_ok_and(|text| text.starts_with("loop")));
    std::fs::write(&note, format!("{name}\n")).unwrap();
    let found = udev(&rules, &forged.path, &run).unwrap();
    assert!(!is_named(&found), "{found:#?}");
    // What the rule goes by: a daemon that lives, and says so.
    drop(attached);
    let _attached = volume.attach_with(&[]);
    std::fs::write(&note, format!("{name}\n")).unwrap();
    assert!(is_named(&udev(&rules, &forged.path, &run).unwrap()));
}

#[test]
fn identity_tells_caches_from_other_files() {
    let volume = Volume::created(8, 8 * MIB);
    let shown = wb!("wbdump", "identity", &volume.cache);
    assert_eq!((shown.code, shown.first_line()), (0, "ID_FS_TYPE=wb_cache"), "{shown:?}");
    assert!(shown.stdout.contains(&format!("\nID_FS_LABEL={}\n", volume.name)), "{shown:?}");
    // A cache of the kernel module has no identity, but is one.
    let module = wb!("wbdump", "identity", &Volume::golden("few-1").cache);
    assert_eq!(
        (module.code, module.stdout.as_str()),
        (0, "ID_FS_TYPE=wb_cache\nID_FS_USAGE=other\n")
    );
    let empty = volume.path("empty");
    File::create(&empty).unwrap();
    for (other, why) in [
        (volume.backing.as_path(), "not a cache device"),
        (&empty, "cannot read"),
        (Path::new("/dev/null"), "neither"),
    ] {
        let refused = wb!("wbdump", "identity", other);
        assert_eq!((refused.code, refused.stdout.as_str()), (1, ""), "{refused:?}");
        assert!(refused.stderr.contains(why) && refused.stderr.lines().count() == 1, "{refused:?}");
    }
}
