//! Write-back as a user steers it: paused and resumed, drained, and a drain that is given up.

use libwb::cli::human_size;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::process::{Child, Stdio};
use wb_tests::{
    FailingFile, FileFaults, LoopDevice, MIB, Volume, needs_serving, noise, overwrite, read_at,
    wait_for,
};

fn dirty(volume: &Volume) -> u64 {
    volume.status()["live"]["dirty_bytes"].as_u64().expect("a number")
}

/// Writes, and makes it durable on the cache device.
fn write(volume: &Volume, device: &std::path::Path, bytes: u64) {
    overwrite(device, 0, &noise(1, bytes));
    std::fs::File::open(device)
        .and_then(|device| device.sync_all())
        .expect("a device that takes writes");
    assert_eq!(dirty(volume), bytes);
}

/// Whether a process waits for signals.
fn catches_signals(process: &mut Child) -> bool {
    let status =
        std::fs::read_to_string(format!("/proc/{}/status", process.id())).unwrap_or_default();
    // The threads that wait for signals have blocked them.
    status.lines().any(|line| {
        line.strip_prefix("SigBlk:").is_some_and(|set| set.trim() != "0000000000000000")
    })
}

fn interrupt(process: &Child) {
    let pid = Pid::from_raw(i32::try_from(process.id()).expect("a process id"));
    kill(pid, Signal::SIGINT).expect("a process to signal");
}

/// A new volume, on a backing device that can fail.
fn on_failing_backing() -> (Volume, FailingFile) {
    let mut volume = Volume::blank(32, 32 * MIB);
    let backing = FailingFile::over(&volume.backing, &volume.path("failing"));
    volume.backing = backing.path.clone();
    volume.create(&[]);
    (volume, backing)
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
    assert!(shown.contains("paused; to resume it") && shown.contains("the oldest for"), "{shown}");
    let metrics = volume.must(&["status", "--prometheus", name]);
    assert!(metrics.contains(&format!("wb_writeback_paused{{volume=\"{name}\"}} 1")), "{metrics}");
    assert!(
        metrics.contains(&format!("wb_oldest_dirty_seconds{{volume=\"{name}\"}}")),
        "{metrics}"
    );
    // A drain must not wait.
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
    let attached = volume.attach_with(&["writeback_threshold=0"]);
    write(&volume, &attached.device, MIB);
    attached.crash();
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
    let server = attached.signal_server(Signal::SIGSTOP);
    let mut drain = volume.command(&["drain", name]).stderr(Stdio::piped()).spawn().expect("wbctl");
    assert!(wait_for(|| catches_signals(&mut drain)), "wbctl does not look after its signals");
    interrupt(&drain);
    let ended = drain.wait_with_output().expect("wbctl");
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    attached.continue_server(server);
    assert_eq!(ended.status.code(), Some(1), "{said}");
    assert!(
        said.starts_with("wbctl: interrupted") && said.contains(&format!("wbctl drain {name}")),
        "{said}"
    );
    volume.must(&["drain", name]);
    assert_eq!(dirty(&volume), 0);
    attached.detach(&[]);
}

#[test]
fn a_pause_waits_for_the_batch_under_way_and_after_it_nothing_is_written_back() {
    needs_serving!();
    let (volume, backing) = on_failing_backing();
    let name = volume.name.as_str();
    let attached = volume.attach_with(&[]);
    let hanging = backing.hang_writes(0..u64::MAX);
    write(&volume, &attached.device, MIB);
    assert!(wait_for(|| volume.status()["live"]["writing_back"] == true), "{}", volume.status());
    // Longer than a pause waits, or until the batch is done.
    let said = volume.must(&["pause", name]);
    assert!(said.contains("is still finishing"), "{said}");
    let shown = volume.must(&["status", name]);
    assert!(shown.contains("paused, but a batch or a drain is still finishing"), "{shown}");
    let pause = volume.command(&["pause", name]).stdout(Stdio::piped()).spawn().expect("wbctl");
    drop(hanging);
    let said = pause.wait_with_output().expect("wbctl").stdout;
    let said = String::from_utf8_lossy(&said);
    assert!(said.contains("is paused") && !said.contains("still finishing"), "{said}");
    let before = volume.status()["live"].clone();
    let written = &before["counters"]["written_back_bytes"];
    assert!(before["writing_back"] == false && written.as_u64() > Some(0), "{before}");
    let content = read_at(&volume.backing, 0, MIB);
    overwrite(&attached.device, 0, &noise(2, MIB));
    std::fs::File::open(&attached.device).unwrap().sync_all().unwrap();
    volume.must(&["pause", name]);
    let after = volume.status()["live"].clone();
    assert_eq!(
        (&after["writing_back"], &after["counters"]["written_back_bytes"]),
        (&false.into(), written)
    );
    assert!(read_at(&volume.backing, 0, MIB) == content);
    volume.must(&["resume", name]);
    assert!(wait_for(|| dirty(&volume) == 0));
    assert!(read_at(&volume.backing, 0, MIB) == noise(2, MIB));
    attached.detach(&[]);
}

#[test]
fn an_interrupted_drain_says_the_number_that_list_says() {
    needs_serving!();
    let mut volume = Volume::blank(32, 32 * MIB);
    let backing = FailingFile::over(&volume.backing, &volume.path("failing"));
    // A block device, on which one write that hangs does not keep others from being handed over.
    let block = LoopDevice::attach(&backing.path).expect("a loop device");
    volume.backing = block.path.clone();
    volume.create(&[]);
    let name = volume.name.as_str();
    let attached = volume.attach_with(&["writeback_threshold=0"]);
    // Two runs. The second hangs, so that the batch is half written. The loop device writes one run
    // after the other. So the first is small: it has long been read, and comes first.
    for (at, bytes) in [(0, 4096), (4 * MIB, MIB)] {
        overwrite(&attached.device, at, &noise(at, bytes));
    }
    std::fs::File::open(&attached.device).unwrap().sync_all().unwrap();
    let all = MIB + 4096;
    let hanging = backing.hang_writes(4 * MIB..5 * MIB);
    let mut drain = volume.command(&["drain", name]).stderr(Stdio::piped()).spawn().expect("wbctl");
    assert!(wait_for(|| catches_signals(&mut drain)), "wbctl does not look after its signals");
    let written = || volume.status()["live"]["counters"]["written_back_bytes"].clone();
    assert!(wait_for(|| written() == 4096), "{}", volume.status());
    // Its progress comes several times a second.
    std::thread::sleep(std::time::Duration::from_secs(1));
    interrupt(&drain);
    let ended = drain.wait_with_output().expect("wbctl");
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    let size = human_size(all);
    assert!(said.contains(&format!("interrupted: {size} are still only in the cache")), "{said}");
    assert_eq!(dirty(&volume), all);
    assert!(volume.must(&["list"]).contains(&size));
    drop(hanging);
    attached.detach(&["--drain"]);
}

#[test]
fn the_rate_of_write_back_is_not_shown_while_it_fails() {
    needs_serving!();
    let (volume, backing) = on_failing_backing();
    let name = volume.name.as_str();
    let attached = volume.attach_with(&["writeback_threshold=0"]);
    let told = || volume.status()["live"]["statistics"].clone();
    assert!(told()["writeback_bytes_per_second"].is_null(), "nothing was written back yet");
    // Single sectors: the rate is of what was written, not of whole blocks.
    for n in 0..64 {
        overwrite(&attached.device, n * 8192, &[7; 512]);
    }
    std::fs::File::open(&attached.device).unwrap().sync_all().unwrap();
    volume.must(&["drain", name]);
    let rate = told()["writeback_bytes_per_second"].as_f64();
    assert!(rate > Some(0.0), "{}", told());
    let shown = volume.must(&["status", name]);
    assert!(shown.contains("/s while it works"), "{shown}");
    backing.fail(FileFaults { writes: true, ..FileFaults::default() });
    write(&volume, &attached.device, MIB);
    assert_eq!(volume.wbctl(&["drain", name]).code, 1);
    let status = volume.wbctl(&["status", name]);
    assert_eq!(status.code, 5, "{status:?}");
    assert!(
        status.stdout.contains("degraded") && !status.stdout.contains("while it works"),
        "{status:?}"
    );
    let told = told();
    let hidden = [&told["writeback_bytes_per_second"], &told["writeback_seconds_left"]];
    assert!(hidden.iter().all(|number| number.is_null()), "{told}");
    let metrics = volume.must(&["status", "--prometheus", name]);
    assert!(!metrics.contains("wb_writeback_bytes_per_second{"), "{metrics}");
    backing.heal();
    volume.must(&["drain", name]);
    assert_eq!(volume.wbctl(&["status", name]).code, 0);
    attached.detach(&[]);
}
