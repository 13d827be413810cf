//! The control socket takes whatever comes.

use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;
use wb_tests::{MIB, PATIENCE, Volume, needs_serving, noise, wait_for};

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
    let garbage: [&[u8]; 12] = [
        b"\n",
        b"",
        b"status\n",
        b"{}\n",
        b"null\n",
        b"{\"request\":\"explode\"}\n",
        b"{\"request\":\"detach\"}\n",
        b"{\"request\":\"detach\",\"drain\":1,\"force\":[]}\n",
        b"{\"request\":\"status\"",
        b"\xff\xfe\x00\n",
        &[b'a'; 60_000],
        &deep,
    ];
    for bytes in garbage {
        let line = send(&volume, bytes);
        assert!(is_error(&line), "{:?} got {line:?}", String::from_utf8_lossy(&bytes[..bytes.len().min(40)]));
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

#[test]
fn clients_beyond_the_limit_are_told_so_and_idle_ones_do_not_stay_for_ever() {
    needs_serving!();
    let volume = Volume::created(8, 8 * MIB);
    let attached = volume.attach_with(&[]);
    let idle: Vec<_> = (0..40).map(|_| UnixStream::connect(volume.socket()).unwrap()).collect();
    let told = wait_for(|| {
        let outcome = volume.wbctl(&["flush", &volume.name]);
        outcome.code == 1 && outcome.stderr == "wbctl: more than 32 clients at a time\n"
    });
    assert!(told);
    drop(idle);
    assert!(wait_for(|| volume.wbctl(&["flush", &volume.name]).code == 0));
    // One that hangs up in the midst of a drain.
    let mut hasty = UnixStream::connect(volume.socket()).unwrap();
    hasty.write_all(b"{\"request\":\"drain\"}\n").unwrap();
    drop(hasty);
    std::thread::sleep(Duration::from_millis(10));
    attached.detach(&[]);
}
