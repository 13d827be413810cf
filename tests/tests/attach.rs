//! The life of a volume: created, attached, watched, flushed, drained, detached.

use nix::sys::signal::Signal;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Command;
use wb_tests::{
    Filesystem, MIB, Volume, needs_serving, noise, overwrite, read_at, sha256, sha256_direct,
    wait_for,
};

#[test]
fn a_volume_lives_from_create_to_detach() {
    needs_serving!();
    let volume = Volume::blank(8, 16 * MIB);
    assert_eq!(volume.must(&["list"]), "no volumes; see wbctl create\n");
    assert!(volume.create(&[]).starts_with(&format!("created '{}'", volume.name)));
    assert_eq!(volume.status()["state"], "detached");
    let attached = volume.attach_with(&[]);
    assert_eq!(std::fs::read_link(volume.link()).unwrap(), attached.device);
    let listed = volume.must(&["list"]);
    assert!(listed.contains(&volume.name) && listed.contains(attached.device_str()), "{listed}");
    let status = volume.must(&["status", &volume.name]);
    assert!(status.contains("attached") && status.contains(attached.device_str()), "{status}");
    attached.detach(&[]);
    assert!(!volume.link().is_symlink() && !volume.socket().exists() && volume.is_gone());
    assert_eq!(volume.status()["state"], "detached");
}

#[test]
fn a_new_cache_is_not_called_recovered() {
    needs_serving!();
    let volume = Volume::created(8, 16 * MIB);
    let attached = volume.attach_with(&[]);
    let said = attached.stderr();
    assert!(said.contains("the cache is new") && !said.contains("recovered"), "{said}");
    overwrite(&attached.device, 0, &noise(1, 4096));
    attached.detach(&[]);
    let attached = volume.attach_with(&[]);
    assert!(attached.stderr().contains("recovered in"), "{}", attached.stderr());
    attached.detach(&[]);
}

/// Such a protection stays on a loop device when it is detached.
#[test]
fn a_loop_device_that_was_write_protected_before_takes_writes() {
    needs_serving!();
    let volume = Volume::created(8, 16 * MIB);
    let attached = volume.attach_with(&[]);
    let device = attached.device.clone();
    wb_tests::succeeds(Command::new("blockdev").arg("--setro").arg(&device));
    attached.detach(&[]);
    // Another program may take it first, and the volume gets another one.
    let attached = volume.attach_with(&[]);
    overwrite(&attached.device, 0, &noise(1, MIB));
    assert_eq!(read_at(&attached.device, 0, MIB), noise(1, MIB));
    attached.detach(&[]);
    // For those who use it next.
    let _ = Command::new("blockdev").arg("--setrw").arg(&device).status();
}

#[test]
fn status_in_json_has_the_documented_keys() {
    needs_serving!();
    let volume = Volume::created(8, 16 * MIB);
    let attached = volume.attach_with(&[]);
    overwrite(&attached.device, 0, &noise(1, MIB));
    File::open(&attached.device).unwrap().sync_all().unwrap();
    let status = volume.status();
    for (key, value) in [
        ("name", volume.name.as_str()),
        ("state", "attached"),
        ("device", attached.device_str()),
        ("cache", volume.cache.to_str().unwrap()),
        ("backing", volume.backing.to_str().unwrap()),
    ] {
        assert_eq!(status[key], value, "{status}");
    }
    let live = &status["live"];
    assert_eq!(live["volume_bytes"], 16 * MIB);
    assert_eq!(live["log_bytes"], 4 * MIB);
    assert_eq!(live["counters"]["write_bytes"], MIB);
    for key in
        ["free_bytes", "dirty_bytes", "used_bytes", "newest_segment", "durable_segment", "pid"]
    {
        assert!(live[key].is_u64(), "{key}: {status}");
    }
    assert_eq!(volume.must(&["list", "--json"]).lines().count(), 1);
    attached.detach(&[]);
    assert!(volume.status()["live"].is_null());
}

#[test]
fn the_loop_device_has_the_sector_size_that_was_asked_for() {
    needs_serving!("blockdev");
    for size in ["512", "4096"] {
        let volume = Volume::blank(8, 16 * MIB);
        volume.create(&["--sector-size", size]);
        let attached = volume.attach_with(&[]);
        assert_eq!(attached.sector_size(), size);
        assert_eq!(volume.status()["live"]["sector_size"].to_string(), size);
        attached.detach(&[]);
        let attached = volume.attach_with(&["--sector-size", "4096"]);
        assert_eq!(attached.sector_size(), "4096", "the command line wins over the record");
    }
}

#[test]
fn the_data_is_there_after_each_way_to_end() {
    needs_serving!();
    for signal in [Some(Signal::SIGTERM), Some(Signal::SIGINT), None] {
        let volume = Volume::created(16, 16 * MIB);
        let attached = volume.attach_with(&[]);
        // No sync: that is up to detach.
        overwrite(&attached.device, 12345, &noise(2, 3 * MIB));
        match signal {
            Some(signal) => attached.end(signal),
            None => attached.detach(&[]),
        }
        assert!(!volume.link().is_symlink() && volume.is_gone());
        let attached = volume.attach_with(&[]);
        assert!(read_at(&attached.device, 12345, 3 * MIB) == noise(2, 3 * MIB), "{signal:?}");
    }
}

#[test]
fn drain_leaves_nothing_dirty() {
    needs_serving!();
    let volume = Volume::created(16, 16 * MIB);
    let attached = volume.attach_with(&[]);
    overwrite(&attached.device, 4096, &noise(3, 2 * MIB));
    File::open(&attached.device).unwrap().sync_all().unwrap();
    let flushed = volume.must(&["flush", &volume.name]);
    assert_eq!(flushed, format!("flushed '{}'\n", volume.name));
    let drained = volume.must(&["drain", &volume.name]);
    assert!(drained.starts_with(&format!("drained '{}'", volume.name)), "{drained}");
    let live = volume.status()["live"].clone();
    assert_eq!(
        (&live["dirty_bytes"], &live["counters"]["written_back_bytes"]),
        (&0.into(), &(2 * MIB).into())
    );
    assert!(read_at(&volume.backing, 4096, 2 * MIB) == noise(3, 2 * MIB));
    assert_eq!(sha256(&volume.backing), sha256_direct(&attached.device));
}

#[test]
fn an_idle_volume_is_written_back_by_itself() {
    needs_serving!();
    let volume = Volume::created(16, 16 * MIB);
    let attached = volume.attach_with(&[]);
    overwrite(&attached.device, 0, &noise(4, MIB));
    File::open(&attached.device).unwrap().sync_all().unwrap();
    assert!(wait_for(|| volume.status()["live"]["dirty_bytes"] == 0), "{}", volume.status());
    assert!(read_at(&volume.backing, 0, MIB) == noise(4, MIB));
}

#[test]
fn detach_refuses_while_the_device_is_mounted_and_says_where() {
    needs_serving!("mkfs.ext4");
    let volume = Volume::created(16, 32 * MIB);
    let mut attached = volume.attach_with(&[]);
    Filesystem::Ext4.make(&attached.device);
    let on = attached.mount();
    for options in [&[][..], &["--drain"]] {
        let refused = volume.wbctl(&[&["detach", volume.name.as_str()], options].concat());
        let expected = format!(
            "wbctl: {} is mounted on {}; release it first, or use --force and let its users fail\n",
            attached.device_str(),
            on.display()
        );
        assert_eq!((refused.code, refused.stderr), (1, expected));
    }
    std::fs::write(on.join("still"), "works").unwrap();
    attached.unmount();
    attached.detach(&["--drain"]);
}

#[test]
fn detach_refuses_while_another_program_holds_the_device() {
    needs_serving!();
    let volume = Volume::created(16, 32 * MIB);
    let mut attached = volume.attach_with(&[]);
    let held =
        libwb::device::probe::open(&attached.device, libwb::device::probe::Access::Write).unwrap();
    let refused = volume.wbctl(&["detach", &volume.name]);
    assert_eq!(refused.code, 1, "{refused:?}");
    assert!(refused.stderr.contains("is held by another program"), "{refused:?}");
    drop(held);
    // A program that another test is just starting may have inherited the open file for a moment.
    assert!(wait_for(|| volume.wbctl(&["detach", &volume.name]).code == 0));
    assert_eq!(attached.wait().code(), Some(0), "{}", attached.stderr());
}

#[test]
fn detach_refuses_while_a_program_has_the_device_open_and_says_which() {
    needs_serving!();
    let volume = Volume::created(16, 32 * MIB);
    let mut attached = volume.attach_with(&[]);
    let device = File::open(&attached.device).unwrap();
    let mut program =
        std::process::Command::new("sleep").arg("1000").stdin(device).spawn().unwrap();
    let refused = [&[][..], &["--drain"]]
        .map(|options| volume.wbctl(&[&["detach", volume.name.as_str()], options].concat()));
    program.kill().unwrap();
    program.wait().unwrap();
    for refused in refused {
        let expected = format!("is open in sleep (process {})", program.id());
        assert!(refused.code == 1 && refused.stderr.contains(&expected), "{refused:?}");
    }
    volume.must(&["detach", &volume.name]);
    assert_eq!(attached.wait().code(), Some(0), "{}", attached.stderr());
}

#[test]
fn detach_by_force_takes_a_mounted_device_away() {
    needs_serving!("mkfs.ext4");
    let volume = Volume::created(16, 32 * MIB);
    let mut attached = volume.attach_with(&[]);
    Filesystem::Ext4.make(&attached.device);
    let on = attached.mount();
    std::fs::write(on.join("before"), "kept").unwrap();
    File::open(on.join("before")).unwrap().sync_all().unwrap();
    volume.must(&["detach", "--force", &volume.name]);
    assert_eq!(attached.wait().code(), Some(0), "{}", attached.stderr());
    attached.unmount();
    assert!(volume.is_gone());
    let mut attached = volume.attach_with(&[]);
    let on = attached.mount();
    assert_eq!(std::fs::read_to_string(on.join("before")).unwrap(), "kept");
}

#[test]
fn tunables_are_taken_shown_and_kept() {
    needs_serving!();
    let volume = Volume::blank(8, 16 * MIB);
    volume.create(&["nr_max_batched_writeback=7"]);
    let key =
        |volume: &Volume| volume.status()["live"]["tunables"]["nr_max_batched_writeback"].clone();
    let attached = volume.attach_with(&[]);
    assert_eq!(key(&volume), 7);
    let shown = volume.must(&["status", &volume.name]);
    let line = shown.lines().find(|line| line.contains("nr_max_batched_writeback"));
    assert!(line.is_some_and(|line| line.trim_end().ends_with(" 7 segments")), "{shown}");
    attached.detach(&[]);
    let attached = volume.attach_with(&["nr_max_batched_writeback=9"]);
    assert_eq!(key(&volume), 9);
    attached.detach(&[]);
    let _attached = volume.attach_with(&[]);
    assert_eq!(key(&volume), 7, "what was given to one attach is not kept");
}

#[test]
fn a_write_beyond_the_end_is_refused_and_the_last_sector_is_not() {
    needs_serving!();
    // No whole number of blocks.
    let volume = Volume::created(8, 16 * MIB + 512);
    let attached = volume.attach_with(&[]);
    let file = File::options().write(true).open(&attached.device).unwrap();
    file.write_all_at(&[9; 512], 16 * MIB).unwrap();
    assert!(file.write_all_at(&[9; 512], 16 * MIB + 512).is_err());
    drop(file);
    attached.detach(&["--drain"]);
    assert_eq!(read_at(&volume.backing, 16 * MIB, 512), [9; 512]);
}

#[test]
fn a_program_that_has_the_device_open_does_not_keep_the_daemon_from_ending() {
    needs_serving!();
    let volume = Volume::created(8, 16 * MIB);
    for end in [Signal::SIGTERM, Signal::SIGINT] {
        let mut attached = volume.attach_with(&[]);
        let device = File::options().read(true).write(true).open(&attached.device).unwrap();
        device.write_all_at(&noise(7, MIB), 0).unwrap();
        attached.signal(end);
        assert_eq!(attached.wait().code(), Some(0), "{}", attached.stderr());
        // Only now does its loop device go away.
        drop(device);
        assert!(wait_for(|| volume.is_gone()), "{:?} is still there", volume.loop_devices());
    }
    let attached = volume.attach_with(&[]);
    assert!(read_at(&attached.device, 0, MIB) == noise(7, MIB));
    attached.detach(&[]);
}

#[test]
fn a_tunable_may_follow_the_devices_where_no_name_is_given() {
    needs_serving!();
    let volume = Volume::created(8, 16 * MIB);
    let args =
        [&["attach"], &volume.pair()[..], &["nr_max_batched_writeback=7", "colour=red"]].concat();
    let refused = volume.wbctl(&args);
    assert_eq!(refused.code, 1);
    assert!(refused.stderr.contains("unknown tunable 'colour'"), "{refused:?}");
}
