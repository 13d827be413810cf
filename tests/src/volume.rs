//! A volume of one test: its devices, its configuration and run folders, and the daemon that serves
//! it.

use crate::process::{children_of, is_alive};
use crate::{
    Outcome, bin, flip_bit, golden, noise, overwrite, segment_offset, sha256, wait_for, zeros,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Only guards against hangs: no wait should take a tenth of it.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A volume: a cache device and a backing device, both files, and the folders of wbctl. Its name is
/// unique on this machine. All files are removed with this value.
pub struct Volume {
    /// The volume's name.
    pub name: String,
    /// The cache device.
    pub cache: PathBuf,
    /// The backing device.
    pub backing: PathBuf,
    /// The folder of all files of this volume.
    pub dir: TempDir,
    /// The loop devices that have served this volume.
    served: Mutex<Vec<Served>>,
}

impl Volume {
    fn with(
        cache: impl FnOnce(&TempDir) -> PathBuf,
        backing: impl FnOnce(&TempDir) -> PathBuf,
    ) -> Volume {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let dir = TempDir::with_prefix("wb-test-").expect("a temporary folder");
        let name = format!("test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::SeqCst));
        Volume { name, cache: cache(&dir), backing: backing(&dir), dir, served: Mutex::default() }
    }

    /// Two files of zeros, the cache with room for `segments`. No cache is made on it.
    pub fn blank(segments: u32, backing_bytes: u64) -> Volume {
        let cache_bytes = crate::cache_bytes(segments);
        Volume::with(
            |dir| zeros(dir, "cache.img", cache_bytes),
            |dir| zeros(dir, "backing.img", backing_bytes),
        )
    }

    /// A new volume, made by `wbctl create`. Its cache may be larger than its backing device.
    ///
    /// # Panics
    /// When wbctl fails.
    pub fn created(segments: u32, backing_bytes: u64) -> Volume {
        let volume = Volume::blank(segments, backing_bytes);
        let is_smaller = backing_bytes < crate::cache_bytes(segments);
        volume.create(if is_smaller { &["--force"] } else { &[] });
        volume
    }

    /// A new volume of at least 3 MiB. Its daemon was killed with dirty data in the cache, and the
    /// header of a segment is rotten.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn corrupt(segments: u32, backing_bytes: u64) -> Volume {
        let volume = Volume::created(segments, backing_bytes);
        let attached = volume.attach_with(&[]);
        overwrite(&attached.device, 0, &noise(1, 3 << 20));
        File::open(&attached.device)
            .and_then(|device| device.sync_all())
            .expect("a device that takes writes");
        attached.crash();
        flip_bit(&volume.cache, segment_offset(&volume.cache, 1) + 520);
        volume
    }

    /// A copy of a golden pair. It is not recorded.
    pub fn golden(name: &str) -> Volume {
        let pair = golden(name);
        let take = |from: PathBuf| {
            move |dir: &TempDir| {
                let to = dir.path().join(from.file_name().expect("a file"));
                std::fs::copy(&from, &to).expect("room for an image");
                to
            }
        };
        Volume::with(take(pair.cache.clone()), take(pair.backing.clone()))
    }

    /// A path in the volume's folder.
    pub fn path(&self, file: &str) -> PathBuf {
        self.dir.path().join(file)
    }

    /// The file that records the volume.
    pub fn record(&self) -> PathBuf {
        self.path("config").join(format!("{}.toml", self.name))
    }

    /// The SHA-256 of both devices.
    ///
    /// # Panics
    /// When they cannot be read.
    pub fn images(&self) -> [String; 2] {
        [sha256(&self.cache), sha256(&self.backing)]
    }

    /// The stable name of the loop device.
    pub fn link(&self) -> PathBuf {
        Path::new("/dev/wb").join(&self.name)
    }

    /// The daemon's socket.
    pub fn socket(&self) -> PathBuf {
        self.path("run").join(&self.name).join("socket")
    }

    /// The options that name the two devices.
    ///
    /// # Panics
    /// When a path is not UTF-8.
    pub fn pair(&self) -> [&str; 4] {
        let [cache, backing] =
            [&self.cache, &self.backing].map(|path| path.to_str().expect("UTF-8"));
        ["--cache", cache, "--backing", backing]
    }

    /// A wbctl command that works in this volume's folders.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(bin("wbctl"));
        for (variable, folder) in
            [("WB_CONFIG_DIR", "config"), ("WB_RUN_DIR", "run"), ("WB_STATE_DIR", "state")]
        {
            command.env(variable, self.path(folder));
        }
        command.args(args);
        command
    }

    /// Runs wbctl to its end.
    ///
    /// # Panics
    /// When it cannot be started or hangs.
    pub fn wbctl(&self, args: &[&str]) -> Outcome {
        Outcome::of(self.command(args))
    }

    /// Runs a command of wbctl that must succeed, and returns what it printed.
    ///
    /// # Panics
    /// When it fails.
    pub fn must(&self, args: &[&str]) -> String {
        let outcome = self.wbctl(args);
        assert_eq!(outcome.code, 0, "wbctl {args:?}: {outcome:?}");
        outcome.stdout
    }

    /// Runs `wbctl create` for this volume.
    ///
    /// # Panics
    /// When it fails.
    pub fn create(&self, more: &[&str]) -> String {
        self.must(&[&["create", self.name.as_str()], &self.pair()[..], more].concat())
    }

    /// The object that `wbctl status --json` prints, whatever the volume's state.
    ///
    /// # Panics
    /// When wbctl fails.
    pub fn status(&self) -> serde_json::Value {
        let outcome = self.wbctl(&["status", &self.name, "--json"]);
        assert!([0, 3, 4, 5].contains(&outcome.code), "{outcome:?}");
        outcome.json()
    }

    /// Attaches the volume by name and both devices, so it need not be recorded.
    ///
    /// # Panics
    /// When it does not get ready.
    pub fn attach(&self) -> Attached<'_> {
        self.attach_with(&self.pair())
    }

    /// Runs `wbctl attach NAME` with options. The volume becomes a loop device even where the
    /// kernel has ublk: many tests look at the loop device.
    ///
    /// # Panics
    /// When it does not get ready.
    pub fn attach_with(&self, more: &[&str]) -> Attached<'_> {
        let served = ["attach", self.name.as_str(), "--serve", "loop"];
        self.start(self.command(&[&served, more].concat()))
    }

    /// Attaches the volume with a keeper that starts another server however often one dies.
    ///
    /// # Panics
    /// When it does not get ready.
    pub fn attach_undying(&self) -> Attached<'_> {
        let mut attach = self.command(&["attach", self.name.as_str(), "--serve", "loop"]);
        attach.env("WB_DEATHS_A_MINUTE", "1000000");
        self.start(attach)
    }

    /// Runs a command that attaches this volume.
    ///
    /// # Panics
    /// When it does not get ready.
    pub fn start(&self, command: Command) -> Attached<'_> {
        let stderr = File::create(self.path("stderr")).expect("a new file");
        self.start_with(command, stderr.into())
    }

    /// Runs a command that attaches this volume, with `stderr` as its standard error.
    ///
    /// # Panics
    /// When it does not get ready.
    pub fn start_with(&self, mut command: Command, stderr: Stdio) -> Attached<'_> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .expect("wbctl");
        let stdout = child.stdout.take().expect("a pipe");
        let mut attached =
            Attached { device: PathBuf::new(), volume: self, child, mounts: Vec::new() };
        attached.device = first_line(stdout)
            .and_then(|line| line.strip_prefix("ready ").map(PathBuf::from))
            .unwrap_or_else(|| panic!("{command:?} is not ready:\n{}", attached.stderr()));
        self.served.lock().expect("a lock").push(Served::new(&attached.device));
        attached
    }

    /// The loop devices on this volume, whether or not their daemons live.
    ///
    /// # Panics
    /// When another thread panicked with the lock.
    pub fn loop_devices(&self) -> Vec<PathBuf> {
        let served = self.served.lock().expect("a lock");
        served
            .iter()
            .filter(|served| served.is_there())
            .map(|served| served.device.clone())
            .collect()
    }

    /// Waits until no loop device is left on this volume.
    pub fn is_gone(&self) -> bool {
        wait_for(|| self.loop_devices().is_empty())
    }
}

/// A loop device, told apart from a later one of the same name.
struct Served {
    device: PathBuf,
    sequence: Option<String>,
}

impl Served {
    fn new(device: &Path) -> Served {
        Served { device: device.into(), sequence: Served::sequence(device) }
    }

    /// A number that the kernel gives to each new use of a block device.
    fn sequence(device: &Path) -> Option<String> {
        let dir = Path::new("/sys/class/block").join(device.file_name()?);
        dir.join("loop")
            .exists()
            .then(|| std::fs::read_to_string(dir.join("diskseq")).unwrap_or_default())
    }

    fn is_there(&self) -> bool {
        self.sequence.is_some() && self.sequence == Served::sequence(&self.device)
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(self.link());
        if std::thread::panicking() {
            eprintln!("repeat it with: {}", crate::how_to_repeat());
        }
    }
}

fn first_line(from: impl std::io::Read + Send + 'static) -> Option<String> {
    let (sender, line) = channel();
    std::thread::spawn(move || {
        let mut line = String::new();
        let _ = BufReader::new(from).read_line(&mut line);
        let _ = sender.send(line.trim_end().to_string());
    });
    line.recv_timeout(PATIENCE).ok()
}

/// A running daemon. Dropping this value unmounts what was mounted through it, ends the daemon, and
/// makes sure that its loop device is gone.
pub struct Attached<'a> {
    /// The loop device.
    pub device: PathBuf,
    volume: &'a Volume,
    child: Child,
    mounts: Vec<PathBuf>,
}

impl Attached<'_> {
    /// The loop device's path as a text.
    ///
    /// # Panics
    /// When it is not UTF-8.
    pub fn device_str(&self) -> &str {
        self.device.to_str().expect("UTF-8")
    }

    /// What the daemon has written on standard error so far.
    pub fn stderr(&self) -> String {
        std::fs::read_to_string(self.volume.path("stderr")).unwrap_or_default()
    }

    /// Sends a signal to the daemon.
    ///
    /// # Panics
    /// When it has ended and was waited for.
    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).expect("a process id");
        kill(Pid::from_raw(pid), signal).expect("a daemon to signal");
    }

    /// The daemon's process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The process that serves requests, once it does.
    ///
    /// # Panics
    /// When there is none.
    pub fn server(&self) -> u32 {
        let mut found = None;
        let is_told = wait_for(|| {
            let outcome = self.volume.wbctl(&["status", &self.volume.name, "--json"]);
            let told = (outcome.code != 1).then(|| outcome.json()["live"]["server_pid"].as_u64());
            found = told.flatten().and_then(|pid| u32::try_from(pid).ok());
            found.is_some()
        });
        assert!(is_told, "there is no server: {}", self.stderr());
        found.unwrap_or_default()
    }

    /// Sends a signal to the server, and returns which process that is. It may have ended before.
    ///
    /// # Panics
    /// When there is none.
    pub fn signal_server(&self, signal: Signal) -> u32 {
        let server = self.server();
        let _ = kill(Pid::from_raw(i32::try_from(server).expect("a process id")), signal);
        server
    }

    /// Lets a server go on that was stopped.
    ///
    /// # Panics
    /// When it has ended.
    pub fn continue_server(&self, server: u32) {
        let server = Pid::from_raw(i32::try_from(server).expect("a process id"));
        kill(server, Signal::SIGCONT).expect("a server that was stopped");
    }

    /// Kills the server, and waits until another one serves.
    ///
    /// # Panics
    /// When none does.
    pub fn kill_server(&self) {
        let killed = self.signal_server(Signal::SIGKILL);
        assert!(wait_for(|| self.server() != killed), "no other server: {}", self.stderr());
    }

    /// How the daemon ended, if it did within a time.
    ///
    /// # Panics
    /// When the system does not say.
    pub fn ended_within(&mut self, limit: Duration) -> Option<ExitStatus> {
        let started = Instant::now();
        loop {
            let status = self.child.try_wait().expect("a child");
            if status.is_some() || started.elapsed() > limit {
                return status;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until the daemon has ended.
    ///
    /// # Panics
    /// When it does not end.
    pub fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        let child = &mut self.child;
        wait_for(|| {
            status = child.try_wait().expect("a child");
            status.is_some()
        });
        status.unwrap_or_else(|| panic!("the daemon does not end:\n{}", self.stderr()))
    }

    /// Whether the daemon still runs.
    ///
    /// # Panics
    /// When the system does not say.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("a child").is_none()
    }

    /// Ends the daemon with a signal that it handles, and checks that it ends well.
    ///
    /// # Panics
    /// When it does not.
    pub fn end(mut self, signal: Signal) {
        self.signal(signal);
        let status = self.wait();
        assert_eq!(status.code(), Some(0), "{status}: {}", self.stderr());
    }

    /// Kills the daemon without warning, and waits until its server has ended, too: that one
    /// serves until it hears of it.
    pub fn kill(&mut self) {
        let children = children_of(self.pid());
        let _ = self.child.kill();
        self.wait();
        wait_for(|| !children.iter().any(|child| is_alive(child)));
    }

    /// Kills the daemon without warning, and waits until its loop device is gone.
    pub fn crash(mut self) {
        self.kill();
    }

    /// Ends the FUSE connection of a daemon that cannot be killed.
    fn abort(&self) {
        let shown =
            crate::system("losetup", &["-l", "-n", "-O", "BACK-MAJ:MIN", self.device_str()]);
        let Some(number) = shown.as_deref().and_then(|shown| Some(shown.trim().split_once(':')?.1))
        else {
            return;
        };
        let on = self.volume.path("fusectl");
        let _ = std::fs::create_dir_all(&on);
        let _ = Command::new("mount").args(["-t", "fusectl", "wb-test"]).arg(&on).status();
        let _ = std::fs::write(on.join(number).join("abort"), "1");
        crate::unmount(&on);
    }

    /// Detaches with `wbctl detach` and options, and checks that the daemon ends well.
    ///
    /// # Panics
    /// When it does not.
    pub fn detach(mut self, options: &[&str]) {
        self.volume.must(&[&["detach", self.volume.name.as_str()], options].concat());
        let status = self.wait();
        assert_eq!(status.code(), Some(0), "{status}: {}", self.stderr());
    }

    /// Mounts the loop device's filesystem on a new folder.
    ///
    /// # Panics
    /// When that fails.
    pub fn mount(&mut self) -> PathBuf {
        let on = self.volume.path(&format!("mount-{}", self.mounts.len()));
        std::fs::create_dir_all(&on).expect("a new folder");
        let status = Command::new("mount").arg(&self.device).arg(&on).status().expect("mount");
        assert!(status.success(), "{} cannot be mounted: {}", self.device.display(), self.stderr());
        self.mounts.push(on.clone());
        on
    }

    /// Unmounts everything that was mounted, even if it is in use.
    pub fn unmount(&mut self) {
        for on in self.mounts.drain(..).rev() {
            crate::unmount(&on);
        }
    }

    fn tear_down(&mut self) {
        self.unmount();
        if self.is_running() {
            self.signal(Signal::SIGTERM);
            let child = &mut self.child;
            if !wait_for(|| child.try_wait().is_ok_and(|status| status.is_some())) {
                let _ = self.child.kill();
                self.abort();
                self.wait();
            }
        }
    }
}

impl Drop for Attached<'_> {
    fn drop(&mut self) {
        self.tear_down();
        let _ = std::fs::remove_file(self.volume.link());
        if std::thread::panicking() {
            eprintln!("the daemon of {} said:\n{}", self.volume.name, self.stderr());
        }
        let volume = self.volume;
        if !wait_for(|| !volume.loop_devices().contains(&self.device)) {
            let _ = Command::new("losetup").arg("--detach").arg(&self.device).status();
            assert!(std::thread::panicking(), "{} outlived its daemon", self.device.display());
        }
    }
}
