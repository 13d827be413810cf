//! A volume that is served over NBD: what users do with it, and what clients do to it.

#![allow(clippy::unwrap_used)] // all of it is a test, but clippy sees that in test functions alone

mod refusals;

use nix::sys::signal::Signal;
use std::fs::{File, Permissions};

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use wb_tests::{
    Attached, FailingFile, MIB, NOBODY, Outcome, Volume, as_nobody, certificates, free_port,
    has_program, needs_serving, noise, sha256, skip, succeeds, system, wait_for,
};

macro_rules! needs {
    ($($program:expr),* $(,)?) => {
        if let Some(missing) = [$($program),*].into_iter().find(|program| !has(program)) {
            skip!("needs {missing}");
        }
    };
}

const SIZE: u64 = 48 * MIB;
/// The Python that Debian's bindings of libnbd belong to. The program nbdsh takes the first on the
/// search path, which may be another one.
const PYTHON: &str = "/usr/bin/python3";

fn has(program: &str) -> bool {
    match program {
        "nbdsh" => system(PYTHON, &["-c", "import nbd"]).is_some(),
        program => has_program(program),
    }
}

fn socket_of(volume: &Volume) -> PathBuf {
    volume.path("nbd.socket")
}

/// The address of a volume's Unix socket.
fn uri_of(volume: &Volume) -> String {
    format!("nbd+unix:///?socket={}", socket_of(volume).display())
}

fn serve<'a>(volume: &'a Volume, uri: &str, more: &[&str]) -> Attached<'a> {
    let attach = ["attach", volume.name.as_str(), "--serve", uri];
    volume.start(volume.command(&[&attach, more].concat()))
}

fn run(program: &str, args: &[&str]) -> String {
    succeeds(Command::new(program).args(args))
}

/// nbdsh: a Python program that speaks through libnbd to a server as `h`.
fn nbdsh(uri: &str, script: &str) -> Command {
    let mut command = Command::new(PYTHON);
    command.args(["-m", "nbd", "-u", uri, "-c", script]);
    command
}

fn clients_of(volume: &Volume) -> u64 {
    volume.status()["live"]["clients"].as_u64().expect("a number of clients")
}

/// A client that stays connected until it is killed.
struct Holding(Child);

impl Holding {
    fn to(volume: &Volume, uri: &str) -> Holding {
        let before = clients_of(volume);
        let mut command = nbdsh(uri, "import time; time.sleep(1000)");
        let child = command.stdin(Stdio::null()).spawn().unwrap();
        let holding = Holding(child);
        assert!(wait_for(|| clients_of(volume) > before), "the client does not connect");
        holding
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn file_of_noise(volume: &Volume) -> PathBuf {
    let path = volume.path("image");
    std::fs::write(&path, noise(18, SIZE)).unwrap();
    path
}

#[test]
fn an_image_is_copied_to_the_volume_and_back_by_the_tools_that_people_have() {
    needs!("nbdinfo", "nbdcopy", "qemu-img", "qemu-io");
    let volume = Volume::created(64, SIZE);
    let uri = uri_of(&volume);
    let attached = serve(&volume, &uri, &[]);
    assert_eq!(attached.device_str(), uri);
    assert!(!volume.link().exists());
    let mode = socket_of(&volume).metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let status = volume.status();
    assert_eq!((&status["device"], &status["state"]), (&uri.as_str().into(), &"attached".into()));
    assert_eq!(status["live"]["outlives_server"], true);

    let info: serde_json::Value = serde_json::from_str(&run("nbdinfo", &["--json", &uri])).unwrap();
    let export = &info["exports"][0];
    assert_eq!(export["export-size"], SIZE);
    for (flag, is_set) in [
        ("is_read_only", false),
        ("can_flush", true),
        ("can_fua", true),
        ("can_trim", true),
        ("can_zero", true),
        ("can_multi_conn", true),
        ("can_df", true),
    ] {
        assert_eq!(export[flag], is_set, "{flag}: {export}");
    }

    let image = file_of_noise(&volume);
    let (source, copy) = (image.to_str().unwrap(), volume.path("copy"));
    run("nbdcopy", &["--flush", source, &uri]);
    run("nbdcopy", &[&uri, copy.to_str().unwrap()]);
    assert_eq!(sha256(&copy), sha256(&image));
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &uri, source]);
    for command in [
        "write -P 7 4k 64k",
        "writev -P 8 128k 4k 8k",
        "flush",
        "write -z 1M 1M",
        "write -f -P 9 3M 1M",
        "discard 5M 1M",
    ] {
        let said = run("qemu-io", &["-f", "raw", "-c", command, &uri]);
        assert!(!said.contains("failed"), "{command}: {said}");
    }
    for command in ["read -P 7 4k 64k", "read -P 8 128k 12k", "read -P 0 1M 1M", "read -P 9 3M 1M"]
    {
        let said = run("qemu-io", &["-f", "raw", "-c", command, &uri]);
        assert!(!said.contains("verification failed") && !said.contains("error"), "{said}");
    }
    run("nbdcopy", &[&uri, copy.to_str().unwrap()]);
    let (hash, metrics) = (sha256(&copy), volume.must(&["status", "--prometheus"]));
    assert!(metrics.contains(&format!("wb_nbd_clients{{volume=\"{}\"}} 0", volume.name)));
    attached.detach(&["--drain"]);
    assert_eq!(sha256(&volume.backing), hash);
    assert!(!socket_of(&volume).exists());

    let attached = serve(&volume, &uri, &["--read-only"]);
    let info: serde_json::Value = serde_json::from_str(&run("nbdinfo", &["--json", &uri])).unwrap();
    assert_eq!(info["exports"][0]["is_read_only"], true);
    let refused = nbdsh(
        &uri,
        "h.set_strict_mode(0)\n\
         try: h.pwrite(b'1' * 512, 0); print('written')\n\
         except nbd.Error as e: print(e.errno)",
    );
    let refused = Outcome::of(refused);
    assert_eq!(refused.stdout.trim(), "EPERM", "{refused:?}");
    run("nbdcopy", &[&uri, copy.to_str().unwrap()]);
    assert_eq!(sha256(&copy), hash);
    attached.detach(&[]);
}

#[test]
fn fio_verifies_what_it_writes_and_many_connections_see_each_others_writes() {
    needs!("fio", "nbdsh");
    let volume = Volume::created(64, SIZE);
    let uri = uri_of(&volume);
    let attached = serve(&volume, &uri, &[]);
    let fio = Outcome::of({
        let mut fio = Command::new("fio");
        fio.args(["--name=verify", "--ioengine=nbd", "--iodepth=32", "--rw=randrw"]);
        fio.args(["--bsrange=512-256k", "--blockalign=512", "--size=32M", "--fsync=64"]);
        fio.args(["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"]);
        fio.arg(format!("--uri={uri}")).current_dir(volume.dir.path());
        fio
    });
    if fio.stderr.contains("engine nbd not loadable") {
        skip!("this fio has no nbd engine");
    }
    assert_eq!(fio.code, 0, "{fio:?}");
    // A flush on one connection makes durable what was written on another.
    let script = format!(
        "others = [nbd.NBD() for _ in range(3)]\n\
         for other in others: other.connect_uri('{uri}')\n\
         assert h.can_multi_conn()\n\
         for n, other in enumerate(others):\n    other.pwrite(bytes([n + 1]) * 4096, 4096 * n)\n\
         h.flush()\n\
         assert h.pread(3 * 4096, 0) == b''.join(bytes([n + 1]) * 4096 for n in range(3))\n"
    );
    let outcome = Outcome::of(nbdsh(&uri, &script));
    assert_eq!(outcome.code, 0, "{outcome:?}");
    attached.detach(&[]);
}

const DISHONEST: &str = include_str!("dishonest.py");

#[test]
fn dishonest_clients_get_errors_and_hurt_nobody() {
    needs!("nbdsh");
    let volume = Volume::created(64, SIZE);
    let uri = uri_of(&volume);
    let attached = serve(&volume, &uri, &[]);
    let write = "h.pwrite(b'\\1' * 4096, 0); h.pwrite(b'\\2' * 4096, 1 << 20)";
    assert_eq!(Outcome::of(nbdsh(&uri, write)).code, 0);
    let server = attached.server();
    let mut python = Command::new(PYTHON);
    python.args(["-c", DISHONEST]).arg(socket_of(&volume));
    let outcome = Outcome::of(python);
    assert_eq!((outcome.code, outcome.stdout.trim()), (0, "done"), "{outcome:?}");
    // What libnbd sends if it does not check.
    let script = "h.set_strict_mode(0)\n\
        def fails(call, *args):\n\
        \x20   try: call(*args)\n\
        \x20   except nbd.Error: return True\n\
        assert fails(h.pread, 512, 1 << 60) and fails(h.pwrite, b'1' * 512, 1 << 60)\n\
        assert fails(h.pread, 1, 0) and fails(h.pwrite, b'1', 0) and fails(h.trim, 0, 0)\n\
        assert h.pread(512, 0) == b'\\1' * 512\n";
    let outcome = Outcome::of(nbdsh(&uri, script));
    assert_eq!(outcome.code, 0, "{outcome:?}");
    assert_eq!(attached.server(), server, "{}", attached.stderr());
    attached.detach(&[]);
}

#[test]
fn a_volume_with_clients_is_not_taken_away_unless_by_force() {
    needs!("nbdsh");
    let volume = Volume::created(16, SIZE);
    let uri = uri_of(&volume);
    let attached = serve(&volume, &uri, &[]);
    let first = Holding::to(&volume, &uri);
    let refused = volume.wbctl(&["detach", &volume.name]);
    assert_eq!(refused.code, 1, "{refused:?}");
    assert!(refused.stderr.contains("1 NBD client is connected"), "{refused:?}");
    let second = Holding::to(&volume, &uri);
    let refused = volume.wbctl(&["detach", &volume.name, "--drain"]);
    let expected = "2 NBD clients are connected; disconnect them first, or use --force and let \
                    them fail";
    assert!(refused.stderr.contains(expected), "{refused:?}");
    assert!(volume.must(&["status", &volume.name]).contains("NBD clients"));
    drop((first, second));
    let third = Holding::to(&volume, &uri);
    attached.detach(&["--force"]);
    drop(third);
    assert!(!socket_of(&volume).exists());
}

#[test]
fn a_signal_waits_for_the_clients_to_go() {
    needs!("nbdsh");
    let volume = Volume::created(16, SIZE);
    let uri = uri_of(&volume);
    let mut attached = serve(&volume, &uri, &[]);
    let client = Holding::to(&volume, &uri);
    attached.signal(Signal::SIGTERM);
    assert!(wait_for(|| attached.stderr().contains("is still in use by 1 NBD client")));
    assert!(attached.is_running());
    drop(client);
    assert_eq!(attached.wait().code(), Some(0), "{}", attached.stderr());
}

#[test]
fn over_tls_only_clients_with_a_certificate_are_served() {
    needs!("openssl", "nbdinfo", "nbdcopy");
    let volume = Volume::created(16, SIZE);
    let [server, client] = certificates(volume.dir.path());
    let at = format!("nbds://localhost:{}/data", free_port());
    let uri = |folder: &Path| format!("{at}?tls-certificates={}", folder.display());
    let attached = serve(&volume, &uri(&server), &[]);
    assert_eq!(run("nbdinfo", &["--size", &uri(&client)]).trim(), SIZE.to_string());
    let image = file_of_noise(&volume);
    let copy = volume.path("copy");
    run("nbdcopy", &[image.to_str().unwrap(), &uri(&client)]);
    run("nbdcopy", &[&uri(&client), copy.to_str().unwrap()]);
    assert_eq!(sha256(&copy), sha256(&image));
    let fails = |uri: &str| {
        let mut info = Command::new("nbdinfo");
        info.args(["--size", uri]);
        Outcome::of(info).code != 0
    };
    std::fs::remove_file(client.join("client-cert.pem")).unwrap();
    std::fs::remove_file(client.join("client-key.pem")).unwrap();
    assert!(fails(&uri(&client)), "a client without a certificate was served");
    assert!(fails(&at.replace("nbds://", "nbd://")), "a client without TLS was served");
    // A later server reads the certificates anew.
    attached.kill_server();
    assert!(fails(&uri(&client)));
    attached.detach(&[]);
}

/// Writes blocks in a random order, and checks them, over a connection that must not break.
const WORK: &str = include_str!("work.py");

/// What connects again on its own. Clients of it see a pause where the server has gone.
struct Reconnecting {
    process: Child,
    uri: String,
}

impl Reconnecting {
    fn to(volume: &Volume) -> Reconnecting {
        let own = volume.path("nbdkit.socket");
        let mut nbdkit = Command::new("nbdkit");
        nbdkit.args(["-f", "--exit-with-parent", "--filter=retry", "-U"]).arg(&own);
        nbdkit.arg("nbd").arg(format!("socket={}", socket_of(volume).display()));
        nbdkit.args(["retries=50", "retry-delay=1", "retry-exponential=no"]);
        let process = nbdkit.stdin(Stdio::null()).spawn().unwrap();
        let uri = format!("nbd+unix:///?socket={}", own.display());
        let reconnecting = Reconnecting { process, uri };
        assert!(wait_for(|| own.exists()), "nbdkit does not listen");
        reconnecting
    }
}

impl Drop for Reconnecting {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Has a client work while `disturb` does something to the server, again and again.
fn work_while(volume: &Volume, attached: &Attached<'_>, disturb: impl Fn()) {
    let (nbdkit, stop) = (Reconnecting::to(volume), volume.path("stop"));
    let mut work = nbdsh(&nbdkit.uri, WORK);
    work.env("STOP", &stop).stdout(Stdio::piped());
    let mut working = work.spawn().unwrap();
    assert!(wait_for(|| clients_of(volume) > 0), "nobody works");
    for _ in 0..4 {
        disturb();
        assert!(wait_for(|| clients_of(volume) > 0), "no client comes again");
        assert!(working.try_wait().unwrap().is_none(), "{}", attached.stderr());
    }
    std::fs::write(&stop, "").unwrap();
    let ended = working.wait_with_output().unwrap();
    assert!(ended.status.success(), "{ended:?}: {}", attached.stderr());
}

#[test]
fn clients_that_connect_again_see_a_pause_when_the_server_is_killed() {
    needs!("nbdkit", "nbdsh", "nbdcopy");
    let volume = Volume::created(64, SIZE);
    let mut attach = volume.command(&["attach", &volume.name, "--serve", &uri_of(&volume)]);
    attach.env("WB_DEATHS_A_MINUTE", "1000000");
    let attached = volume.start(attach);
    let inode = socket_of(&volume).metadata().unwrap().ino();
    work_while(&volume, &attached, || attached.kill_server());
    assert_eq!(socket_of(&volume).metadata().unwrap().ino(), inode);
    let (one, other) = (volume.path("one"), volume.path("other"));
    run("nbdcopy", &[&uri_of(&volume), one.to_str().unwrap()]);
    attached.detach(&["--drain"]);
    let attached = serve(&volume, &uri_of(&volume), &[]);
    run("nbdcopy", &[&uri_of(&volume), other.to_str().unwrap()]);
    assert_eq!(sha256(&one), sha256(&other));
    assert_eq!(sha256(&one), sha256(&volume.backing));
    attached.detach(&[]);
}

#[test]
fn clients_that_connect_again_see_a_pause_when_the_program_is_replaced() {
    needs!("nbdkit", "nbdsh");
    let volume = Volume::created(64, SIZE);
    let attached = serve(&volume, &uri_of(&volume), &[]);
    work_while(&volume, &attached, || {
        let before = attached.server();
        volume.must(&["restart", &volume.name]);
        assert_ne!(attached.server(), before);
    });
    attached.detach(&[]);
}

#[test]
fn the_socket_of_a_daemon_that_was_killed_is_cleared_or_used_again() {
    needs!("nbdinfo");
    let volume = Volume::created(16, SIZE);
    let uri = uri_of(&volume);
    serve(&volume, &uri, &[]).crash();
    assert!(socket_of(&volume).exists());
    let attached = serve(&volume, &uri, &[]);
    assert_eq!(run("nbdinfo", &["--size", &uri]).trim(), SIZE.to_string());
    attached.crash();
    volume.must(&["detach", "--force", &volume.name]);
    assert!(!socket_of(&volume).exists());
    // What another program has put there stays.
    serve(&volume, &uri, &[]).crash();
    std::fs::remove_file(socket_of(&volume)).unwrap();
    File::create(socket_of(&volume)).unwrap();
    volume.must(&["detach", "--force", &volume.name]);
    assert!(socket_of(&volume).exists());
}

/// A command of an ordinary user, who has told wb of no folder.
fn of_user(volume: &Volume, args: &[&str]) -> Command {
    let mut command = as_nobody(volume, args);
    for variable in ["WB_CONFIG_DIR", "WB_RUN_DIR", "WB_STATE_DIR"] {
        command.env_remove(variable);
    }
    for variable in ["XDG_CONFIG_HOME", "XDG_STATE_HOME"] {
        command.env_remove(variable);
    }
    command.env("HOME", volume.path("home")).env("XDG_RUNTIME_DIR", volume.path("runtime"));
    command.current_dir(volume.dir.path());
    command
}

#[test]
fn an_ordinary_user_serves_files_and_needs_no_rights_for_it() {
    needs!("nbdcopy");
    let volume = Volume::blank(32, SIZE);
    let is_root = nix::unistd::geteuid().is_root();
    for folder in ["home", "runtime"] {
        std::fs::create_dir(volume.path(folder)).unwrap();
    }
    let give = |path: &Path| {
        if is_root {
            chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
        }
    };
    let paths = ["home", "runtime"].map(|it| volume.path(it));
    [volume.dir.path(), &volume.cache, &volume.backing].into_iter().for_each(give);
    paths.iter().for_each(|path| give(path));
    std::fs::set_permissions(volume.path("runtime"), Permissions::from_mode(0o700)).unwrap();
    let name = volume.name.as_str();
    let must = |args: &[&str]| {
        let outcome = Outcome::of(of_user(&volume, args));
        assert_eq!(outcome.code, 0, "{args:?}: {outcome:?}");
        outcome.stdout
    };
    must(
        &[&["create", name, "--serve", "nbd+unix:///?socket=nbd.socket"], &volume.pair()[..]]
            .concat(),
    );
    assert!(volume.path(&format!("home/.config/wb/{name}.toml")).exists());
    let mut attached = volume.start(of_user(&volume, &["attach", name]));
    let uri = uri_of(&volume);
    assert_eq!(attached.device_str(), uri);
    assert!(!attached.stderr().contains("WARN"), "{}", attached.stderr());
    assert!(volume.path(&format!("runtime/wb/{name}/socket")).exists());
    let image = file_of_noise(&volume);
    run("nbdcopy", &["--flush", image.to_str().unwrap(), &uri]);
    assert!(must(&["list"]).contains(&uri) && must(&["status", name]).contains(&uri));
    must(&["flush", name]);
    must(&["detach", name, "--drain"]);
    assert_eq!(attached.wait().code(), Some(0), "{}", attached.stderr());
    assert_eq!(sha256(&volume.backing), sha256(&image));
    assert!(!socket_of(&volume).exists());
    let notes = volume.path("home/.local/state/wb");
    assert_eq!(std::fs::read_dir(&notes).unwrap().count(), 1);

    let mut without = of_user(&volume, &["attach", name]);
    without.env_remove("XDG_RUNTIME_DIR");
    if is_root {
        let refused = Outcome::of(without);
        assert_eq!(refused.code, 1, "{refused:?}");
        assert!(refused.stderr.contains("set XDG_RUNTIME_DIR or WB_RUN_DIR"), "{refused:?}");
    }
    for block_device in ["auto", "loop"] {
        let mut refused = of_user(&volume, &["attach", name, "--serve", block_device]);
        refused.stdout(Stdio::null());
        if is_root {
            let refused = Outcome::of(refused);
            assert!(refused.stderr.contains("needs root (CAP_SYS_ADMIN)"), "{refused:?}");
        }
    }
}

#[test]
fn clients_get_errors_when_a_server_whose_device_hangs_is_ended_by_force() {
    needs_serving!();
    needs!("nbdsh");
    let mut volume = Volume::blank(32, SIZE);
    let failing = FailingFile::over(&volume.cache, &volume.path("failing"));
    volume.cache = failing.path.clone();
    volume.create(&[]);
    let uri = uri_of(&volume);
    let mut attached = serve(&volume, &uri, &[]);
    let hang = failing.hang();
    let script = "h.pwrite(b'1' * 4096, 0)\n\
                  try: h.flush()\n\
                  except nbd.Error: print('failed')";
    let mut client = nbdsh(&uri, script);
    let client = client.stdout(Stdio::piped()).spawn().unwrap();
    let waits = || volume.status()["live"]["cache_requests_in_flight"] != 0;
    assert!(wait_for(waits), "no request waits: {}", attached.stderr());
    let outcome = volume.wbctl(&["detach", "--force", &volume.name]);
    let said = String::from_utf8(client.wait_with_output().unwrap().stdout).unwrap();
    assert_eq!(said.trim(), "failed", "{outcome:?}");
    drop(hang);
    attached.wait();
    assert!(!socket_of(&volume).exists());
}
