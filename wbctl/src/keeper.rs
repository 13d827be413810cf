//! The keeper of a volume: the process that `wbctl attach` was started as. It holds what must not
//! end when the server dies, and starts another server then, the same program found anew by its
//! path. It serves no request, opens no device, and waits for nothing but messages, signals and the
//! end of its server.
//!
//! Whatever is kept is closed in an order that lets each process end, whichever is killed first:
//! see [`Kept`].

use crate::apart;
use crate::crashes::{Crashes, described};
use crate::keeping::{
    BEFORE, FUSE, Given, Kept, LISTENER, LOCK, Link, Message, REFUSED, REPLACED, Role, VARIABLE,
};
use crate::logging;
use crate::notify::Relay;
use crate::programs::{Programs, SELF};
use crate::signals::{self, ENDING, ENOUGH};
use crate::volume_paths::VolumeName;
use anyhow::{Context, Result};
use libwb::cli::Exit;
use libwb::serve::loopdev::Reserved;
use nix::fcntl::Flock;
use nix::sys::signal::Signal;
use nix::sys::signalfd::SignalFd;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::ffi::CString;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

pub(crate) struct Keeper {
    name: VolumeName,
    kept: Kept,
    /// See [`Message::State`].
    state: Option<String>,
    /// Whether the volume outlives its server; unknown until it was served.
    outlives: Option<bool>,
    /// The block device of a volume that ends. The server may withdraw its note.
    device: Option<PathBuf>,
    /// The signals that end the volume, so far.
    told: Vec<Signal>,
    signals: SignalFd,
    relay: Relay,
    programs: Programs,
    crashes: Crashes,
}

/// A server, as its keeper knows it.
struct Server {
    child: Child,
    /// Can be read once the process has ended.
    end: OwnedFd,
    link: Link,
    is_silent: bool,
    understands: bool,
    /// Since when it serves the volume.
    ready: Option<Instant>,
    is_ending: bool,
    last_words: Option<String>,
}

/// What comes after a server.
enum Next {
    Server { after: Duration },
    Program,
    End(Exit),
}

impl Keeper {
    /// A keeper of a volume that nobody serves.
    pub(crate) fn new(
        name: VolumeName,
        reserved: Reserved,
        lock: Flock<File>,
        signals: SignalFd,
    ) -> Result<Keeper> {
        let mut kept = Kept::in_place(reserved);
        kept.put(LOCK, lock.as_fd().try_clone_to_owned()?)?;
        // The lock would be given up.
        std::mem::forget(lock);
        let program = std::env::current_exe().unwrap_or_else(|_| SELF.into());
        let (state, outlives, signals_told) = (None, None, Vec::new());
        let given =
            Given { kept, state, outlives, signals: signals_told, program, is_installed: true };
        Keeper::going_on(name, given, signals)
    }

    /// A keeper that goes on for another one.
    pub(crate) fn going_on(name: VolumeName, given: Given, signals: SignalFd) -> Result<Keeper> {
        let Given { kept, state, outlives, signals: told, program, is_installed: _ } = given;
        let programs = Programs::new(program, kept.get(BEFORE));
        Ok(Keeper {
            name,
            kept,
            state,
            outlives,
            device: None,
            told: told.into_iter().filter_map(|it| Signal::try_from(it).ok()).collect(),
            signals,
            relay: Relay::start()?,
            programs,
            crashes: Crashes::new(),
        })
    }

    /// Keeps the volume until its end.
    pub(crate) fn keep(mut self) -> Exit {
        let mut pause = Duration::ZERO;
        loop {
            self.wait(pause);
            let (status, server) = match self.start() {
                Ok(mut server) => (self.watch(&mut server), server),
                Err(e) => {
                    match self.not_started(&e) {
                        Ok(after) => pause = after,
                        Err(exit) => return exit,
                    }
                    continue;
                }
            };
            match self.after(&server, status) {
                Next::Server { after } => pause = after,
                Next::Program => {
                    let why = self.become_installed();
                    tracing::error!("cannot start {}: {why}", self.programs.installed().display());
                    pause = Duration::ZERO;
                }
                Next::End(exit) => return exit,
            }
        }
    }

    /// Starts a server, and tells it all.
    fn start(&mut self) -> io::Result<Server> {
        let (link, theirs) = Link::pair()?;
        let mut arguments = std::env::args_os();
        let mut command = Command::new(self.programs.chosen());
        if let Some(name) = arguments.next() {
            command.arg0(name);
        }
        command.args(arguments).env(VARIABLE, Role::variable("server"));
        // In a group of its own, so that the terminal's signals come here alone.
        let mut child = command.stdin(theirs.into_descriptor()).process_group(0).spawn()?;
        let told = self.tell_all(&link).and_then(|()| {
            let pid = Pid::from_child(&child);
            Ok(pidfd_open(pid, PidfdFlags::empty())?)
        });
        let end = told.inspect_err(|_| {
            let _ = child.kill().and_then(|()| child.wait());
        })?;
        Ok(Server {
            child,
            end,
            link,
            is_silent: false,
            understands: false,
            ready: None,
            is_ending: false,
            last_words: None,
        })
    }

    fn tell_all(&self, link: &Link) -> io::Result<()> {
        self.kept.send(link, |name| ![LOCK, BEFORE].contains(&name))?;
        self.tell_state(link)
    }

    fn tell_state(&self, link: &Link) -> io::Result<()> {
        if let Some(state) = &self.state {
            link.send(&Message::State { text: state.clone() }, None)?;
        }
        if let Some(outlives) = self.outlives {
            link.send(&Message::Ready { outlives }, None)?;
        }
        for signal in &self.told {
            link.send(&Message::Signal { number: *signal as i32 }, None)?;
        }
        let program = self.programs.installed().into();
        let is_installed = self.programs.is_installed();
        link.send(&Message::Begin { program, is_installed }, None)
    }

    /// Waits for the end of a server, and does what it says.
    fn watch(&mut self, server: &mut Server) -> io::Result<ExitStatus> {
        loop {
            let [signal, ended, said] = {
                let mut events = vec![
                    PollFd::new(&self.signals, PollFlags::IN),
                    PollFd::new(&server.end, PollFlags::IN),
                ];
                if !server.is_silent {
                    events.push(PollFd::new(&server.link, PollFlags::IN));
                }
                match poll(&mut events, None) {
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(e) => return Err(e.into()),
                }
                [0, 1, 2].map(|n: usize| events.get(n).is_some_and(|it| !it.revents().is_empty()))
            };
            if said || ended {
                self.hear(server);
            }
            if ended {
                return server.child.wait();
            }
            if signal {
                self.take_signals(Some(&server.link));
            }
        }
    }

    /// Waits before the next server is started, but not once the volume is to end.
    fn wait(&mut self, pause: Duration) {
        let until = Instant::now() + pause;
        while self.told.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            let Ok(left) = Timespec::try_from(left) else { return };
            let mut events = [PollFd::new(&self.signals, PollFlags::IN)];
            match poll(&mut events, Some(&left)) {
                Ok(0) | Err(_) => return,
                Ok(_) => self.take_signals(None),
            }
        }
    }

    fn take_signals(&mut self, server: Option<&Link>) {
        while let Ok(Some(info)) = self.signals.read_signal() {
            let signal = i32::try_from(info.ssi_signo).ok().and_then(|it| it.try_into().ok());
            let Some(signal) = signal.filter(|signal| ENDING.contains(signal)) else { continue };
            self.told.push(signal);
            if self.told.len() > ENOUGH {
                // The kernel kills the server.
                std::process::exit(Exit::Failed as i32);
            }
            if let Some(link) = server {
                // A server that is gone is noticed soon.
                let _ = link.send(&Message::Signal { number: signal as i32 }, None);
            }
        }
    }

    /// Takes what a server has said so far.
    fn hear(&mut self, server: &mut Server) {
        while !server.is_silent {
            match server.link.receive_now() {
                Ok(Some((message, came))) => self.obey(server, message, came),
                Ok(None) => server.is_silent = true,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == ErrorKind::InvalidData => {
                    tracing::warn!("the server says something that makes no sense: {e}");
                }
                Err(e) => {
                    tracing::warn!("cannot hear the server: {e}");
                    server.is_silent = true;
                }
            }
        }
    }

    fn obey(&mut self, server: &mut Server, message: Message, came: Option<OwnedFd>) {
        match message {
            Message::Hello => server.understands = true,
            Message::Keep { name } => {
                let kept = match came {
                    Some(descriptor) => self.keep_one(&name, descriptor),
                    None => Err(io::Error::other("no descriptor came along")),
                };
                server.answer(&kept.map_or_else(
                    |e| Message::Refused { why: format!("the keeper cannot keep the {name}: {e}") },
                    |()| Message::Done,
                ));
            }
            Message::Forget { name } => {
                drop(self.kept.take(&name));
                server.answer(&Message::Done);
            }
            Message::State { text } => self.state = Some(text),
            Message::Ready { outlives } => {
                self.outlives = Some(outlives);
                server.ready.get_or_insert_with(Instant::now);
                if self.programs.forget_before() {
                    drop(self.kept.take(BEFORE));
                }
            }
            Message::Notify { text } => self.relay.send(text),
            Message::LastWords { text } => server.last_words = Some(text),
            Message::Ending => {
                server.is_ending = true;
                self.device = self.name.noted_device();
                if let Err(e) = self.kept.let_go() {
                    tracing::warn!("cannot let go of the volume: {e}");
                }
                server.answer(&Message::Done);
            }
            Message::Begin { .. }
            | Message::Signal { .. }
            | Message::Done
            | Message::Refused { .. } => {
                tracing::warn!("the server says what only a keeper says");
            }
        }
    }

    fn keep_one(&mut self, name: &str, descriptor: OwnedFd) -> io::Result<()> {
        if name == LISTENER {
            // From now on, clients see this process at the other end.
            let _ = rustix::net::listen(&descriptor, 128);
        }
        self.kept.put(name, descriptor)
    }

    /// A server could not be started. Returns how long to wait before the next one.
    fn not_started(&mut self, error: &io::Error) -> Result<Duration, Exit> {
        let program = self.programs.chosen().display().to_string();
        if self.programs.choose_next() {
            tracing::warn!("cannot start {program}: {error}; trying another program");
            return Ok(Duration::ZERO);
        }
        tracing::error!("cannot start {program}: {error}");
        self.programs.choose_first();
        if self.outlives != Some(true) {
            return Err(Exit::Failed);
        }
        // Memory or process slots are short, which may pass.
        self.crashes.pause_after(Duration::ZERO).ok_or_else(|| self.give_up())
    }

    /// Decides what comes after a server that has ended.
    fn after(&mut self, server: &Server, status: io::Result<ExitStatus>) -> Next {
        let status = match status {
            Ok(status) => status,
            Err(e) => {
                tracing::error!("cannot wait for the server: {e}");
                return Next::End(self.give_up());
            }
        };
        let how = described(status, server.last_words.as_deref());
        if server.is_ending {
            return Next::End(self.ended(status, &how));
        }
        if status.code() == Some(REPLACED) {
            return Next::Program;
        }
        let was_new = server.ready.is_none();
        if was_new && status.code() == Some(REFUSED) || !server.understands {
            let program = self.programs.chosen().display().to_string();
            if self.programs.choose_next() {
                tracing::warn!("{program} cannot serve '{}': it {how}", self.name);
                return Next::Server { after: Duration::ZERO };
            }
        }
        match self.outlives {
            None => return Next::End(self.ended(status, &how)),
            Some(false) => {
                tracing::error!("the server {how}, and the volume ends with it");
                self.die_like(status);
            }
            Some(true) => {}
        }
        self.again(server, &how)
    }

    /// Another server, unless there is no point in it.
    fn again(&mut self, server: &Server, how: &str) -> Next {
        if server.ready.is_none() {
            if self.programs.choose_next() {
                tracing::error!("the server {how}, before it served; trying another program");
                return Next::Server { after: Duration::ZERO };
            }
            self.programs.choose_first();
        }
        let served = server.ready.map_or(Duration::ZERO, |since| since.elapsed());
        match self.crashes.pause_after(served) {
            Some(after) => {
                tracing::error!("the server {how}; another one goes on");
                self.relay.send("STATUS=the server died, and another one goes on".into());
                Next::Server { after }
            }
            None => {
                tracing::error!(
                    "the server of '{}' {how}: servers die too often within a minute of service",
                    self.name
                );
                Next::End(self.give_up())
            }
        }
    }

    /// The end of a volume that its server has ended, or has never served.
    fn ended(&self, status: ExitStatus, how: &str) -> Exit {
        self.remove_device();
        if let Some(signal) = status.signal() {
            let told = self.told.iter().any(|told| *told as i32 == signal);
            if let (true, Ok(signal)) = (told, Signal::try_from(signal)) {
                signals::die_of(signal);
            }
            logging::line(&format!("wbctl: the server {how}"));
        }
        match status.code() {
            Some(0) => Exit::Done,
            _ => Exit::Failed,
        }
    }

    /// Ends a volume that nobody serves. Its users get errors from now on.
    fn give_up(&mut self) -> Exit {
        logging::line(&format!(
            "wbctl: the volume '{0}' has failed: its users get errors. What was flushed is kept, \
             other writes may be lost. Unmount it, and attach it again with: wbctl attach {0}",
            self.name
        ));
        self.relay.send("STATUS=failed".into());
        drop(self.kept.take(FUSE));
        let _ = self.kept.let_go();
        self.remove_device();
        self.name.withdraw();
        Exit::Failed
    }

    /// Removes what may be left of the volume at the ublk driver, which would keep its users
    /// waiting for another server.
    fn remove_device(&self) {
        let device = self.device.clone().or_else(|| self.name.noted_device());
        device.iter().for_each(|device| apart::remove_own(device));
    }

    /// Ends as a daemon does whose server was killed: whoever has started it sees that.
    fn die_like(&self, status: ExitStatus) -> ! {
        logging::finish();
        if status.signal().is_some() {
            let _ = nix::sys::signal::raise(Signal::SIGKILL);
        }
        std::process::exit(Exit::Failed as i32)
    }

    /// Becomes the program that is installed now, with all that is kept. Returns only if that
    /// fails, and why.
    fn become_installed(&mut self) -> anyhow::Error {
        let had_before = self.kept.get(BEFORE).is_some();
        let why = match self.exec_installed() {
            Ok(never) => match never {},
            Err(why) => why,
        };
        if !had_before {
            drop(self.kept.take(BEFORE));
        }
        // It holds what the next program would have got. Any other descriptor will do.
        let _ = rustix::stdio::dup2_stdin(&self.signals);
        why
    }

    fn exec_installed(&mut self) -> Result<std::convert::Infallible> {
        let (link, theirs) = Link::pair()?;
        // If a restart went wrong, the program before it still serves.
        if self.kept.get(BEFORE).is_none() {
            self.kept.put(BEFORE, File::open(SELF)?.into())?;
        }
        self.kept.send(&link, |_| true)?;
        self.tell_state(&link)?;
        rustix::stdio::dup2_stdin(&theirs)?;
        drop(theirs);
        let program = CString::new(self.programs.installed().as_os_str().as_encoded_bytes())?;
        let arguments: Vec<CString> =
            std::env::args_os().map(|it| CString::new(it.into_vec())).collect::<Result<_, _>>()?;
        let environment = environment()?;
        logging::finish();
        // Not in the way of std, which would unblock the signals that are to wait.
        Ok(nix::unistd::execve(&program, &arguments, &environment)?)
    }
}

impl Server {
    fn answer(&self, message: &Message) {
        if let Err(e) = self.link.send(message, None) {
            tracing::debug!("cannot answer the server: {e}");
        }
    }
}

/// The environment of the next keeper.
fn environment() -> Result<Vec<CString>> {
    let others = std::env::vars_os().filter(|(key, _)| key != VARIABLE);
    let all = others.chain([(VARIABLE.into(), Role::variable("keeper").into())]);
    all.map(|(key, value)| {
        let pair = [key.into_vec(), value.into_vec()].join(&b'=');
        CString::new(pair).context("an environment variable with a NUL")
    })
    .collect()
}
