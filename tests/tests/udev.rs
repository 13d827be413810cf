//! What udev makes of a volume and of a cache device.

use std::fs::File;
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
mount -t tmpfs none /dev
mknod /dev/null c 1 3
mknod "$2" b "$3" "$4"
udevadm test --action=change "/sys/class/block/${2#/dev/}"
"#;

/// What udev makes of a block device with the rules: the lines of its properties.
fn udev(rules: &Path, device: &Path) -> Option<Vec<String>> {
    let number = std::fs::metadata(device).expect("what the test needs").rdev();
    let (major, minor) = (nix::sys::stat::major(number), nix::sys::stat::minor(number));
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation=private", "sh", "-c", TRY_RULES, "sh"]);
    command.arg(rules).arg(device).args([major.to_string(), minor.to_string()]);
    let outcome = Outcome::of(command);
    (outcome.code == 0).then(|| [outcome.stdout, outcome.stderr].concat().lines().map(String::from).collect())
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
    let Some(found) = udev(&rules, &attached.device) else {
        skip!("needs udevadm test in a mount namespace")
    };
    let link = volume.link().to_str().unwrap().to_string();
    assert!(links(&found).split(' ').any(|found| found == link), "{found:#?}");
    attached.detach(&[]);

    let cache = LoopDevice::attach(&volume.cache).unwrap();
    let found = udev(&rules, &cache.path).unwrap();
    let uuid = wb!("wbdump", "super", &volume.cache, "--json").json()["extension"]["uuid"].clone();
    let uuid = uuid.as_str().unwrap();
    for line in
        ["ID_FS_TYPE=wb_cache", &format!("ID_FS_UUID={uuid}"), &format!("ID_FS_LABEL={}", volume.name)]
    {
        assert!(found.iter().any(|found| found == line), "{line} is not in {found:#?}");
    }
    assert!(links(&found).split(' ').any(|found| found == format!("/dev/disk/by-uuid/{uuid}")), "{found:#?}");

    let other = LoopDevice::attach(&volume.backing).unwrap();
    let found = udev(&rules, &other.path).unwrap();
    assert!(!found.iter().any(|line| line.starts_with("ID_FS_")), "{found:#?}");
}

#[test]
fn identity_tells_caches_from_other_files() {
    let volume = Volume::created(8, 8 * MIB);
    let shown = wb!("wbdump", "identity", &volume.cache);
    assert_eq!((shown.code, shown.first_line()), (0, "ID_FS_TYPE=wb_cache"), "{shown:?}");
    assert!(shown.stdout.contains(&format!("\nID_FS_LABEL={}\n", volume.name)), "{shown:?}");
    // A cache of the kernel module has no identity, but is one.
    let module = wb!("wbdump", "identity", &Volume::golden("few-1").cache);
    assert_eq!((module.code, module.stdout.as_str()), (0, "ID_FS_TYPE=wb_cache\nID_FS_USAGE=other\n"));
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
