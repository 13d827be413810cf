//! Write-back as a user steers it: paused and resumed, drained, and a drain that is given up.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::process::Stdio;
use wb_tests::{MIB, Volume, needs_serving, noise, overwrite, wait_for};

fn dirty(volume: &Volume) -> u64 {
    volume.status()["live"]["dirty_bytes"].as_u64().expect("a number")
}

/// Writes, and makes it durable on the cache device.
fn write(volume: &Volume, device: &std::path::Path, bytes: u64) {
    overwrite(device, 0, &noise(1, bytes));
    std::fs::File::open(device).and_then(|device| device.sync_all()).expect("a device that takes writes");
    assert_eq!(dirty(volume), bytes);
}

#[test]
fn a_paused_volume_writes_back_when_it_is_resumed_or_drained() {
    needs_serving!();
    let volume = Volume::created(32, 8 * MIB);
    let name = volume.name.as_str();
    let attached = volume.attach_with(&[]);
    assert!(volume.must(&["pause", name]).contains(&format!("wbctl resume {name}")));
    write(&volume, &attached.device, MIB);
    let live = volume.status()["live"].clone();
    assert_eq!(live["paused"], true);
    assert!(live["oldest_dirty_seconds"].as_f64().is_some_and(|age| age < 3600.0), "{live}");
    let shown = volume.must(&["status", name]);
    assert!(shown.contains("paused; it goes on with") && shown.contains("the oldest for"), "{shown}");
    let metrics = volume.must(&["status", "--prometheus", name]);
    assert!(metrics.contains(&format!("wb_writeback_paused{{volume=\"{name}\"}} 1")), "{metrics}");
    assert!(metrics.contains(&format!("wb_oldest_dirty_seconds{{volume=\"{name}\"}}")), "{metrics}");
    // A drain is what somebody wants now.
    volume.must(&["drain", name]);
    assert_eq!(dirty(&volume), 0);
    assert_eq!(volume.status()["live"]["oldest_dirty_seconds"], serde_json::Value::Null);
    write(&volume, &attached.device, MIB);
    volume.must(&["resume", name]);
    assert!(wait_for(|| dirty(&volume) == 0), "{}", volume.status());
    assert_eq!(volume.status()["live"]["paused"], false);
    attached.detach(&[]);
    let refused = volume.wbctl(&["pause", name]);
    assert!(refused.code == 1 && refused.stderr.contains("is not attached"), "{refused:?}");
}

#[test]
fn the_age_of_dirty_data_is_known_after_a_crash() {
    needs_serving!();
    let volume = Volume::created(8, 8 * MIB);
    let mut attached = volume.attach_with(&["writeback_threshold=0"]);
    write(&volume, &attached.device, MIB);
    attached.kill();
    drop(attached);
    let attached = volume.attach_with(&["writeback_threshold=0"]);
    let age = volume.status()["live"]["oldest_dirty_seconds"].as_f64();
    assert!(age.is_some_and(|age| age < 3600.0), "{age:?}");
    attached.detach(&[]);
}

#[test]
fn a_drain_that_is_interrupted_says_how_to_go_on_and_leaves_the_volume_serving() {
    needs_serving!();
    let volume = Volume::created(8, 8 * MIB);
    let name = volume.name.as_str();
    let attached = volume.attach_with(&["writeback_threshold=0"]);
    write(&volume, &attached.device, MIB);
    // While the daemon is stopped, a drain cannot end.
    attached.signal(Signal::SIGSTOP);
    let drain = volume.command(&["drain", name]).stderr(Stdio::piped()).spawn().expect("wbctl");
    let pid = Pid::from_raw(i32::try_from(drain.id()).expect("a process id"));
    let catches = || {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        // The threads that wait for signals have blocked them.
        status
            .lines()
            .any(|line| line.strip_prefix("SigBlk:").is_some_and(|set| set.trim() != "0000000000000000"))
    };
    assert!(wait_for(catches), "wbctl does not look after its signals");
    kill(pid, Signal::SIGINT).expect("a process to signal");
    let ended = drain.wait_with_output().expect("wbctl");
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    attached.signal(Signal::SIGCONT);
    assert_eq!(ended.status.code(), Some(1), "{said}");
    assert!(
        said.starts_with("wbctl: interrupted") && said.contains(&format!("wbctl drain {name}")),
        "{said}"
    );
    volume.must(&["drain", name]);
    assert_eq!(dirty(&volume), 0);
    attached.detach(&[]);
}
