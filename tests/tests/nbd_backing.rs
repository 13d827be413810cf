//! The backing device is an export of an NBD server: nbdkit's, or QEMU's.

use libwb::device::IoBuf;
use nix::libc::{EIO, O_DIRECT};
use nix::sys::signal::Signal;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use wb_tests::{
    Filesystem, MIB, NbdServer, Outcome, Volume, fio_verify, needs_serving, noise, overwrite,
    read_at, succeeds, wait_for, wb,
};

const SIZE: u64 = 32 * MIB;

/// A volume whose backing device is the export `disk` of nbdkit, on the volume's backing file.
fn before_nbdkit(filters: &[&str]) -> (Volume, NbdServer) {
    let volume = Volume::blank(16, SIZE);
    let file = volume.backing.to_str().expect("UTF-8").to_string();
    let server = NbdServer::nbdkit(
        &volume.path("socket"),
        &[filters, &["-e", "disk", "file", &file]].concat(),
    );
    create(&volume, &server.uri("disk"));
    (volume, server)
}

fn create(volume: &Volume, uri: &str) {
    let cache = volume.cache.to_str().expect("UTF-8");
    volume.must(&["create", &volume.name, "--cache", cache, "--backing", uri]);
}

fn flush(device: &Path) {
    File::open(device).and_then(|device| device.sync_all()).expect("a flush");
}

fn link(volume: &Volume) -> serde_json::Value {
    volume.status()["live"]["backing_link"].clone()
}

fn is_up(volume: &Volume) -> bool {
    link(volume)["up"] == true
}

#[test]
fn a_filesystem_before_an_export_is_whole_there_once_it_is_drained() {
    needs_serving!("nbdkit", "mkfs.ext4", "fsck.ext4");
    let (volume, server) = before_nbdkit(&[]);
    let mut attached = volume.attach_with(&[]);
    Filesystem::Ext4.make(&attached.device);
    let on = attached.mount();
    std::fs::write(on.join("kept"), noise(1, 5 * MIB)).unwrap();
    std::fs::remove_dir(on.join("lost+found")).unwrap();
    attached.unmount();
    let status = volume.status();
    assert_eq!(status["backing"], server.uri("disk"));
    assert_eq!(status["live"]["backing_link"]["up"], true, "{status}");
    let text = volume.must(&["status", &volume.name]);
    assert!(text.contains("link to backing") && text.contains("up, 4 connections"), "{text}");
    let metrics = volume.must(&["status", "--prometheus", &volume.name]);
    assert!(metrics.contains(&format!("wb_backing_link_up{{volume=\"{}\"}} 1", volume.name)));
    let expected = read_at(&attached.device, 0, SIZE);
    attached.detach(&["--drain"]);
    assert!(read_at(&volume.backing, 0, SIZE) == expected);
    succeeds(Command::new("fsck.ext4").arg("-fn").arg(&volume.backing));
}

#[test]
fn a_server_that_is_killed_again_and_again_costs_time_and_no_data() {
    needs_serving!("nbdkit");
    let (volume, mut server) = before_nbdkit(&[]);
    let attached = volume.attach_with(&["writeback_threshold=1"]);
    for round in 0..5 {
        for nth in 0..8 {
            overwrite(&attached.device, nth * 4 * MIB, &noise(round * 8 + nth, 2 * MIB));
        }
        flush(&attached.device);
        server.kill();
        // Some is in the cache, and the rest waits for the server.
        server.start_again();
    }
    assert!(wait_for(|| is_up(&volume)), "{}", attached.stderr());
    assert!(link(&volume)["reconnects"].as_u64() >= Some(1), "{}", volume.status());
    for nth in 0..8 {
        let expected = noise(4 * 8 + nth, 2 * MIB);
        assert!(read_at(&attached.device, nth * 4 * MIB, 2 * MIB) == expected);
    }
    attached.detach(&["--drain"]);
    for nth in 0..8 {
        assert!(read_at(&volume.backing, nth * 4 * MIB, 2 * MIB) == noise(32 + nth, 2 * MIB));
    }
}

#[test]
fn while_the_link_is_down_writes_go_on_and_the_status_says_so() {
    needs_serving!("nbdkit");
    let (volume, mut server) = before_nbdkit(&[]);
    let attached = volume.attach_with(&[]);
    server.kill();
    overwrite(&attached.device, 0, &noise(1, MIB));
    flush(&attached.device);
    assert!(wait_for(|| !is_up(&volume)));
    let outcome = volume.wbctl(&["status", &volume.name]);
    assert_eq!(outcome.code, 5, "{outcome:?}");
    let trouble = format!("the link to {} has been down for", server.uri("disk"));
    for part in ["degraded", "link to backing", "down for"] {
        assert!(outcome.stdout.contains(part), "{part}: {}", outcome.stdout);
    }
    let status = volume.status();
    assert!(status["message"].as_str().is_some_and(|it| it.contains(&trouble)), "{status}");
    let metrics = volume.must(&["status", "--prometheus", &volume.name]);
    assert!(metrics.contains(&format!("wb_backing_link_up{{volume=\"{}\"}} 0", volume.name)));
    server.start_again();
    assert!(wait_for(|| is_up(&volume)));
    assert_eq!(volume.wbctl(&["status", &volume.name]).code, 0);
    attached.detach(&["--drain"]);
    assert!(read_at(&volume.backing, 0, MIB) == noise(1, MIB));
}

#[test]
fn a_volume_outlives_its_server_process_while_the_link_is_down() {
    needs_serving!("nbdkit");
    let (volume, mut server) = before_nbdkit(&[]);
    let attached = volume.attach_undying();
    if volume.status()["live"]["outlives_server"] != true {
        wb_tests::skip!("this kernel does not hand requests to another server");
    }
    overwrite(&attached.device, 0, &noise(1, 2 * MIB));
    server.kill();
    attached.kill_server();
    // What is cached can be read, and more can be written.
    assert!(read_at(&attached.device, 0, 2 * MIB) == noise(1, 2 * MIB));
    overwrite(&attached.device, 4 * MIB, &noise(2, MIB));
    flush(&attached.device);
    attached.kill_server();
    assert!(!is_up(&volume));
    server.start_again();
    assert!(wait_for(|| is_up(&volume)), "{}", attached.stderr());
    attached.detach(&["--drain"]);
    assert!(read_at(&volume.backing, 0, 2 * MIB) == noise(1, 2 * MIB));
    assert!(read_at(&volume.backing, 4 * MIB, MIB) == noise(2, MIB));
}

#[test]
fn a_volume_can_be_detached_while_the_link_is_down_and_keeps_what_it_has() {
    needs_serving!("nbdkit");
    let (volume, mut server) = before_nbdkit(&[]);
    let attached = volume.attach_with(&["writeback_threshold=1"]);
    server.kill();
    overwrite(&attached.device, 0, &noise(1, 3 * MIB));
    flush(&attached.device);
    assert!(wait_for(|| !is_up(&volume)));
    let told = volume.must(&["detach", &volume.name]);
    assert!(told.contains("3 MiB stay only in the cache"), "{told}");
    drop(attached);
    server.start_again();
    let attached = volume.attach_with(&[]);
    assert!(read_at(&attached.device, 0, 3 * MIB) == noise(1, 3 * MIB));
    attached.detach(&["--drain"]);
    assert!(read_at(&volume.backing, 0, 3 * MIB) == noise(1, 3 * MIB));
}

#[test]
fn a_volume_ends_in_order_although_a_read_waits_for_a_server_that_is_away() {
    needs_serving!("nbdkit");
    let (volume, mut server) = before_nbdkit(&[]);
    let attached = volume.attach_with(&[]);
    overwrite(&attached.device, 0, &noise(1, MIB));
    server.kill();
    let device = attached.device.clone();
    let reading = std::thread::spawn(move || {
        File::open(device).and_then(|device| device.read_exact_at(&mut [0; 4096], 16 * MIB))
    });
    assert!(wait_for(|| link(&volume)["waiting"].as_u64() > Some(0)));
    attached.end(Signal::SIGTERM);
    assert!(reading.join().unwrap().is_err());
    server.start_again();
    let attached = volume.attach_with(&[]);
    assert!(read_at(&attached.device, 0, MIB) == noise(1, MIB));
    attached.detach(&[]);
}

#[test]
fn after_backing_timeout_requests_fail_and_go_on_once_the_server_is_back() {
    needs_serving!("nbdkit");
    let (volume, mut server) = before_nbdkit(&[]);
    let attached = volume.attach_with(&["backing_timeout=1"]);
    server.kill();
    let far = 16 * MIB;
    let read = || {
        let mut sector = IoBuf::zeroed(4096);
        let mut options = File::options();
        let device = options.read(true).custom_flags(O_DIRECT).open(&attached.device);
        device.and_then(|device| device.read_exact_at(&mut sector, far))
    };
    let failed = read().expect_err("no server");
    assert_eq!(failed.raw_os_error(), Some(EIO), "{failed}");
    server.start_again();
    assert!(wait_for(|| read().is_ok()), "{}", attached.stderr());
    volume.must(&["set", &volume.name, "backing_timeout=0"]);
    assert_eq!(volume.status()["live"]["tunables"]["backing_timeout"], 0);
    attached.detach(&[]);
}

#[test]
fn a_server_that_hangs_is_waited_for() {
    needs_serving!("nbdkit");
    let (volume, server) = before_nbdkit(&[]);
    let attached = volume.attach_with(&[]);
    server.signal(Signal::SIGSTOP);
    overwrite(&attached.device, 0, &noise(1, 2 * MIB));
    flush(&attached.device);
    let device = attached.device.clone();
    // It is not in the cache.
    let reader = std::thread::spawn(move || read_at(&device, 16 * MIB, MIB));
    std::thread::sleep(Duration::from_secs(1));
    assert!(!reader.is_finished());
    server.signal(Signal::SIGCONT);
    assert!(reader.join().unwrap() == vec![0; 1 << 20]);
    attached.detach(&["--drain"]);
    assert!(read_at(&volume.backing, 0, 2 * MIB) == noise(1, 2 * MIB));
}

#[test]
fn errors_of_the_servers_disk_are_tried_again_and_nothing_is_lost() {
    needs_serving!("nbdkit");
    let filters = ["--filter=error", "--filter=delay"];
    let (volume, _server) = before_nbdkit(&filters);
    let socket = volume.path("failing");
    let file = volume.backing.to_str().expect("UTF-8");
    let failing = [
        &filters[..],
        &["-e", "disk", "file", file],
        &["error-pwrite=EIO", "error-pwrite-rate=2%", "error-zero=ENOSPC", "error-zero-rate=2%"],
        &["wdelay=2ms"],
    ];
    let server = NbdServer::nbdkit(&socket, &failing.concat());
    let cache = volume.cache.to_str().expect("UTF-8");
    let pair = ["--cache", cache, "--backing", &server.uri("disk")];
    let attached = volume.attach_with(&[&pair[..], &["writeback_threshold=1"]].concat());
    for nth in 0..7 {
        overwrite(&attached.device, nth * 4 * MIB, &noise(nth, MIB));
    }
    flush(&attached.device);
    let is_drained = wait_for(|| volume.wbctl(&["drain", &volume.name]).code == 0);
    assert!(is_drained, "{}", attached.stderr());
    attached.detach(&[]);
    for nth in 0..7 {
        assert!(read_at(&volume.backing, nth * 4 * MIB, MIB) == noise(nth, MIB), "{nth}");
    }
}

#[test]
fn fio_verifies_what_it_wrote_through_nbdkits_pauses_and_retries() {
    needs_serving!("nbdkit", "fio", "mkfs.ext4");
    let control = Volume::blank(16, MIB);
    let pause = format!("pause-control={}", control.path("pause").display());
    let volume = Volume::blank(16, SIZE);
    let file = volume.backing.to_str().expect("UTF-8");
    let with = ["--filter=pause", "--filter=retry", "-e", "disk", "file", file, &pause];
    let server = NbdServer::nbdkit(&volume.path("socket"), &with);
    create(&volume, &server.uri("disk"));
    let mut attached = volume.attach_with(&["writeback_threshold=1"]);
    Filesystem::Ext4.make(&attached.device);
    let on = attached.mount();
    let paused = control.path("pause");
    let pausing = std::thread::spawn(move || {
        for _ in 0..6 {
            for order in [b"p", b"r"] {
                let mut socket =
                    std::os::unix::net::UnixStream::connect(&paused).expect("the filter");
                socket.write_all(order).expect("the filter");
                let mut answer = [0];
                socket.read_exact(&mut answer).expect("an answer");
                std::thread::sleep(Duration::from_millis(200));
            }
        }
    });
    fio_verify(&on, 12 * MIB, &attached.sector_size());
    attached.unmount();
    pausing.join().unwrap();
    let expected = read_at(&attached.device, 0, SIZE);
    attached.detach(&["--drain"]);
    assert!(read_at(&volume.backing, 0, SIZE) == expected);
}

#[test]
fn a_qcow2_image_of_qemu_can_be_behind_a_volume() {
    needs_serving!("qemu-nbd", "qemu-img");
    let volume = Volume::blank(16, SIZE);
    let (image, raw) = (volume.path("image.qcow2"), volume.path("raw"));
    let qemu_img = |with: &[&str]| succeeds(Command::new("qemu-img").args(with));
    let [image, raw] = [&image, &raw].map(|path| path.to_str().expect("UTF-8"));
    qemu_img(&["create", "-q", "-f", "qcow2", image, &SIZE.to_string()]);
    let server = NbdServer::qemu(&volume.path("socket"), &["-f", "qcow2", image]);
    create(&volume, &server.uri(""));
    let attached = volume.attach_with(&[]);
    overwrite(&attached.device, 3 * MIB, &noise(3, 5 * MIB));
    let expected = read_at(&attached.device, 0, SIZE);
    attached.detach(&["--drain"]);
    drop(server);
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", image, raw]);
    assert!(read_at(Path::new(raw), 0, SIZE) == expected);
}

#[test]
fn replay_check_and_upgrade_take_an_export() {
    needs_serving!("nbdkit");
    let (volume, server) = before_nbdkit(&[]);
    let attached = volume.attach_with(&[]);
    overwrite(&attached.device, 0, &noise(1, 3 * MIB));
    attached.detach(&[]);
    let uri = server.uri("disk");
    let cache = volume.cache.to_str().expect("UTF-8");
    let checked = wb!("wbcheck", cache, "--backing", uri.as_str());
    assert_eq!(checked.code, 0, "{checked:?}");
    assert!(checked.stdout.contains(&format!("all inside {uri} (32 MiB)")), "{}", checked.stdout);
    let pair = ["--cache", cache, "--backing", uri.as_str()];
    let refused = volume.wbctl(&[&["upgrade"], &pair[..]].concat());
    assert!(refused.code == 1 || refused.stdout.contains("upgraded"), "{refused:?}");
    let report = volume.must(&[&["replay", "--json"], &pair[..]].concat());
    assert!(report.contains(&format!("\"backing\":\"{uri}\"")), "{report}");
    assert!(read_at(&volume.backing, 0, 3 * MIB) == noise(1, 3 * MIB));
    let removed = volume.must(&["remove", &volume.name]);
    assert!(removed.contains("removed"), "{removed}");
}

#[test]
fn an_export_that_does_not_fit_is_refused_in_one_line() {
    needs_serving!("nbdkit");
    let volume = Volume::blank(16, SIZE);
    let file = volume.backing.to_str().expect("UTF-8");
    let cache = volume.cache.to_str().expect("UTF-8");
    let refused = |uri: &str, why: &str| {
        let with = ["create", &volume.name, "--cache", cache, "--backing", uri];
        let Outcome { code, stdout, stderr } = volume.wbctl(&with);
        assert_eq!((code, stdout.as_str()), (1, ""), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        assert!(stderr.starts_with(&format!("wbctl: {uri}: ")) && stderr.contains(why), "{stderr}");
    };
    let socket = volume.path("socket");
    refused(&format!("nbd+unix:///d?socket={}", socket.display()), "No such file or directory");
    let server = NbdServer::nbdkit(&socket, &["-r", "-e", "d", "file", file]);
    refused(&server.uri("d"), "the export is read-only");
    drop(server);
    let server = NbdServer::qemu(&socket, &["-x", "d", "-f", "raw", file]);
    refused(&server.uri("e"), "the server has no export 'e'");
    drop(server);
    let server = NbdServer::nbdkit(&socket, &["-e", "d", "memory", "1M"]);
    refused(&server.uri("d"), "it has 1048576 bytes, and its cache device");
    drop(server);

    // It was right when the volume was made, and is another one now.
    let server = NbdServer::nbdkit(&socket, &["-e", "d", "file", file]);
    create(&volume, &server.uri("d"));
    drop(server);
    let server = NbdServer::nbdkit(&socket, &["memory", "31M"]);
    let refused = volume.wbctl(&["attach", &volume.name]);
    assert!(refused.code == 1 && refused.stderr.contains("this one has only"), "{refused:?}");
    let pair = ["--cache", cache, "--backing", &server.uri("other")];
    drop(server);
    let _server = NbdServer::nbdkit(&socket, &["memory", "32M"]);
    let refused = volume.wbctl(&[&["attach"], &pair[..]].concat());
    let why = "the cache was made for 'NBD export d', this one is 'NBD export other'";
    assert!(refused.code == 1 && refused.stderr.contains(why), "{refused:?}");
}

#[test]
fn an_address_with_a_typo_is_a_usage_error() {
    let volume = Volume::blank(16, MIB);
    for (uri, why) in [
        ("nbd://", "names no host"),
        ("nbd://host:port/x", "is no TCP port"),
        ("nbd+unix:///x", "names no socket"),
        ("nbd+unix:///x?sokcet=/y", "unknown parameter 'sokcet'"),
        ("nbds://host/x?tls-hostname=", "tls-hostname"),
    ] {
        let cache = volume.cache.to_str().expect("UTF-8");
        let with = ["create", &volume.name, "--cache", cache, "--backing", uri];
        let outcome = volume.wbctl(&with);
        assert_eq!(outcome.code, 2, "{outcome:?}");
        assert!(outcome.stderr.contains(why), "{outcome:?}");
    }
}

#[test]
fn another_host_without_tls_is_refused_unless_the_user_insists() {
    let volume = Volume::blank(16, MIB);
    let cache = volume.cache.to_str().expect("UTF-8");
    // An address that no host has: nothing is asked.
    let pair = ["--cache", cache, "--backing", "nbd://192.0.2.1/x"];
    for program in ["wbformat", "wbcheck"] {
        let refused = wb!(program, cache, "--backing", "nbd://192.0.2.1/x");
        assert!(refused.code != 0 && refused.stderr.contains("refused without TLS"), "{refused:?}");
    }
    for command in [
        &["create", volume.name.as_str()][..],
        &["attach", &volume.name],
        &["replay"],
        &["upgrade"],
    ] {
        let refused = volume.wbctl(&[command, &pair].concat());
        assert_eq!(refused.code, 1, "{refused:?}");
        let why = "wbctl: nbd://192.0.2.1/x: refused without TLS";
        assert!(refused.stderr.starts_with(why), "{refused:?}");
        assert!(refused.stderr.contains("--insecure uses it anyway"), "{refused:?}");
    }
    let near = format!("nbd+unix:///x?socket={}", volume.path("none").display());
    let tried = volume.wbctl(&["replay", "--cache", cache, "--backing", &near]);
    assert!(tried.stderr.contains("No such file or directory"), "{tried:?}");
}

/// A server that answers each client with the same bytes, and then with the last of them
/// without end.
fn garbage(volume: &Volume, bytes: &'static [u8], repeat: bool) -> String {
    let socket = volume.path("garbage");
    let _ = std::fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).expect("a socket");
    std::thread::spawn(move || {
        while let Ok((mut client, _)) = listener.accept() {
            std::thread::spawn(move || {
                let mut sent = client.write_all(bytes);
                while repeat && sent.is_ok() {
                    sent = client.write_all(&bytes[bytes.len().saturating_sub(20)..]);
                }
                let _ = client.read(&mut [0; 1000]);
                std::thread::sleep(Duration::from_secs(60));
            });
        }
    });
    format!("nbd+unix:///d?socket={}", socket.display())
}

#[test]
fn a_server_that_talks_nonsense_is_refused_in_one_line() {
    let volume = Volume::blank(16, SIZE);
    let cache = volume.cache.to_str().expect("UTF-8");
    const GREETING: &[u8] = b"NBDMAGICIHAVEOPT\x00\x03";
    // An answer to GO of 4 GiB; and answers to STRUCTURED_REPLY without end.
    const LONG: &[u8] = b"NBDMAGICIHAVEOPT\x00\x03\
        \x00\x03\xe8\x89\x04\x55\x65\xa9\x00\x00\x00\x08\x80\x00\x00\x01\xff\xff\xff\xff";
    const ENDLESS: &[u8] = b"NBDMAGICIHAVEOPT\x00\x03\
        \x00\x03\xe8\x89\x04\x55\x65\xa9\x00\x00\x00\x08\x00\x00\x00\x03\x00\x00\x00\x00";
    for (bytes, repeat) in [
        (&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], false),
        (&[0; 4096], false),
        (&[0xff; 64], true),
        (LONG, false),
        (ENDLESS, true),
        (GREETING, false),
    ] {
        let uri = garbage(&volume, bytes, repeat);
        let with = ["create", &volume.name, "--cache", cache, "--backing", &uri];
        let Outcome { code, stdout, stderr } = volume.wbctl(&with);
        assert_eq!((code, stdout.as_str()), (1, ""), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        assert!(stderr.starts_with(&format!("wbctl: {uri}: ")), "{stderr}");
        println!("{stderr}");
    }
    assert!(read_at(&volume.cache, 0, 4096).iter().all(|byte| *byte == 0), "nothing is formatted");
}

#[test]
fn attach_waits_for_a_server_that_is_not_there_yet() {
    needs_serving!("nbdkit");
    let (volume, mut server) = before_nbdkit(&[]);
    server.kill();
    let refused = volume.wbctl(&["attach", &volume.name]);
    assert!(refused.code == 1 && refused.stderr.contains(&server.uri("disk")), "{refused:?}");
    let attached = std::thread::scope(|scope| {
        let attaching = scope.spawn(|| volume.attach_with(&["--wait", "60"]));
        std::thread::sleep(Duration::from_secs(1));
        assert!(!attaching.is_finished());
        server.start_again();
        attaching.join().unwrap()
    });
    overwrite(&attached.device, 0, &noise(1, MIB));
    attached.detach(&["--drain"]);
    let file = File::open(&volume.backing).expect("a file");
    let mut found = vec![0; 1 << 20];
    file.read_exact_at(&mut found, 0).expect("a MiB");
    assert!(found == noise(1, MIB));
}
