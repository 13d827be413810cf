//! A client and a daemon of different versions: whatever a daemon leaves out, the client shows the
//! rest, and detaches.

use nix::fcntl::{Flock, FlockArg};
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex};
use wb_tests::{MIB, Volume, needs_serving, noise, overwrite};

/// A daemon of another version: it answers what it is told to, and holds the lock until it is asked
/// to detach.
struct Daemon {
    status: Arc<Mutex<Value>>,
    lock: Arc<Mutex<Option<Flock<File>>>>,
    run: std::path::PathBuf,
}

impl Daemon {
    fn start(volume: &Volume) -> Daemon {
        let socket = volume.socket();
        let run = socket.parent().expect("a folder").to_path_buf();
        std::fs::create_dir_all(&run).expect("a new folder");
        let listener = UnixListener::bind(&socket).expect("a new socket");
        let daemon = Daemon { status: Arc::default(), lock: Arc::default(), run };
        daemon.tell(Value::Null);
        let (status, lock) = (daemon.status.clone(), daemon.lock.clone());
        // It ends with the test.
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let mut client = client.expect("a client");
                let mut asked = String::new();
                let _ = BufReader::new(&client).read_line(&mut asked);
                let reply = if asked.contains("\"status\"") {
                    status.lock().expect("a lock").to_string()
                } else {
                    r#"{"reply":"done"}"#.into()
                };
                let _ = writeln!(client, "{reply}");
                if asked.contains("\"detach\"") {
                    *lock.lock().expect("a lock") = None;
                }
            }
        });
        daemon
    }

    /// What it says of its status from now on. It is attached again if it was detached.
    fn tell(&self, status: Value) {
        *self.status.lock().expect("a lock") = status;
        let mut lock = self.lock.lock().expect("a lock");
        if lock.is_none() {
            let file = File::create(self.run.join("lock")).expect("a file");
            *lock = Some(
                Flock::lock(file, FlockArg::LockExclusiveNonblock).expect("a lock that is free"),
            );
        }
    }
}

/// All members of a value, as JSON pointers.
fn members(value: &Value, at: &str, found: &mut Vec<String>) {
    let inner: Vec<(String, &Value)> = match value {
        Value::Object(inner) => inner.iter().map(|(key, value)| (key.clone(), value)).collect(),
        // One stands for all.
        Value::Array(inner) => inner.iter().take(1).map(|value| ("0".into(), value)).collect(),
        _ => return,
    };
    for (key, value) in inner {
        let at = format!("{at}/{key}");
        if value.as_u64().is_none() || !at.contains("/buckets/") && !at.ends_with("/accesses/0") {
            members(value, &at, found);
        }
        found.push(at);
    }
}

/// The same without one member.
fn without(value: &Value, pointer: &str) -> Value {
    let mut value = value.clone();
    let (of, key) = pointer.rsplit_once('/').expect("a pointer");
    match value.pointer_mut(of) {
        Some(Value::Object(members)) => drop(members.remove(key)),
        Some(Value::Array(members)) => members.clear(),
        _ => panic!("{pointer}"),
    }
    value
}

/// What a daemon says of the status of a volume that has been at work.
fn true_status(volume: &Volume) -> Value {
    let attached = volume.attach_with(&[]);
    overwrite(&attached.device, 0, &noise(1, MIB));
    volume.must(&["drain", &volume.name]);
    let mut status = volume.status();
    status["reply"] = "status".into();
    // There is no such device once the daemon has ended, and none must be in the way of a detach.
    status["device"] = "/dev/loop-of-the-test".into();
    attached.detach(&[]);
    status
}

#[test]
fn whatever_a_daemon_leaves_out_the_rest_is_shown_and_detach_works() {
    needs_serving!();
    let volume = Volume::created(16, 16 * MIB);
    let name = volume.name.as_str();
    let whole = true_status(&volume);
    let daemon = Daemon::start(&volume);
    let mut found = Vec::new();
    members(&whole, "", &mut found);
    found.retain(|pointer| pointer != "/reply");
    assert!(found.len() > 80, "{found:?}");
    for pointer in found {
        daemon.tell(without(&whole, &pointer));
        for args in [&["list"][..], &["status", name]] {
            let shown = volume.wbctl(args);
            let says = shown.stdout.contains(name) && shown.stdout.contains("attached");
            assert!(shown.code == 0 && says, "without {pointer}: {shown:?}");
        }
        for args in [&["list", "--json"], &["status", "--json"]] {
            let shown = volume.wbctl(args);
            let json = shown.json();
            assert!(
                json["name"] == name && json["state"] == "attached",
                "without {pointer}: {shown:?}"
            );
            // What the daemon does not tell is null, never a number that looks true.
            let there = json.pointer(&pointer).filter(|value| !value.is_null());
            let is_known = ["/name", "/state"].contains(&pointer.as_str());
            assert!(
                there.is_none() || is_known || there == Some(&serde_json::json!([])),
                "{pointer}: {json}"
            );
        }
        let metrics = volume.wbctl(&["status", "--prometheus"]);
        let says =
            metrics.stdout.contains(&format!("wb_state{{volume=\"{name}\",state=\"attached\"}} 1"));
        assert!(metrics.code == 0 && says, "without {pointer}: {metrics:?}");
        if pointer == "/live/dirty_bytes" {
            assert!(!metrics.stdout.contains("wb_dirty_bytes{"), "{metrics:?}");
            let shown = volume.wbctl(&["status", name]);
            assert!(shown.stderr.contains("does not report live.dirty_bytes"), "{shown:?}");
        }
        let detached = volume.must(&["detach", name]);
        assert_eq!(detached, format!("detached '{name}'\n"), "without {pointer}");
    }
}

#[test]
fn what_a_newer_daemon_says_more_is_passed_over() {
    needs_serving!();
    let volume = Volume::created(16, 16 * MIB);
    let name = volume.name.as_str();
    let mut status = true_status(&volume);
    let daemon = Daemon::start(&volume);
    status["protocol"] = 99.into();
    status["state"] = "dreaming".into();
    for at in ["", "/live", "/live/statistics", "/live/statistics/latencies/write"] {
        status.pointer_mut(at).expect("a part of it")["colour"] = serde_json::json!({ "red": [1] });
    }
    daemon.tell(status);
    let shown = volume.must(&["list"]);
    assert!(shown.contains("dreaming"), "{shown}");
    assert_eq!(volume.wbctl(&["status", name]).code, 0);
    volume.must(&["status", "--prometheus"]);
    // A daemon whose status makes no sense at all can still be told to end.
    daemon.tell(serde_json::json!({ "reply": "status", "live": "yes" }));
    let odd = volume.wbctl(&["status", name]);
    assert!(odd.code == 4 && odd.stdout.contains("version"), "{odd:?}");
    volume.must(&["detach", name]);
}
