//! The control socket takes whatever comes.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::time::Duration;
use wb_tests::{FailingFile, MIB, PATIENCE, Volume, needs_serving, noise, wait_for};

/// Sends bytes and returns what the daemon answers, an empty text when it hangs up.
fn send(volume: &Volume, bytes: &[u8]) -> String {
    let mut socket = UnixStream::connect(volume.socket()).expect("a daemon that listens");
    socket.set_read_timeout(Some(PATIENCE)).expect("a socket");
    // The daemon may have had enough before it has read all.
    let _ = socket.write_all(bytes);
    let _ = socket.shutdown(Shutdown::Write);
    let mut line = String::new();
    let _ = BufReader::new(socket).read_line(&mut line);
    line
}

fn is_error(line: &str) -> bool {
    let reply: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
    reply["reply"] == "error" && reply["message"].is_string()
}

#[test]
fn garbage_gets_an_error() {
    needs_serving!();
    let volume = Volume::created(8, 8 * MIB);
    let attached = volume.attach_with(&[]);
    let deep = [b"[".repeat(60_000), b"\n".to_vec()].concat();
    let garbage: [&[u8]; 11] = [
        b"\n",
        b"",
        b"status\n",
        b"{}\n",
        b"null\n",
        b"{\"request\":\"explode\"}\n",
        b"{\"request\":\"detach\",\"drain\":1,\"force\":[]}\n",
        b"{\"request\":\"status\"",
        b"\xff\xfe\x00\n",
        &[b'a'; 60_000],
        &deep,
    ];
    for bytes in garbage {
        let line = send(&volume, bytes);
        assert!(
            is_error(&line),
            "{:?} got {line:?}",
            String::from_utf8_lossy(&bytes[..bytes.len().min(40)])
        );
    }
    for seed in 0..50 {
        send(&volume, &noise(seed, seed * 3000));
    }
    assert_eq!(volume.status()["state"], "attached");
    attached.detach(&[]);
}

#[test]
fn hundreds_of_clients_at_a_time_do_no_harm() {
    needs_serving!();
    let volume = Volume::created(8, 8 * MIB);
    let attached = volume.attach_with(&[]);
    let answers: Vec<String> = std::thread::scope(|scope| {
        let client = |n: u64| {
            let volume = &volume;
            scope.spawn(move || match n % 3 {
                0 => send(volume, b"{\"request\":\"status\"}\n"),
                1 => send(volume, b"{\"request\":\"flush\"}\n"),
                _ => send(volume, &noise(n, 200)),
            })
        };
        let clients: Vec<_> = (0..400).map(client).collect();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    });
    let served = answers.iter().filter(|line| line.contains("\"reply\":\"status\"")).count();
    assert!(served > 0, "{answers:?}");
    assert!(answers.iter().all(|line| line.ends_with('\n') || line.is_empty()), "{answers:?}");
    assert_eq!(volume.status()["state"], "attached");
    attached.detach(&["--drain"]);
}

/// A client that has sent a request, and reads what comes.
struct Asking(BufReader<UnixStream>);

impl Asking {
    fn of(volume: &Volume, request: &str) -> Asking {
        let mut socket = UnixStream::connect(volume.socket()).expect("a daemon that listens");
        socket.set_read_timeout(Some(PATIENCE)).expect("a socket");
        let _ = writeln!(socket, "{{\"request\":{request}}}");
        Asking(BufReader::new(socket))
    }

    /// The next reply; null when the daemon hung up.
    fn next(&mut self) -> serde_json::Value {
        let mut line = String::new();
        let _ = self.0.read_line(&mut line);
        serde_json::from_str(&line).unwrap_or_default()
    }

    /// The reply that ends the exchange.
    fn last(&mut self) -> serde_json::Value {
        loop {
            let reply = self.next();
            if reply["reply"] != "progress" {
                return reply;
            }
        }
    }
}

/// A new volume on a cache device that can hang.
fn on_hanging_cache() -> (Volume, FailingFile) {
    let mut volume = Volume::blank(16, 32 * MIB);
    let cache = FailingFile::over(&volume.cache, &volume.path("hanging"));
    volume.cache = cache.path.clone();
    volume.create(&[]);
    (volume, cache)
}

/// Writes a block that the volume's page cache does not keep.
fn write_block(device: &std::path::Path) {
    let file = File::options()
        .write(true)
        .custom_flags(nix::libc::O_DIRECT)
        .open(device)
        .expect("a device");
    file.write_all_at(&libwb::device::IoBuf::copy_of(&noise(1, 4096)), 0).expect("a write");
}

#[test]
fn while_a_device_hangs_status_and_detach_have_their_places_and_clients_that_hang_up_lose_theirs() {
    needs_serving!();
    let (volume, cache) = on_hanging_cache();
    let mut attached = volume.attach_with(&[]);
    let hanging = cache.hang_writes(0..u64::MAX);
    write_block(&attached.device);
    let mut waiting: Vec<Asking> = (0..32).map(|_| Asking::of(&volume, "\"flush\"")).collect();
    for asking in &mut waiting {
        assert_eq!(asking.next()["reply"], "progress");
    }
    let refused = volume.wbctl(&["flush", &volume.name]);
    assert_eq!(
        (refused.code, refused.stderr.as_str()),
        (1, "wbctl: more than 32 clients at a time\n")
    );
    assert_eq!(volume.status()["state"], "attached");
    // They go away, and that is noticed though the device still hangs.
    drop(waiting);
    assert!(wait_for(|| Asking::of(&volume, "\"flush\"").next()["reply"] == "progress"));
    let _waiting: Vec<Asking> = (0..32).map(|_| Asking::of(&volume, "\"flush\"")).collect();
    let mut detach = Asking::of(&volume, "\"detach\",\"force\":true");
    assert_eq!(detach.next()["reply"], "progress");
    drop(hanging);
    assert_eq!(detach.last()["reply"], "done");
    assert_eq!(attached.wait().code(), Some(0), "{}", attached.stderr());
}

#[test]
fn a_request_that_takes_long_is_not_taken_for_a_daemon_that_hangs() {
    needs_serving!();
    let (volume, cache) = on_hanging_cache();
    let attached = volume.attach_with(&[]);
    let hanging = cache.hang_writes(0..u64::MAX);
    write_block(&attached.device);
    let flushed = std::thread::scope(|scope| {
        let flush = scope.spawn(|| volume.wbctl(&["flush", &volume.name]));
        // Longer than a client waits for a daemon that says nothing.
        std::thread::sleep(Duration::from_secs(8));
        assert!(!flush.is_finished());
        drop(hanging);
        flush.join().unwrap()
    });
    assert_eq!(flushed.code, 0, "{flushed:?}");
    attached.detach(&[]);
}

#[test]
fn clients_that_ask_for_nothing_or_drop_by_drop_do_not_stay_for_ever() {
    needs_serving!();
    let volume = Volume::created(8, 8 * MIB);
    let attached = volume.attach_with(&[]);
    let idle: Vec<_> = (0..200).map(|_| UnixStream::connect(volume.socket()).unwrap()).collect();
    let mut last = BufReader::new(idle.last().unwrap());
    let mut line = String::new();
    last.read_line(&mut line).unwrap();
    assert!(is_error(&line) && line.contains("more than 128 clients at a time"), "{line}");
    // They are still connected, but have used up their time.
    assert!(wait_for(|| volume.wbctl(&["flush", &volume.name]).code == 0));
    drop(idle);
    let mut slow = UnixStream::connect(volume.socket()).unwrap();
    let mut reader = BufReader::new(slow.try_clone().unwrap());
    let dribbling = std::thread::spawn(move || {
        while slow.write_all(b" ").is_ok() {
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    let mut line = String::new();
    let _ = reader.read_line(&mut line);
    assert!(is_error(&line), "{line:?}");
    drop(reader);
    dribbling.join().unwrap();
    // A client that hangs up during a drain.
    drop(Asking::of(&volume, "\"drain\""));
    attached.detach(&[]);
}

#[test]
fn a_request_of_a_newer_client_is_taken_or_refused_as_it_says() {
    needs_serving!();
    let volume = Volume::created(8, 8 * MIB);
    let mut attached = volume.attach_with(&[]);
    let answer = |request: &str| Asking::of(&volume, request).last();
    assert_eq!(answer("\"flush\",\"colour\":1")["reply"], "done");
    assert_eq!(answer("\"set\"")["reply"], "done");
    let refused = answer("\"detach\",\"softly\":true,\"protocol\":3");
    let why = refused["message"].as_str().unwrap_or_default();
    assert!(why.contains("is older than wbctl") && refused["protocol"] == 2, "{refused}");
    assert!(attached.is_running());
    assert_eq!(answer("\"detach\",\"protocol\":1,\"colour\":1")["reply"], "done");
    assert_eq!(attached.wait().code(), Some(0), "{}", attached.stderr());
}
