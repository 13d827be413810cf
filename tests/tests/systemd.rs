//! What systemd sees of a volume: the unit, and what the daemon tells it.

use nix::sys::signal::Signal;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use wb_tests::{
    Filesystem, MIB, Outcome, Volume, has_program, needs_serving, noise, skip, system, wait_for,
};

/// Plays systemd: takes what is sent to `NOTIFY_SOCKET`, and notes each time whether the volume
/// could be read.
struct Systemd {
    socket: PathBuf,
    told: Arc<Mutex<Vec<(String, bool)>>>,
}

impl Systemd {
    fn of(volume: &Volume) -> Systemd {
        let socket = volume.path("notify");
        let (receiver, told) = (
            UnixDatagram::bind(&socket).expect("what the test needs"),
            Arc::new(Mutex::new(Vec::new())),
        );
        let (device, all) = (volume.link(), told.clone());
        std::thread::spawn(move || {
            let mut buf = [0; 4096];
            while let Ok(n) = receiver.recv(&mut buf) {
                let can_be_read = File::open(&device)
                    .is_ok_and(|mut file| file.read_exact(&mut [0; 512]).is_ok());
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
    assert!(
        systemd.is_told("STOPPING=1") && systemd.is_told("STATUS=closing"),
        "{:?}",
        systemd.told()
    );
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

/// The values of a setting of the unit, in their order.
fn settings(unit: &str, key: &str) -> Vec<String> {
    unit.lines()
        .filter_map(|line| line.strip_prefix(key)?.strip_prefix('='))
        .map(String::from)
        .collect()
}

/// The system calls that systemd knows under a name, such as `@system-service`.
fn system_calls(name: &str) -> BTreeSet<String> {
    if !name.starts_with('@') {
        return BTreeSet::from([name.into()]);
    }
    let mut analyze = Command::new("systemd-analyze");
    let listed = Outcome::of({
        analyze.args(["syscall-filter", name]);
        analyze
    });
    assert_eq!(listed.code, 0, "{listed:?}");
    let lines = listed.stdout.lines().skip(1).map(str::trim);
    lines.filter(|line| !line.starts_with('#') && !line.is_empty()).flat_map(system_calls).collect()
}

#[test]
fn the_daemon_gets_by_with_the_rights_that_the_unit_leaves_it() {
    needs_serving!("systemd-analyze", "setpriv", "strace", "mkfs.ext4", "blkdiscard");
    let unit = wb_tests::dist("systemd/wb@.service", &["wbctl"]);
    let kept: Vec<String> = settings(&unit, "CapabilityBoundingSet")[0]
        .split(' ')
        .map(|name| name.trim_start_matches("CAP_").to_lowercase())
        .collect();
    let all = system("setpriv", &["--list-caps"]).expect("setpriv");
    let dropped: Vec<String> = all
        .lines()
        .filter(|cap| !kept.iter().any(|it| it == cap))
        .map(|cap| format!("-{cap}"))
        .collect();
    assert!(kept.len() + dropped.len() == all.lines().count() && dropped.len() > 30, "{dropped:?}");

    let volume = Volume::created(16, 32 * MIB);
    let calls = volume.path("calls");
    let attach = volume.command(&["attach", &volume.name]);
    let mut limited = Command::new("setpriv");
    limited.args([
        "--no-new-privs",
        "--bounding-set",
        &dropped.join(","),
        "strace",
        "-f",
        "-c",
        "-o",
    ]);
    limited.arg(&calls).arg(attach.get_program()).args(attach.get_args());
    limited.envs(attach.get_envs().filter_map(|(key, value)| Some((key, value?))));
    let umask = format!("umask {}", settings(&unit, "UMask")[0]);
    let mut attached = volume.start(wb_tests::after(&umask, &limited));
    Filesystem::Ext4.make(&attached.device);
    let on = attached.mount();
    std::fs::write(on.join("file"), noise(1, 12 * MIB)).unwrap();
    attached.unmount();
    system("blkdiscard", &["--offset", "8388608", "--length", "4194304", attached.device_str()])
        .unwrap();
    volume.must(&["set", &volume.name, "writeback_threshold=50"]);
    volume.must(&["pause", &volume.name]);
    volume.must(&["resume", &volume.name]);
    assert_eq!(volume.status()["state"], "attached");
    assert!(
        std::fs::metadata("/dev/wb").unwrap().mode() & 0o005 == 0o005,
        "for everybody to look into"
    );
    attached.detach(&["--drain"]);

    let mut allowed = BTreeSet::new();
    for filter in settings(&unit, "SystemCallFilter") {
        let (names, is_denied) =
            filter.strip_prefix('~').map_or((&*filter, false), |names| (names, true));
        for call in names.split(' ').flat_map(system_calls) {
            if is_denied {
                allowed.remove(&call)
            } else {
                allowed.insert(call)
            };
        }
    }
    let table = std::fs::read_to_string(&calls).unwrap();
    // Its last line is the sum.
    let used: BTreeSet<&str> =
        table.lines().skip(2).filter_map(|line| line.split_whitespace().last()).collect();
    let used = used.into_iter().filter(|call| !call.starts_with('-') && *call != "total");
    let (inside, beyond): (Vec<_>, Vec<_>) = used.partition(|call| allowed.contains(*call));
    assert!(inside.contains(&"fsmount") && inside.contains(&"io_uring_enter"), "{table}");
    assert!(beyond.is_empty(), "the filter of the unit lacks {beyond:?}");
}

#[test]
fn the_unit_is_hardened_and_leaves_the_daemon_in_the_mounts_of_the_system() {
    let unit = wb_tests::dist("systemd/wb@.service", &["wbctl"]);
    // What systemd.exec(5) says to make a mount namespace, or a list of devices, which would lack
    // those that come later.
    for option in [
        "BindPaths",
        "BindReadOnlyPaths",
        "DeviceAllow",
        "DevicePolicy",
        "DynamicUser",
        "ExecPaths",
        "InaccessiblePaths",
        "MountAPIVFS",
        "MountFlags",
        "NoExecPaths",
        "PrivateDevices",
        "PrivateIPC",
        "PrivateMounts",
        "PrivateNetwork",
        "PrivateTmp",
        "PrivateUsers",
        "ProcSubset",
        "ProtectClock",
        "ProtectControlGroups",
        "ProtectHome",
        "ProtectKernelLogs",
        "ProtectKernelModules",
        "ProtectKernelTunables",
        "ProtectProc",
        "ProtectSystem",
        "ReadOnlyPaths",
        "ReadWritePaths",
        "RootDirectory",
        "RootImage",
        "TemporaryFileSystem",
    ] {
        assert_eq!(settings(&unit, option), Vec::<String>::new(), "{option}");
    }
    if !has_program("systemd-analyze") {
        skip!("needs systemd-analyze");
    }
    let dir = tempfile::TempDir::new().unwrap();
    let exposure = |unit: &str, most: &str| {
        let path = dir.path().join("wb@.service");
        std::fs::write(&path, unit).unwrap();
        let mut command = Command::new("systemd-analyze");
        command.args(["security", "--offline=true", "--threshold", most]).arg(path);
        Outcome::of(command)
    };
    let rated = exposure(&unit, "45");
    assert_eq!(rated.code, 0, "more than 4.5 of 10: {rated:?}");
    let open = exposure(&unit.replace("CapabilityBoundingSet=", "#"), "45");
    assert_ne!(open.code, 0, "what is open would be noticed: {open:?}");
}

/// The line for /etc/fstab in a text, as it is to be typed.
fn fstab_line(text: &str) -> String {
    let text = text.replace("\\-", "-").replace("\\:", "");
    let line =
        text.lines().find(|line| line.starts_with("/dev/wb/data ")).expect("a line for /etc/fstab");
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn the_mount_that_the_manual_advises_belongs_to_the_unit() {
    let advised = fstab_line(include_str!("../../manual/src/wb.7"));
    let generator = Path::new("/usr/lib/systemd/system-generators/systemd-fstab-generator");
    if !generator.exists() {
        skip!("needs {}", generator.display());
    }
    let dir = tempfile::TempDir::new().unwrap();
    let (fstab, out) = (dir.path().join("fstab"), dir.path().join("out"));
    std::fs::write(&fstab, advised + "\n").unwrap();
    std::fs::create_dir(&out).unwrap();
    let mut generate = Command::new(generator);
    generate.args([&out, &out, &out]).env("SYSTEMD_FSTAB", &fstab);
    assert_eq!(Outcome::of(generate).code, 0);
    let mount = std::fs::read_to_string(out.join("srv.mount")).unwrap();
    for dependency in ["Requires=wb@data.service", "After=wb@data.service"] {
        assert!(mount.lines().any(|line| line == dependency), "{dependency}: {mount}");
    }
    assert!(
        out.join("wb@data.service.wants/srv.mount").is_symlink(),
        "it comes back with the volume"
    );
    assert!(
        !out.join("local-fs.target.requires/srv.mount").exists(),
        "the machine boots without it"
    );
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
