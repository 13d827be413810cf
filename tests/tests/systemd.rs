//! What systemd sees of a volume: the unit, and what the daemon tells it.

use nix::sys::signal::Signal;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex};
use wb_tests::{Filesystem, MIB, Outcome, Volume, has_program, needs_serving, noise, skip, wait_for};

/// Plays systemd: takes what is sent to `NOTIFY_SOCKET`, and notes each time whether the volume could be read.
struct Systemd {
    socket: PathBuf,
    told: Arc<Mutex<Vec<(String, bool)>>>,
}

impl Systemd {
    fn of(volume: &Volume) -> Systemd {
        let socket = volume.path("notify");
        let (receiver, told) =
            (UnixDatagram::bind(&socket).expect("what the test needs"), Arc::new(Mutex::new(Vec::new())));
        let (device, all) = (volume.link(), told.clone());
        std::thread::spawn(move || {
            let mut buf = [0; 4096];
            while let Ok(n) = receiver.recv(&mut buf) {
                let can_be_read =
                    File::open(&device).is_ok_and(|mut file| file.read_exact(&mut [0; 512]).is_ok());
                let text = String::from_utf8_lossy(&buf[..n]).into_owned();
                all.lock().expect("what the test needs").push((text, can_be_read));
            }
        });
        Systemd { socket, told }
    }

    fn command(&self, volume: &Volume, args: &[&str]) -> Command {
        let mut command = volume.command(args);
        command.env("NOTIFY_SOCKET", &self.socket);
        command
    }

    /// All lines so far.
    fn told(&self) -> Vec<String> {
        self.told
            .lock()
            .expect("what the test needs")
            .iter()
            .flat_map(|(text, _)| text.lines().map(String::from).collect::<Vec<_>>())
            .collect()
    }

    fn is_told(&self, line: &str) -> bool {
        wait_for(|| self.told().iter().any(|told| told == line))
    }

    fn position(&self, line: &str) -> Option<usize> {
        self.told().iter().position(|told| told.starts_with(line))
    }
}

#[test]
fn systemd_is_told_that_a_volume_is_ready_when_it_can_be_used() {
    needs_serving!();
    let volume = Volume::created(16, 16 * MIB);
    let systemd = Systemd::of(&volume);
    let attached = volume.start(systemd.command(&volume, &["attach", &volume.name]));
    assert!(systemd.is_told("READY=1"), "{:?}", systemd.told());
    for (text, can_be_read) in systemd.told.lock().unwrap().iter() {
        assert!(!text.contains("READY=1") || *can_be_read, "{text}");
    }
    let ready = systemd.position("READY=1");
    assert!(systemd.position("STATUS=recovering") < ready, "{:?}", systemd.told());
    assert!(systemd.position("EXTEND_TIMEOUT_USEC=") < ready, "{:?}", systemd.told());
    assert!(systemd.is_told("STATUS=serving"));
    volume.must(&["drain", &volume.name]);
    assert!(systemd.is_told("STATUS=draining"));
    attached.end(Signal::SIGTERM);
    assert!(systemd.is_told("STOPPING=1") && systemd.is_told("STATUS=closing"), "{:?}", systemd.told());
}

#[test]
fn systemd_is_not_told_that_a_volume_is_ready_that_is_refused() {
    needs_serving!();
    let volume = Volume::corrupt(16, 16 * MIB);
    let systemd = Systemd::of(&volume);
    let refused = Outcome::of(systemd.command(&volume, &["attach", &volume.name]));
    assert_eq!(refused.code, 1, "{refused:?}");
    assert!(systemd.is_told("STATUS=recovering"));
    assert_eq!(systemd.position("READY=1"), None);
}

#[test]
fn a_device_that_comes_late_is_waited_for() {
    needs_serving!();
    let volume = Volume::created(16, 16 * MIB);
    let late = volume.path("late");
    std::fs::rename(&volume.backing, &late).unwrap();
    let refused = volume.wbctl(&["attach", &volume.name]);
    assert!(refused.code == 1 && refused.stderr.contains("No such file"), "{refused:?}");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // The daemon holds its lock while it waits.
            assert!(wait_for(|| volume.status()["state"] == "starting or stopping"));
            std::fs::rename(&late, &volume.backing).unwrap();
        });
        volume.attach_with(&["--wait", "60"]).detach(&[]);
    });
}

#[test]
fn a_daemon_that_is_told_to_end_serves_on_until_its_filesystem_is_unmounted() {
    needs_serving!("mkfs.ext4", "e2fsck");
    let volume = Volume::created(24, 64 * MIB);
    let mut attached = volume.attach_with(&[]);
    Filesystem::Ext4.make(&attached.device);
    let on = attached.mount();
    attached.signal(Signal::SIGTERM);
    assert!(wait_for(|| attached.stderr().contains("waiting: ")), "{}", attached.stderr());
    std::fs::write(on.join("late"), noise(1, 4 * MIB)).unwrap();
    // No sync but that of unmounting.
    attached.unmount();
    assert_eq!(attached.wait().code(), Some(0), "{}", attached.stderr());
    drop(attached);
    let mut attached = volume.attach_with(&[]);
    Filesystem::Ext4.check(&attached.device);
    let on = attached.mount();
    assert!(std::fs::read(on.join("late")).is_ok_and(|data| data == noise(1, 4 * MIB)));
}

#[test]
fn a_second_signal_ends_a_daemon_whose_device_is_mounted() {
    needs_serving!("mkfs.ext4");
    let volume = Volume::created(24, 64 * MIB);
    let mut attached = volume.attach_with(&[]);
    Filesystem::Ext4.make(&attached.device);
    attached.mount();
    attached.signal(Signal::SIGTERM);
    assert!(wait_for(|| attached.stderr().contains("waiting: ")), "{}", attached.stderr());
    attached.signal(Signal::SIGTERM);
    attached.wait();
    attached.unmount();
}

#[test]
fn the_journal_gets_each_line_with_its_level() {
    needs_serving!();
    let volume = Volume::created(16, 16 * MIB);
    let journal = volume.path("stderr");
    File::create(&journal).unwrap();
    let meta = std::fs::metadata(&journal).unwrap();
    for (stream, start) in [
        (format!("{}:{}", meta.dev(), meta.ino()), "<6>the cache is new"),
        // It was redirected, as a shell does.
        (format!("{}:{}", meta.dev(), meta.ino() + 1), " INFO the cache is new"),
    ] {
        let mut command = volume.command(&["attach", &volume.name]);
        command.env("JOURNAL_STREAM", stream);
        let attached = volume.start(command);
        let said = attached.stderr();
        attached.detach(&[]);
        assert!(said.lines().any(|line| line.starts_with(start)), "{said}");
        assert!(said.lines().all(|line| line.starts_with('<') == start.starts_with('<')), "{said}");
    }
}

#[test]
fn systemd_understands_the_unit() {
    if !has_program("systemd-analyze") {
        skip!("needs systemd-analyze");
    }
    let dir = tempfile::TempDir::new().unwrap();
    let verify = |unit: &str| {
        let path = dir.path().join("wb@.service");
        std::fs::write(&path, unit).unwrap();
        let mut command = Command::new("systemd-analyze");
        command.args(["verify", "--man=no"]).arg(path);
        Outcome::of(command)
    };
    let unit = wb_tests::dist("systemd/wb@.service", &["wbctl"]);
    let good = verify(&unit);
    assert_eq!((good.code, good.stderr.as_str()), (0, ""), "{good:?}");
    let bad = verify(&unit.replace("KillMode=mixed", "KillMode=gently"));
    assert!(bad.stderr.contains("kill mode"), "what is wrong would be noticed: {bad:?}");
}
