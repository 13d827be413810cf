//! A daemon that is killed without warning leaves nothing behind, and loses nothing that was
//! durable.

use std::path::Path;
use wb_tests::{
    Attached, Filesystem, MIB, Volume, Writer, check_files, needs_serving, noise, overwrite,
    wait_for,
};

/// Kills the daemon while a writer is at work on `filesystem`; returns how many files were durable.
fn kill_in_mid_write(
    attached: &mut Attached,
    filesystem: Filesystem,
    on: &Path,
    files: u32,
) -> u32 {
    let writer = Writer::start(on);
    assert!(wait_for(|| writer.durable() >= files), "{filesystem:?}: {}", attached.stderr());
    attached.kill();
    let count = writer.end();
    attached.unmount();
    count
}

fn fsynced_files_survive(filesystem: Filesystem) {
    let volume = Volume::created(24, 512 * MIB);
    let mut attached = volume.attach_with(&[]);
    filesystem.make(&attached.device);
    for (round, files) in [60, 150, 5].into_iter().enumerate() {
        let on = attached.mount().join(round.to_string());
        std::fs::create_dir(&on).expect("a new folder");
        let count = kill_in_mid_write(&mut attached, filesystem, &on, files);
        assert!(volume.is_gone(), "{filesystem:?}, round {round}");
        drop(attached);
        attached = volume.attach_with(&[]);
        let on = attached.mount();
        check_files(&on.join(round.to_string()), count);
        attached.unmount();
        filesystem.check(&attached.device);
    }
    attached.detach(&["--drain"]);
    filesystem.check(&volume.backing);
    filesystem.with_image(&volume.backing, |on| check_files(&on.join("1"), 150));
}

#[test]
fn files_that_were_fsynced_on_ext4_survive() {
    needs_serving!("mkfs.ext4", "e2fsck");
    fsynced_files_survive(Filesystem::Ext4);
}

#[test]
fn files_that_were_fsynced_on_xfs_survive() {
    needs_serving!("mkfs.xfs", "xfs_repair");
    fsynced_files_survive(Filesystem::Xfs);
}

#[test]
fn a_killed_daemon_leaves_no_mount_and_no_loop_device() {
    needs_serving!();
    let volume = Volume::created(16, 32 * MIB);
    let mut attached = volume.attach_with(&[]);
    let mounts = || std::fs::read_to_string("/proc/self/mounts").unwrap();
    let folder = volume.dir.path().to_str().unwrap();
    assert!(!mounts().contains(folder), "the daemon's mount is seen by nobody else");
    attached.kill();
    assert!(volume.is_gone() && !mounts().contains(folder));
    let status = volume.status();
    assert!(status["state"] == "crashed" && status["live"].is_null(), "{status}");
    for args in [&["list"][..], &["status"]] {
        let shown = volume.must(args);
        assert!(shown.contains("crashed") && shown.contains("its daemon was killed"), "{shown}");
    }
    let metrics = volume.must(&["status", "--prometheus"]);
    assert!(
        metrics.contains(&format!("wb_state{{volume=\"{}\",state=\"crashed\"}} 1", volume.name))
    );
    volume.attach_with(&[]).detach(&[]);
    assert_eq!(volume.status()["state"], "detached");
}

#[test]
fn a_loop_device_that_is_mounted_goes_once_it_is_unmounted() {
    needs_serving!("mkfs.ext4");
    let volume = Volume::created(16, 32 * MIB);
    let mut attached = volume.attach_with(&[]);
    Filesystem::Ext4.make(&attached.device);
    let on = attached.mount();
    attached.kill();
    assert_eq!(volume.loop_devices(), [attached.device.as_path()], "the mount holds it");
    let mounted = format!(
        "{} of an earlier daemon is still mounted on {}",
        attached.device_str(),
        on.display()
    );
    let is_shown = |state: &str| {
        let status = volume.status();
        assert_eq!(status["state"], state, "{status}");
        for shown in [
            status["message"].as_str().unwrap().into(),
            volume.must(&["list"]),
            volume.must(&["status"]),
        ] {
            assert!(shown.contains(&mounted), "{shown}");
        }
    };
    is_shown("crashed");
    assert!(
        std::fs::write(on.join("x"), "x")
            .and_then(|()| std::fs::File::open(on.join("x"))?.sync_all())
            .is_err()
    );
    attached.unmount();
    assert!(volume.is_gone());
}

#[test]
fn a_volume_can_be_attached_again_while_the_dead_device_is_still_mounted() {
    needs_serving!("mkfs.ext4");
    let volume = Volume::created(16, 32 * MIB);
    let mut dead = volume.attach_with(&[]);
    Filesystem::Ext4.make(&dead.device);
    let on = dead.mount();
    std::fs::write(on.join("kept"), noise(1, MIB)).unwrap();
    std::fs::File::open(on.join("kept")).unwrap().sync_all().unwrap();
    dead.kill();
    let mut attached = volume.attach_with(&[]);
    assert_ne!(attached.device, dead.device);
    assert_eq!(std::fs::read_link(volume.link()).unwrap(), attached.device);
    dead.unmount();
    let on = attached.mount();
    assert!(std::fs::read(on.join("kept")).is_ok_and(|data| data == noise(1, MIB)));
}

#[test]
fn a_second_daemon_for_a_volume_is_refused() {
    needs_serving!();
    let volume = Volume::created(16, 32 * MIB);
    let attached = volume.attach_with(&[]);
    overwrite(&attached.device, 0, &noise(2, MIB));
    let refused = volume.wbctl(&["attach", &volume.name]);
    let expected =
        format!("wbctl: volume '{0}' is attached already; see wbctl status {0}\n", volume.name);
    assert_eq!((refused.code, refused.stderr), (1, expected));

    let other = format!("{}-other", volume.name);
    let pair = volume.pair();
    for (cache, backing) in [(pair[1], pair[3]), (pair[3], pair[1])] {
        let refused = volume.wbctl(&["attach", &other, "--cache", cache, "--backing", backing]);
        assert_eq!((refused.code, refused.stdout.as_str()), (1, ""), "{refused:?}");
        assert_eq!(refused.stderr.lines().count(), 1, "{refused:?}");
        assert!(refused.stderr.contains("in use"), "{refused:?}");
    }
    attached.detach(&["--drain"]);
    assert!(wb_tests::read_at(&volume.backing, 0, MIB) == noise(2, MIB));
}

#[test]
fn detach_by_force_clears_what_a_killed_daemon_left() {
    needs_serving!("mkfs.ext4");
    let volume = Volume::created(16, 32 * MIB);
    let mut attached = volume.attach_with(&[]);
    Filesystem::Ext4.make(&attached.device);
    let on = attached.mount();
    attached.kill();
    assert!(volume.link().is_symlink() && volume.socket().exists());
    let refused = volume.wbctl(&["detach", &volume.name]);
    assert!(refused.code == 1 && refused.stderr.contains("is not attached"), "{refused:?}");
    let cleared = volume.must(&["detach", "--force", &volume.name]);
    let held = format!(
        "{} of an earlier daemon is still mounted on {}",
        attached.device_str(),
        on.display()
    );
    assert!(cleared.starts_with("cleared what") && cleared.contains(&held), "{cleared}");
    assert!(!volume.link().is_symlink() && !volume.path("run").join(&volume.name).exists());
    attached.unmount();
    assert!(volume.is_gone());
    let nothing = volume.wbctl(&["detach", "--force", &volume.name]);
    assert!(nothing.code == 1 && nothing.stderr.contains("nothing was left behind"), "{nothing:?}");
    drop(attached);
    volume.attach_with(&[]).detach(&[]);
}

#[test]
fn attach_says_what_still_holds_the_device_of_a_killed_daemon() {
    needs_serving!("mkfs.ext4");
    let volume = Volume::created(16, 32 * MIB);
    let mut dead = volume.attach_with(&[]);
    Filesystem::Ext4.make(&dead.device);
    dead.mount();
    dead.kill();
    let attached = volume.attach_with(&[]);
    let said = format!("{} of an earlier daemon is still mounted on", dead.device_str());
    assert!(attached.stderr().contains(&said), "{}", attached.stderr());
    dead.unmount();
    attached.detach(&[]);
}

#[test]
fn a_link_that_leads_elsewhere_is_replaced() {
    needs_serving!();
    let volume = Volume::created(16, 32 * MIB);
    std::fs::create_dir_all(volume.link().parent().unwrap()).unwrap();
    std::os::unix::fs::symlink("/dev/null", volume.link()).unwrap();
    let attached = volume.attach_with(&[]);
    assert_eq!(std::fs::read_link(volume.link()).unwrap(), attached.device);
    attached.detach(&[]);
    assert!(!volume.link().is_symlink());
}
