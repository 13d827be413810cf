//! A volume outlives the process that serves it: who uses it waits for a moment, and gets no error.
//! `WB_KILLS` sets how often one test kills it.

use libwb::device::IoBuf;
use libwb::format::to_u64;
use nix::libc::O_DIRECT;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{File, Permissions};
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use wb_tests::{
    Attached, FailingFile, Filesystem, MIB, Outcome, Volume, needs_serving, noise, overwrite,
    read_at, wait_for,
};

const BLOCK: usize = 4096;
/// How many blocks each writer has.
const BLOCKS: usize = 64;

/// As [`Volume::attach_undying`], with a program of its own.
fn attach_program<'a>(volume: &'a Volume, program: &Path) -> Attached<'a> {
    let usual = volume.command(&["attach", &volume.name, "--serve", "loop"]);
    let mut command = Command::new(program);
    command.args(usual.get_args());
    command.envs(usual.get_envs().filter_map(|(key, value)| Some((key, value?))));
    command.env("WB_DEATHS_A_MINUTE", "1000000");
    volume.start(command)
}

fn exists(process: u32) -> bool {
    Path::new("/proc").join(process.to_string()).exists()
}

fn kill_process(process: u32) {
    let _ = kill(Pid::from_raw(i32::try_from(process).expect("a process id")), Signal::SIGKILL);
}

fn flush(device: &Path) {
    File::open(device).and_then(|device| device.sync_all()).expect("a flush");
}

/// What a writer writes in a round.
fn content(writer: usize, round: usize) -> Vec<u8> {
    noise(to_u64(writer << 32 | round), to_u64(BLOCK))
}

/// Writes blocks of its own past the page cache, and reads back what it wrote, until it is told to
/// stop. It seldom flushes. Returns how many blocks it wrote.
fn write_and_verify(device: &Path, writer: usize, stop: &AtomicBool) -> usize {
    let mut options = File::options();
    let file = options.read(true).write(true).custom_flags(O_DIRECT).open(device).expect("it");
    let at = |nth: usize| to_u64((writer * BLOCKS + nth) * BLOCK);
    let mut last = [0; BLOCKS];
    let mut round = 0;
    while !stop.load(Ordering::SeqCst) || round < 2 * BLOCKS {
        round += 1;
        let (written, read) = (round * 37 % BLOCKS, round * 11 % BLOCKS);
        let data = content(writer, round);
        file.write_all_at(&IoBuf::copy_of(&data), at(written)).expect("a write that waits");
        last[written] = round;
        if round % 100 == 0 {
            file.sync_all().expect("a flush that waits");
        }
        if last[read] > 0 {
            let mut found = IoBuf::zeroed(BLOCK);
            file.read_exact_at(&mut found, at(read)).expect("a read that waits");
            let expected = content(writer, last[read]);
            assert!(found[..] == expected[..], "block {read} of writer {writer} was lost");
        }
    }
    round
}

/// Runs writers that verify while `disturb` does something to the volume. Returns how many blocks
/// they wrote.
fn under_load(device: &Path, disturb: impl FnOnce()) -> usize {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let write = |writer| {
            let stop = &stop;
            scope.spawn(move || write_and_verify(device, writer, stop))
        };
        let writers: Vec<_> = (0..4).map(write).collect();
        let disturbed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(disturb));
        stop.store(true, Ordering::SeqCst);
        let written =
            writers.into_iter().map(|writer| writer.join().expect("no error, no loss")).sum();
        disturbed.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        written
    })
}

#[test]
fn programs_see_no_error_and_lose_nothing_while_the_server_is_killed_again_and_again() {
    needs_serving!();
    let volume = Volume::created(64, 64 * MIB);
    let attached = volume.attach_undying();
    let kills = std::env::var("WB_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(40);
    let written = under_load(&attached.device, || {
        (0..kills).for_each(|_| attached.kill_server());
    });
    println!("{kills} kills, {written} verified writes");
    assert_eq!(volume.status()["live"]["outlives_server"], true);
    attached.detach(&["--drain"]);
}

#[test]
fn a_mounted_filesystem_does_not_notice_that_the_server_dies() {
    needs_serving!("mkfs.ext4", "e2fsck");
    let volume = Volume::created(64, 128 * MIB);
    let mut attached = volume.attach_undying();
    Filesystem::Ext4.make(&attached.device);
    let on = attached.mount();
    for n in 0..20 {
        std::fs::write(on.join(format!("file-{n}")), noise(n, MIB)).unwrap();
        attached.kill_server();
    }
    for n in 0..20 {
        assert!(std::fs::read(on.join(format!("file-{n}"))).unwrap() == noise(n, MIB));
    }
    std::fs::write(on.join("still"), "writable").unwrap();
    attached.unmount();
    wb_tests::succeeds(Command::new("e2fsck").arg("-fn").arg(&attached.device));
    attached.detach(&[]);
}

#[test]
fn the_user_is_told_once_that_the_volume_is_ready() {
    needs_serving!();
    let volume = Volume::created(16, 16 * MIB);
    let told = volume.path("told");
    let mut attach = volume.command(&["attach", &volume.name, "--serve", "loop"]);
    attach.stdin(Stdio::null()).stdout(File::create(&told).unwrap()).stderr(Stdio::null());
    let mut keeper = attach.spawn().unwrap();
    let server = || volume.status()["live"]["server_pid"].as_u64();
    let mut replaced = wait_for(|| server().is_some());
    for _ in 0..2 {
        let before = server();
        before.into_iter().for_each(|pid| kill_process(u32::try_from(pid).unwrap()));
        replaced &= wait_for(|| server().is_some_and(|now| Some(now) != before));
    }
    let detached = volume.wbctl(&["detach", &volume.name]);
    let ended = keeper.wait().unwrap();
    assert!(replaced && detached.code == 0 && ended.success(), "{detached:?}, {ended}");
    let told = std::fs::read_to_string(&told).unwrap();
    assert!(told.lines().count() == 1 && told.starts_with("ready /dev/loop"), "{told:?}");
}

#[test]
fn what_was_set_at_run_time_and_a_pause_are_in_force_with_the_next_server() {
    needs_serving!();
    let volume = Volume::created(16, 16 * MIB);
    let attached = volume.attach_undying();
    volume.must(&["set", &volume.name, "nr_max_batched_writeback=7"]);
    volume.must(&["pause", &volume.name]);
    attached.kill_server();
    let live = volume.status()["live"].clone();
    let tunable = &live["tunables"]["nr_max_batched_writeback"];
    assert_eq!((tunable, &live["paused"]), (&7.into(), &true.into()));
    volume.must(&["resume", &volume.name]);
    attached.kill_server();
    assert_eq!(volume.status()["live"]["paused"], false);
    attached.detach(&[]);
}

#[test]
fn a_client_whose_drain_breaks_off_is_told_that_it_can_be_repeated() {
    needs_serving!();
    let mut volume = Volume::blank(32, 64 * MIB);
    let backing = FailingFile::over(&volume.backing, &volume.path("failing"));
    volume.backing = backing.path.clone();
    volume.create(&[]);
    let attached = volume.attach_undying();
    overwrite(&attached.device, 0, &noise(1, 4 * MIB));
    flush(&attached.device);
    let hang = backing.hang();
    let mut drain = volume.command(&["drain", &volume.name]);
    let drain = drain.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let waits = || volume.status()["live"]["backing_requests_in_flight"].as_u64() > Some(0);
    assert!(wait_for(waits), "{}", volume.status());
    let killed = attached.signal_server(Signal::SIGKILL);
    // A process whose requests a FUSE device has not answered does not end.
    drop(hang);
    let told = drain.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&told.stderr);
    assert!(!told.status.success() && said.contains("was restarted meanwhile"), "{said}");
    assert!(wait_for(|| attached.server() != killed));
    volume.must(&["drain", &volume.name]);
    assert!(read_at(&volume.backing, 0, 4 * MIB) == noise(1, 4 * MIB));
    attached.detach(&[]);
}

#[test]
fn a_volume_whose_servers_die_again_and_again_fails_loudly_and_can_be_attached_again() {
    needs_serving!();
    let volume = Volume::created(16, 16 * MIB);
    let mut attached = volume.attach_with(&[]);
    overwrite(&attached.device, 0, &noise(1, MIB));
    flush(&attached.device);
    (0..4).for_each(|_| attached.kill_server());
    attached.signal_server(Signal::SIGABRT);
    assert_eq!(attached.wait().code(), Some(1), "{}", attached.stderr());
    let said = attached.stderr();
    for part in ["was killed by SIGABRT", "too often within a minute", "has failed"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(!volume.link().is_symlink() && !volume.socket().exists() && volume.is_gone());
    drop(attached);
    let attached = volume.attach_with(&[]);
    assert!(read_at(&attached.device, 0, MIB) == noise(1, MIB));
    attached.detach(&[]);
}

/// Ways to kill a keeper and its server.
const KILLS: [fn(&Attached<'_>, u32); 4] = [
    |attached, _| attached.signal(Signal::SIGKILL),
    |attached, server| {
        attached.signal(Signal::SIGKILL);
        kill_process(server);
    },
    |attached, server| {
        kill_process(server);
        attached.signal(Signal::SIGKILL);
    },
    // A server that could not notice the end of its keeper.
    |attached, _| {
        attached.signal_server(Signal::SIGSTOP);
        attached.signal(Signal::SIGKILL);
    },
];

#[test]
fn no_process_stays_whoever_is_killed_first_even_with_a_dirty_page_cache() {
    needs_serving!("losetup");
    for (way, dirty) in (0..KILLS.len()).flat_map(|way| [(way, false), (way, true)]) {
        let volume = Volume::created(32, 256 * MIB);
        let mut attached = volume.attach_with(&[]);
        overwrite(&attached.device, 0, &noise(1, MIB));
        flush(&attached.device);
        if dirty {
            // More than the log takes at once, and no process has the device open any more.
            overwrite(&attached.device, 64 * MIB, &noise(2, 128 * MIB));
        }
        let server = attached.server();
        KILLS[way](&attached, server);
        attached.wait();
        assert!(wait_for(|| !exists(server)), "way {way}, {dirty}: the server stays");
        assert!(volume.is_gone(), "way {way}, {dirty}");
        drop(attached);
        let attached = volume.attach_with(&[]);
        assert!(read_at(&attached.device, 0, MIB) == noise(1, MIB), "way {way}, {dirty}");
        attached.detach(&[]);
    }
}

/// Puts another program in the place of the installed one, as a package manager does.
fn install(program: &Path, content: &[u8]) {
    let new = program.with_extension("new");
    std::fs::write(&new, content).expect("a program");
    std::fs::set_permissions(&new, Permissions::from_mode(0o755)).expect("its rights");
    std::fs::rename(&new, program).expect("its place");
}

#[test]
fn a_restart_under_load_takes_the_installed_program_unless_that_cannot_go_on() {
    needs_serving!();
    let volume = Volume::created(64, 64 * MIB);
    let program = volume.path("wbctl");
    let good = std::fs::read(wb_tests::bin("wbctl")).unwrap();
    install(&program, &good);
    let attached = attach_program(&volume, &program);
    let restart = || volume.wbctl(&["restart", &volume.name]);
    under_load(&attached.device, || {
        for _ in 0..3 {
            install(&program, &good);
            let before = attached.server();
            let done = restart();
            let now = attached.server();
            assert!(done.code == 0 && now != before, "{done:?}: {}", attached.stderr());
            assert!(done.stdout.contains(&format!("process {now} serves it")), "{done:?}");
        }
        for unfit in [&b"no program"[..], b"#!/bin/sh\nexit 71\n", b"#!/bin/none\n"] {
            let server = attached.server();
            install(&program, unfit);
            let refused = restart();
            let says = refused.stderr.contains("cannot take over");
            assert!(refused.code == 1 && says, "{refused:?}");
            assert_eq!(attached.server(), server);
            // When the server dies, one that goes on is found all the same.
            attached.kill_server();
        }
        // One that says that it can go on, and does not.
        let kept = volume.path("kept");
        install(&kept, &good);
        let liar = format!(
            "#!/bin/sh\ncase \"$1 $WB_KEEPING\" in attach*server*) exit 1;; esac\nexec {} \"$@\"\n",
            kept.display()
        );
        for _ in 0..2 {
            install(&program, liar.as_bytes());
            let server = attached.server();
            let done = restart();
            let says = done.stderr.contains("the installed program did not go on");
            assert!(done.code == 1 && says, "{done:?}: {}", attached.stderr());
            assert!(attached.server() != server);
        }
        std::fs::remove_file(&program).unwrap();
        attached.kill_server();
        assert_eq!(restart().code, 1);
        install(&program, &good);
        let done = restart();
        assert_eq!(done.code, 0, "{done:?}: {}", attached.stderr());
    });
    let keeper = std::fs::read_link(format!("/proc/{}/exe", attached.pid())).unwrap();
    assert_eq!(keeper, program, "the keeper is the installed program, too");
    attached.detach(&[]);
}

#[test]
fn a_signal_between_two_servers_ends_the_volume_in_order() {
    needs_serving!();
    let volume = Volume::created(16, 16 * MIB);
    let mut attached = volume.attach_with(&[]);
    overwrite(&attached.device, 0, &noise(1, MIB));
    // The server after the second one has to wait.
    attached.kill_server();
    attached.signal_server(Signal::SIGKILL);
    attached.signal(Signal::SIGTERM);
    assert_eq!(attached.wait().code(), Some(0), "{}", attached.stderr());
    assert!(!volume.socket().exists() && volume.is_gone());
    drop(attached);
    let attached = volume.attach_with(&[]);
    assert!(read_at(&attached.device, 0, MIB) == noise(1, MIB));
    attached.detach(&[]);
}

#[test]
fn ctrl_c_in_a_terminal_ends_a_volume_in_order() {
    needs_serving!("script");
    let volume = Volume::created(16, 16 * MIB);
    let attach = volume.command(&["attach", &volume.name, "--serve", "loop"]);
    // Without a shell in between, which would end as it likes.
    let program = attach.get_program().display();
    let line = format!("exec {program} attach {} --serve loop", volume.name);
    let mut terminal = Command::new("script");
    terminal.args(["-qefc", &line, "/dev/null"]);
    terminal.envs(attach.get_envs().filter_map(|(key, value)| Some((key, value?))));
    let mut terminal = terminal.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let is_attached = wait_for(|| volume.status()["state"] == "attached");
    if is_attached {
        overwrite(&volume.link(), 0, &noise(1, MIB));
    }
    terminal.stdin.as_mut().unwrap().write_all(b"\x03").unwrap();
    let ended = terminal.wait().unwrap();
    assert!(is_attached && ended.code() == Some(0), "{ended}");
    assert_eq!(volume.status()["state"], "detached");
    let attached = volume.attach_with(&[]);
    assert!(read_at(&attached.device, 0, MIB) == noise(1, MIB));
    attached.detach(&[]);
}

#[test]
fn a_server_is_started_by_a_keeper_alone() {
    let volume = Volume::created(4, 8 * MIB);
    let attach_as = |told: &str| {
        let mut command = volume.command(&["attach", &volume.name]);
        command.env("WB_KEEPING", told).stdin(Stdio::null());
        Outcome::of(command)
    };
    for told in ["server 1", "keeper 1"] {
        let outcome = attach_as(told);
        assert!(outcome.code == 1 && outcome.stderr.contains("no keeper"), "{outcome:?}");
    }
    for told in ["server 999", "", "\u{1f5c4}"] {
        assert_eq!(attach_as(told).code, 71, "{told}");
    }
}
