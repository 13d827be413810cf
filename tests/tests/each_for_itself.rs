//! A fault of one volume, such as a silent daemon or an unreadable record, does not affect the
//! others.

use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use nix::sys::stat::Mode;
use serde_json::Value;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use wb_tests::{MIB, Outcome, Volume, cache_bytes, needs_serving, zeros};

/// Records a second volume in the same folders.
fn create_another(volume: &Volume) -> String {
    let name = format!("{}-b", volume.name);
    let [cache, backing] = [("b-cache", cache_bytes(8)), ("b-backing", 8 * MIB)]
        .map(|(name, bytes)| zeros(&volume.dir, name, bytes));
    let [cache, backing] = [&cache, &backing].map(|path| path.to_str().expect("UTF-8"));
    volume.must(&["create", &name, "--cache", cache, "--backing", backing]);
    name
}

/// What `list --json` or `status --json` prints of a volume.
fn of(name: &str, outcome: &Outcome) -> Value {
    let lines =
        outcome.stdout.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    lines
        .into_iter()
        .find(|volume| volume["name"] == name)
        .unwrap_or_else(|| panic!("{name}: {outcome:?}"))
}

/// Checks what all volumes are said to be, in each form: the first in `state`, because of `why`;
/// the second attached.
fn both_are_shown(volume: &Volume, names: [&str; 2], state: &str, why: &str) {
    for verb in ["list", "status"] {
        let json = volume.wbctl(&[verb, "--json"]);
        assert_eq!(json.code, 0, "{json:?}");
        let [first, second] = names.map(|name| of(name, &json));
        assert_eq!(
            (&first["state"], &second["state"]),
            (&state.into(), &"attached".into()),
            "{json:?}"
        );
        assert!(first["message"].as_str().is_some_and(|said| said.contains(why)), "{first}");
        let text = volume.must(&[verb]);
        assert!(text.contains(state) && text.contains(why) && text.contains(names[1]), "{text}");
    }
    let listed = volume.must(&["list"]);
    assert!(listed.contains(&format!("{}: {state}: ", names[0])), "{listed}");
    let metrics = volume.must(&["status", "--prometheus"]);
    for line in [
        format!("wb_attached{{volume=\"{}\"}} 0", names[0]),
        format!("wb_attached{{volume=\"{}\"}} 1", names[1]),
        format!("wb_state{{volume=\"{}\",state=\"{state}\"}} 1", names[0]),
        format!("wb_state{{volume=\"{}\",state=\"attached\"}} 0", names[0]),
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line}: {metrics}");
    }
}

#[test]
fn a_daemon_that_does_not_answer_is_told_of_and_holds_nobody_up() {
    needs_serving!();
    let volume = Volume::created(8, 8 * MIB);
    let name = volume.name.as_str();
    let second = create_another(&volume);
    let attached = volume.attach_with(&[]);
    let other = volume.start(volume.command(&["attach", &second]));
    let server = attached.signal_server(Signal::SIGSTOP);
    both_are_shown(
        &volume,
        [name, &second],
        "not answering",
        &format!("kill -9 {}", attached.pid()),
    );
    let status = volume.wbctl(&["status", name]);
    assert!(status.code == 4 && status.stdout.contains("not answering"), "{status:?}");
    let requests = [
        &["detach", name][..],
        &["detach", "--force", name],
        &["detach", "--drain", name],
        &["drain", name],
        &["flush", name],
        &["pause", name],
        &["get", name],
        &["set", name, "writeback_threshold=1"],
        &["stat", name],
        &["clear-stats", name],
    ];
    let why = format!("(process {}) does not answer", attached.pid());
    std::thread::scope(|scope| {
        for args in requests {
            let (volume, why) = (&volume, &why);
            scope.spawn(move || {
                let outcome = volume.wbctl(args);
                assert!(outcome.code == 1 && outcome.stderr.contains(why), "{args:?}: {outcome:?}");
            });
        }
    });
    attached.continue_server(server);
    assert_eq!(volume.wbctl(&["status", name]).code, 0);
    volume.must(&["detach", &second]);
    drop(other);
    attached.detach(&[]);
}

/// Connects until a daemon takes no more connections.
fn fill_backlog(path: &Path) -> Vec<OwnedFd> {
    let address = UnixAddr::new(path).expect("a path");
    let one = || {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let client = socket(AddressFamily::Unix, SockType::Stream, flags, None).expect("a socket");
        connect(client.as_raw_fd(), &address).is_ok().then_some(client)
    };
    std::iter::from_fn(one).collect()
}

#[test]
fn a_daemon_that_takes_no_connections_is_not_waited_for() {
    needs_serving!();
    let volume = Volume::created(8, 8 * MIB);
    let attached = volume.attach_with(&[]);
    let server = attached.signal_server(Signal::SIGSTOP);
    let clients = fill_backlog(&volume.socket());
    assert_eq!(volume.status()["state"], "not answering", "{}", clients.len());
    attached.continue_server(server);
    drop(clients);
    assert!(wb_tests::wait_for(|| volume.status()["state"] == "attached"));
    attached.detach(&[]);
}

#[test]
fn a_record_that_cannot_be_read_is_told_of_and_hides_no_other() {
    needs_serving!();
    let volume = Volume::created(8, 8 * MIB);
    let attached = volume.attach_with(&[]);
    let broken = format!("{}-broken", volume.name);
    let record = volume.path("config").join(format!("{broken}.toml"));
    let makers: [(&str, &dyn Fn()); 4] = [
        ("missing field `cache`", &|| std::fs::write(&record, "").unwrap()),
        ("line 1", &|| std::fs::write(&record, "cache = [").unwrap()),
        ("not a regular file", &|| nix::unistd::mkfifo(&record, Mode::S_IRWXU).unwrap()),
        ("not a regular file", &|| std::fs::create_dir(&record).unwrap()),
    ];
    for (why, make) in makers {
        make();
        both_are_shown(&volume, [&broken, &volume.name], "unreadable record", why);
        let named = volume.wbctl(&["status", &broken]);
        assert!(named.code == 1 && named.stderr.contains(why), "{named:?}");
        let both = volume.wbctl(&["status", &broken, "nobody-at-all", &volume.name]);
        assert!(both.code == 1 && both.stderr.contains(why), "{both:?}");
        assert!(
            both.stderr.contains("nobody-at-all") && both.stdout.contains("attached"),
            "{both:?}"
        );
        let dm = volume.wbctl(&["status", "--dm", "nobody-at-all", &volume.name]);
        assert!(dm.code == 1 && dm.stdout.lines().count() == 1, "{dm:?}");
        for args in [&["attach", &broken][..], &["get", &broken], &["remove", &broken]] {
            let refused = volume.wbctl(args);
            assert!(
                refused.code == 1 && refused.stderr.contains(record.to_str().unwrap()),
                "{refused:?}"
            );
        }
        if record.is_dir() {
            std::fs::remove_dir(&record).unwrap();
        } else {
            volume.must(&["remove", "--force", &broken]);
        }
        assert!(!volume.must(&["list"]).contains(&broken));
    }
    attached.detach(&[]);
}

#[test]
fn the_exit_code_of_status_tells_how_a_volume_is() {
    needs_serving!();
    let volume = Volume::created(8, 8 * MIB);
    let name = volume.name.as_str();
    let code = |args: &[&str]| volume.wbctl(&[&["status"], args].concat()).code;
    assert_eq!((code(&[name]), code(&[name, "--json"]), code(&[])), (3, 3, 0));
    let mut attached = volume.attach_with(&[]);
    assert_eq!((code(&[name]), code(&[name, "--dm"]), code(&["nobody"])), (0, 0, 1));
    let second = create_another(&volume);
    assert_eq!((code(&[name, &second]), code(&[])), (3, 0));
    attached.kill();
    assert_eq!(code(&[name]), 3);
}
