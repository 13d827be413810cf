//! The client side of the socket. It never waits without limit: a daemon that is at work keeps
//! saying so.

use super::line::Lines;
use super::{FIRST, Message, PROTOCOL, Reply, Request, SOCKET, refuse_stranger};
use crate::device::probe::identity;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, getsockopt, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use serde::Deserialize;
use serde_json::Value;
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// How long a daemon may be silent, in seconds. One that is at work reports progress more than
/// twice in that time.
const PATIENCE_SECONDS: u8 = 5;

/// Why a daemon gave no usable answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// No daemon listens.
    #[error("no daemon listens there")]
    NotThere,
    /// The daemon does not answer; it may not even take the request.
    #[error("its daemon{} does not answer", of_process(*.0))]
    Silent(Option<i32>),
    /// The daemon closed the connection before its last reply.
    #[error("its daemon went away")]
    Gone,
    /// This version does not understand the reply.
    #[error(
        "its daemon speaks version {protocol} of the protocol, and wbctl version {PROTOCOL}: {why}"
    )]
    Strange {
        /// The protocol version of the daemon.
        protocol: u32,
        /// What it does not understand.
        why: String,
    },
    /// A system call failed.
    #[error(transparent)]
    System(#[from] io::Error),
}

fn of_process(pid: Option<i32>) -> String {
    pid.map(|pid| format!(" (process {pid})")).unwrap_or_default()
}

/// How much a drain has left to do, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remaining {
    /// What is still to be written back.
    pub left: u64,
    /// What counts as dirty. Data of the current batch stays dirty until the whole batch is
    /// durable.
    pub dirty: u64,
}

/// A connection to a daemon.
pub struct Client {
    lines: Lines,
    pid: Option<i32>,
}

impl Client {
    /// Connects to a daemon's socket.
    ///
    /// # Errors
    /// When no daemon listens there, when it does not take connections, or when another user
    /// listens.
    pub fn connect(path: &Path) -> Result<Client, AskError> {
        let client = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
            .map_err(io::Error::from)?;
        // This also limits `connect`, which waits while too many other clients do.
        let limit = TimeVal::seconds(PATIENCE_SECONDS.into());
        setsockopt(&client, sockopt::SendTimeout, &limit).map_err(io::Error::from)?;
        let address = UnixAddr::new(path).map_err(io::Error::from)?;
        match connect(client.as_raw_fd(), &address) {
            Ok(()) => {}
            Err(Errno::ENOENT | Errno::ECONNREFUSED | Errno::ENOTDIR) => {
                return Err(AskError::NotThere);
            }
            Err(Errno::EAGAIN) => return Err(AskError::Silent(None)),
            Err(cause) => return Err(AskError::System(cause.into())),
        }
        let pid = getsockopt(&client, sockopt::PeerCredentials).ok().map(|peer| peer.pid());
        // A process of another PID namespace has no number here.
        let pid = pid.filter(|&pid| pid > 0);
        let client = UnixStream::from(client);
        refuse_stranger(&client)?;
        Ok(Client { lines: Lines::of(client), pid })
    }

    /// The process that listens, if the system knows it.
    pub fn pid(&self) -> Option<i32> {
        self.pid
    }

    /// Sends a request, passes progress to `progress`, and returns the last reply.
    ///
    /// # Errors
    /// When the daemon is silent for seconds, or goes away before its last reply.
    pub fn ask(
        &mut self,
        request: &Request,
        mut progress: impl FnMut(Remaining),
    ) -> Result<Reply, AskError> {
        let needs = Some(request.needs()).filter(|&version| version > FIRST);
        let mut line = serde_json::to_vec(&Message { protocol: needs, body: request })
            .map_err(io::Error::from)?;
        line.push(b'\n');
        match self.lines.socket().write_all(&line) {
            // The daemon may have sent the reason before it hung up.
            Err(e) if e.kind() != ErrorKind::BrokenPipe => return Err(self.failed(e)),
            _ => {}
        }
        let mut unknown = None;
        loop {
            let line = match self.lines.next(Duration::from_secs(PATIENCE_SECONDS.into())) {
                Ok(line) => line,
                Err(e) => return Err(unknown.unwrap_or_else(|| self.failed(e))),
            };
            let message = parse(&line)?;
            let protocol = message.protocol();
            match message.body {
                Reply::Progress { dirty_bytes, left_bytes } => {
                    progress(Remaining {
                        left: left_bytes.unwrap_or(dirty_bytes),
                        dirty: dirty_bytes,
                    });
                }
                // A newer daemon may send other messages while it works.
                Reply::Unknown => {
                    unknown = Some(AskError::Strange { protocol, why: line.trim_end().into() });
                }
                reply => return Ok(reply),
            }
        }
    }

    fn failed(&self, error: io::Error) -> AskError {
        match error.kind() {
            ErrorKind::TimedOut | ErrorKind::WouldBlock => AskError::Silent(self.pid),
            ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => {
                AskError::Gone
            }
            _ => AskError::System(error),
        }
    }
}

/// Reads a reply, and notes what a status leaves out.
fn parse(line: &str) -> Result<Message<Reply>, AskError> {
    let strange =
        |protocol| move |e: serde_json::Error| AskError::Strange { protocol, why: e.to_string() };
    let Message { protocol, body } =
        serde_json::from_str::<Message<Value>>(line).map_err(strange(FIRST))?;
    let mut reply = Reply::deserialize(&body).map_err(strange(protocol.unwrap_or(FIRST)))?;
    if let Reply::Status(status) = &mut reply {
        status.note_untold(&body);
    }
    Ok(Message { protocol, body: reply })
}

/// The attached volume that a device belongs to. It knows only of daemons that this user may ask
/// and that answer soon.
pub fn volume_of(device: &Path) -> Option<String> {
    let wanted = identity(device).ok()?;
    let is_wanted = |path: &Path| identity(path).is_ok_and(|found| found == wanted);
    std::fs::read_dir(crate::folders::run_dir()).ok()?.flatten().find_map(|daemon| {
        let mut client = Client::connect(&daemon.path().join(SOCKET)).ok()?;
        match client.ask(&Request::Status, |_| ()).ok()? {
            Reply::Status(volume)
                if is_wanted(&volume.cache) || volume.backing.path().is_some_and(is_wanted) =>
            {
                Some(volume.name)
            }
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A client, and the socket that a daemon would have.
    fn pair() -> (Client, UnixStream) {
        let (client, daemon) = UnixStream::pair().unwrap();
        (Client { lines: Lines::of(client), pid: Some(7) }, daemon)
    }

    fn answered(lines: &str) -> Result<Reply, AskError> {
        let (mut client, mut daemon) = pair();
        daemon.write_all(lines.as_bytes()).unwrap();
        daemon.shutdown(std::net::Shutdown::Write).unwrap();
        client.ask(&Request::Flush, |_| ())
    }

    #[test]
    fn what_a_newer_daemon_adds_is_passed_over() {
        let lines =
            "{\"protocol\":9,\"reply\":\"mood\",\"colour\":1}\n{\"reply\":\"done\",\"taste\":[]}\n";
        assert_eq!(answered(lines).unwrap(), Reply::Done);
        let only = answered("{\"protocol\":9,\"reply\":\"mood\"}\n").unwrap_err();
        assert!(matches!(only, AskError::Strange { protocol: 9, .. }), "{only:?}");
        assert!(matches!(answered("").unwrap_err(), AskError::Gone));
        assert!(matches!(answered("nonsense\n").unwrap_err(), AskError::Strange { .. }));
    }

    #[test]
    fn a_daemon_of_the_first_days_tells_less_of_a_drain() {
        let (mut client, mut daemon) = pair();
        let lines = "{\"reply\":\"progress\",\"dirty_bytes\":5}\n{\"reply\":\"progress\",\"\
                     dirty_bytes\":5,\"left_bytes\":3}\n{\"reply\":\"done\"}\n";
        daemon.write_all(lines.as_bytes()).unwrap();
        let mut seen = Vec::new();
        client
            .ask(&Request::Drain, |remaining| seen.push((remaining.left, remaining.dirty)))
            .unwrap();
        assert_eq!(seen, [(5, 5), (3, 5)]);
    }

    #[test]
    fn a_request_that_any_daemon_knows_names_no_version() {
        let (mut client, daemon) = pair();
        let asked =
            std::thread::spawn(move || Lines::of(daemon).next(Duration::from_secs(30)).unwrap());
        let _ = client.ask(&Request::Detach { drain: false, force: true }, |_| ());
        assert_eq!(
            asked.join().unwrap(),
            "{\"request\":\"detach\",\"drain\":false,\"force\":true}\n"
        );
    }
}
