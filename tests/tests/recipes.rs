//! The recipes of wb(7), as far as any machine can follow them. Others have files of their own:
//! `nbd_backing` (qemu-nbd), `nbd_front_end` (an ordinary user), and `vm/front-ends.sh` (MD RAID).

#![allow(clippy::unwrap_used)] // all of it is a test, but clippy sees that in test functions alone

use std::fs::{File, Permissions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use wb_tests::{
    MIB, NOBODY, NbdServer, Outcome, Volume, as_nobody, certificates, free_port, has_program,
    needs_serving, noise, overwrite, read_at, sha256, skip, succeeds, wait_for,
};

const SIZE: u64 = 32 * MIB;

fn create(volume: &Volume, backing: &str) -> Outcome {
    let cache = volume.cache.to_str().unwrap();
    volume.wbctl(&["create", &volume.name, "--cache", cache, "--backing", backing])
}

fn with_certificates(server: &NbdServer, folder: &Path) -> String {
    format!("{}?tls-certificates={}", server.uri("disk"), folder.display())
}

#[test]
fn another_hosts_disk_over_tls_holds_everything_though_its_server_was_killed() {
    needs_serving!("nbdkit", "openssl");
    let volume = Volume::blank(48, SIZE);
    let [of_server, of_client] = certificates(&volume.path("pki"));
    let file = volume.backing.to_str().unwrap();
    let disk = ["-e", "disk", "file", file];
    let mut server = NbdServer::nbdkit_with_tls(free_port(), &of_server, &disk);
    let uri = with_certificates(&server, &of_client);
    let created = create(&volume, &uri);
    assert_eq!(created.code, 0, "{created:?}");
    let attached = volume.attach_with(&["writeback_threshold=1"]);
    let write = |nth: u64| {
        overwrite(&attached.device, nth * 4 * MIB, &noise(nth, 2 * MIB));
        File::open(&attached.device).and_then(|device| device.sync_all()).unwrap();
    };
    (0..3).for_each(write);
    server.kill();
    (3..6).for_each(write);
    server.start_again();
    (6..8).for_each(write);
    assert!(wait_for(|| volume.status()["live"]["backing_link"]["up"] == true));
    let expected = read_at(&attached.device, 0, SIZE);
    attached.detach(&["--drain"]);
    assert!(read_at(&volume.backing, 0, SIZE) == expected);
    for nth in 0..8 {
        assert!(read_at(&volume.backing, nth * 4 * MIB, 2 * MIB) == noise(nth, 2 * MIB), "{nth}");
    }
}

#[test]
fn who_has_no_certificate_of_the_same_authority_is_refused_in_one_line() {
    needs_serving!("nbdkit", "openssl");
    let volume = Volume::blank(16, SIZE);
    let [of_server, of_client] = certificates(&volume.path("pki"));
    let [_, of_stranger] = certificates(&volume.path("other-pki"));
    let file = volume.backing.to_str().unwrap();
    let disk = ["-e", "disk", "file", file];
    let server = NbdServer::nbdkit_with_tls(free_port(), &of_server, &disk);
    // It trusts the server, but the server does not trust it.
    let half = volume.path("half");
    std::fs::create_dir(&half).unwrap();
    std::fs::copy(of_client.join("ca-cert.pem"), half.join("ca-cert.pem")).unwrap();
    for file in ["client-cert.pem", "client-key.pem"] {
        std::fs::copy(of_stranger.join(file), half.join(file)).unwrap();
    }
    let other_host = with_certificates(&server, &of_client) + "&tls-hostname=example.com";
    let before = volume.images();
    for (uri, why) in [
        (with_certificates(&server, &of_stranger), "certificate"),
        (with_certificates(&server, &half), ""),
        (other_host, "certificate"),
        (server.uri("disk").replace("nbds://", "nbd://"), "the server demands TLS"),
        (with_certificates(&server, &volume.path("nowhere")), "nowhere/ca-cert.pem"),
    ] {
        let Outcome { code, stdout, stderr } = create(&volume, &uri);
        assert_eq!((code, stdout.as_str()), (1, ""), "{uri}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "{uri}: {stderr}");
        assert!(stderr.starts_with("wbctl: ") && stderr.contains(why), "{uri}: {stderr}");
        println!("{stderr}");
    }
    assert_eq!(volume.images(), before);
    assert_eq!(create(&volume, &with_certificates(&server, &of_client)).code, 0);
}

/// wbctl as an ordinary user runs it in a container: with its own users, mounts and processes, and
/// without a network.
fn in_container(volume: &Volume, user: &str, args: &[&str]) -> Command {
    let inside = as_nobody(volume, args);
    let mut container = Command::new("unshare");
    container.args(["--user", user, "--mount", "--net", "--pid", "--fork", "--kill-child"]);
    container.arg("--mount-proc").arg(inside.get_program()).args(inside.get_args());
    container.envs(inside.get_envs().filter_map(|(key, value)| Some((key, value?))));
    if nix::unistd::geteuid().is_root() {
        container.uid(NOBODY).gid(NOBODY);
    }
    container.current_dir("/");
    container
}

/// A container in which the user is `user`, with both sides over NBD.
fn serve_in_container(user: &str) {
    let volume = Volume::blank(32, SIZE);
    let mut try_it = in_container(&volume, user, &["--version"]);
    if !try_it.stdout(Stdio::null()).status().is_ok_and(|status| status.success()) {
        skip!("an ordinary user cannot make namespaces here");
    }
    let file = volume.backing.to_str().unwrap();
    let (disk, front) = (volume.path("disk.socket"), volume.path("volume.socket"));
    let mut server = NbdServer::nbdkit(&disk, &["-e", "disk", "file", file]);
    let let_in = || std::fs::set_permissions(&disk, Permissions::from_mode(0o666)).unwrap();
    let_in();
    if nix::unistd::geteuid().is_root() {
        for path in [volume.dir.path(), &volume.cache] {
            chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
        }
    }
    let name = volume.name.as_str();
    let must = |args: &[&str]| {
        let outcome = Outcome::of(in_container(&volume, user, args));
        assert_eq!(outcome.code, 0, "{args:?}: {outcome:?}");
        outcome.stdout
    };
    let uri = format!("nbd+unix:///?socket={}", front.display());
    let cache = volume.cache.to_str().unwrap();
    let pair = ["--cache", cache, "--backing", &server.uri("disk")];
    must(&[&["create", name, "--serve", &uri], &pair[..]].concat());
    let mut attached = volume.start(in_container(&volume, user, &["attach", name]));
    assert_eq!(attached.device_str(), uri);
    let image = volume.path("image");
    std::fs::write(&image, noise(5, SIZE)).unwrap();
    server.kill();
    let first = volume.path("first");
    std::fs::write(&first, noise(5, 4 * MIB)).unwrap();
    let write = format!("write -s {} 0 4M", first.display());
    let said = succeeds(Command::new("qemu-io").args(["-f", "raw", "-c", &write, &uri]));
    assert!(said.contains("wrote 4194304/4194304"), "{said}");
    let is_down = || {
        let status = in_container(&volume, user, &["status", name, "--json"]);
        Outcome::of(status).json()["live"]["backing_link"]["up"] == false
    };
    assert!(wait_for(is_down), "{}", attached.stderr());
    server.start_again();
    let_in();
    succeeds(Command::new("nbdcopy").args(["--flush", image.to_str().unwrap(), &uri]));
    must(&["detach", name, "--drain"]);
    assert_eq!(attached.wait().code(), Some(0), "{}", attached.stderr());
    assert_eq!(sha256(&volume.backing), sha256(&image));
    assert!(!front.exists());
}

#[test]
fn an_ordinary_user_serves_a_volume_in_a_container_with_nbd_on_both_sides() {
    for program in ["nbdkit", "nbdcopy", "qemu-io", "unshare"] {
        if !has_program(program) {
            skip!("needs {program}");
        }
    }
    serve_in_container("--map-current-user");
    serve_in_container("--map-root-user");
}

/// QEMU's block layer, as a virtual machine has it: it waits for a server that has gone.
struct Qemu {
    process: Child,
    orders: ChildStdin,
    said: BufReader<ChildStdout>,
}

impl Qemu {
    fn on(socket: &Path) -> Qemu {
        let disk = format!(
            r#"json:{{"driver": "raw", "file": {{"driver": "nbd", "reconnect-delay": 60,
            "server": {{"type": "unix", "path": "{}"}}}}}}"#,
            socket.display()
        );
        let mut command = Command::new("qemu-io");
        command.arg(disk).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let (orders, said) = (process.stdin.take().unwrap(), process.stdout.take().unwrap());
        Qemu { process, orders, said: BufReader::new(said) }
    }

    /// Does what must succeed, such as `wrote` a MiB.
    fn must(&mut self, order: &str, does: &str) {
        writeln!(self.orders, "{order}").unwrap();
        let mut line = String::new();
        assert!(self.said.read_line(&mut line).unwrap() > 0, "{order}: it has ended");
        assert!(line.contains(&format!("{does} 1048576/1048576 bytes")), "{order}: {line}");
        self.said.read_line(&mut line).unwrap();
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn qemu_waits_for_the_next_server_and_finds_what_it_has_not_flushed() {
    if !has_program("qemu-io") {
        skip!("needs qemu-io");
    }
    let volume = Volume::created(32, SIZE);
    let socket = volume.path("volume.socket");
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let mut attach = volume.command(&["attach", &volume.name, "--serve", &uri]);
    attach.env("WB_DEATHS_A_MINUTE", "1000000");
    let attached = volume.start(attach);
    let mut qemu = Qemu::on(&socket);
    for nth in 0..5 {
        qemu.must(&format!("write -P {} {nth}M 1M", nth + 1), "wrote");
        attached.kill_server();
        qemu.must(&format!("read -P {} {nth}M 1M", nth + 1), "read");
        volume.must(&["restart", &volume.name]);
    }
    qemu.must("write -f -P 6 5M 1M", "wrote");
    drop(qemu);
    assert!(wait_for(|| volume.status()["live"]["clients"] == 0));
    attached.detach(&["--drain"]);
    for (nth, fill) in (0..6).zip(1..) {
        assert!(read_at(&volume.backing, nth * MIB, MIB).iter().all(|byte| *byte == fill), "{nth}");
    }
}
