//! The daemon's control socket: requests and replies, one JSON object a line.
//!
//! A client sends one request and reads replies until one that ends the exchange: anything but
//! [`Reply::Progress`], which a daemon sends every other second at least while it is at work.
//!
//! A daemon outlives the installation of a newer version, so either side may be the older one. A
//! missing member has a default, and an unknown member is ignored. A change that the other side
//! must not ignore needs a new [`PROTOCOL`].

mod client;
mod line;
mod state;
mod statistics;
mod status;

pub use client::{AskError, Client, Remaining, volume_of};
pub use state::VolumeState;
pub use statistics::{AccessCount, Latency, VolumeStatistics, hit_ratio, ratio};
pub use status::{BackingLink, LiveStatus, Processes, Stuck, VolumeStatus, by_name};

use crate::cache::TunableValue;
use crate::runtime::thread;
use line::Lines;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::{Uid, geteuid};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// The version of the protocol.
pub const PROTOCOL: u32 = 2;

/// The maximum number of clients whose requests may wait, for example for a device. Further ones
/// are turned away.
const MAX_WAITING: usize = 32;
/// The maximum number of connections. Those beyond [`MAX_WAITING`] are reserved for requests that
/// are answered at once, and for those that end the daemon. A device that hangs must not block
/// these.
const MAX_CONNECTIONS: usize = 128;
/// How long a client may take to send its request, or to take a reply.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a client asks of a daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// Asks for a [`Reply::Status`].
    Status,
    /// Makes everything acknowledged durable.
    Flush,
    /// Writes everything back.
    Drain,
    /// Asks for [`Reply::Tunables`].
    Tunables,
    /// Resets all counters.
    ClearStats,
    /// Changes tunables, all of them or none.
    Set {
        /// Tunables by name.
        #[serde(default)]
        tunables: BTreeMap<String, TunableValue>,
    },
    /// Pauses write-back, except for a drain and when the log is full. It waits a while for the
    /// current batch; a [`Reply::Status`] tells whether the batch has ended.
    Pause,
    /// Ends a pause.
    Resume,
    /// Goes on with the program as it is installed now. The first daemons do not know it.
    Restart,
    /// Stops serving, and exits.
    Detach {
        /// Write everything back first.
        #[serde(default)]
        drain: bool,
        /// Stop even while the device is held.
        #[serde(default)]
        force: bool,
    },
}

impl Request {
    /// Whether it may wait for long, and is not itself a way to end such a wait.
    fn may_wait(&self) -> bool {
        matches!(self, Request::Flush | Request::Drain | Request::Pause)
    }

    /// The version of the protocol that a daemon must speak to do what this asks.
    fn needs(&self) -> u32 {
        match self {
            Request::Restart => 2,
            _ => FIRST,
        }
    }
}

/// What a daemon answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum Reply {
    /// The volume's state.
    Status(Box<VolumeStatus>),
    /// The tunables in force.
    Tunables {
        /// Tunables by name.
        #[serde(default)]
        tunables: BTreeMap<String, TunableValue>,
    },
    /// The daemon is at work on the request.
    Progress {
        /// Data that is only in the cache.
        #[serde(default)]
        dirty_bytes: u64,
        /// How much of that is still to be written back. Data of the current batch stays dirty
        /// until the whole batch is durable. The first daemons do not tell.
        #[serde(default)]
        left_bytes: Option<u64>,
    },
    /// It is done.
    Done,
    /// It failed, or was refused.
    Error {
        /// Why, in a line.
        #[serde(default)]
        message: String,
    },
    /// A reply of a newer version.
    #[serde(other)]
    Unknown,
}

/// The first version of the protocol, whose messages do not name it.
const FIRST: u32 = 1;

/// A request or a reply as it goes over the socket.
#[derive(Serialize, Deserialize)]
struct Message<T> {
    /// In a reply, the protocol version of the daemon; in a request, the version that it needs. If
    /// it is missing, it is [`FIRST`], since the first daemons reject a request that names one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    protocol: Option<u32>,
    #[serde(flatten)]
    body: T,
}

impl<T> Message<T> {
    fn protocol(&self) -> u32 {
        self.protocol.unwrap_or(FIRST)
    }
}

/// Sends replies to one client. Once one has ended the exchange, no more are sent.
#[derive(Clone)]
pub struct Replies(Arc<Mutex<Exchange>>);

struct Exchange {
    socket: UnixStream,
    has_begun: bool,
    has_ended: bool,
    is_broken: bool,
}

impl Replies {
    /// To the client at the other end.
    pub fn to(socket: UnixStream) -> Replies {
        Replies(Arc::new(Mutex::new(Exchange {
            socket,
            has_begun: false,
            has_ended: false,
            is_broken: false,
        })))
    }

    /// Sends a reply.
    ///
    /// # Errors
    /// When the client is gone, or does not read.
    pub fn send(&mut self, reply: &Reply) -> io::Result<()> {
        let mut line = serde_json::to_vec(&Message { protocol: Some(PROTOCOL), body: reply })?;
        line.push(b'\n');
        let mut exchange = self.0.lock();
        if exchange.is_broken {
            return Err(ErrorKind::BrokenPipe.into());
        }
        if exchange.has_ended {
            return Ok(());
        }
        exchange.has_begun = true;
        exchange.has_ended = !matches!(reply, Reply::Progress { .. });
        // After a truncated line, the next one would not be readable.
        exchange.socket.write_all(&line).inspect_err(|_| exchange.is_broken = true)
    }

    /// The connection, to leave it to another process.
    ///
    /// # Errors
    /// When the system has no descriptor left.
    pub fn connection(&self) -> io::Result<OwnedFd> {
        self.0.lock().socket.as_fd().try_clone_to_owned()
    }

    /// Whether the client has hung up. A client that has only shut down its writing side has not.
    fn is_hung_up(&self) -> bool {
        let exchange = self.0.lock();
        let mut events = [PollFd::new(exchange.socket.as_fd(), PollFlags::empty())];
        let found = poll(&mut events, PollTimeout::ZERO);
        found.is_ok()
            && events[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP))
    }

    /// Whether the client was sent anything.
    pub fn has_begun(&self) -> bool {
        self.0.lock().has_begun
    }

    /// Whether a reply has ended the exchange, or the client is gone.
    pub fn has_ended(&self) -> bool {
        let exchange = self.0.lock();
        exchange.has_ended || exchange.is_broken
    }
}

/// One of a limited number of permits, until it is dropped.
struct Permit(Arc<AtomicUsize>);

impl Permit {
    fn take(taken: &Arc<AtomicUsize>, most: usize) -> Option<Permit> {
        let permit = Permit(taken.clone());
        (taken.fetch_add(1, Ordering::SeqCst) < most).then_some(permit)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Makes the socket of a daemon.
///
/// # Errors
/// When it cannot be created. A stale one of that name is replaced.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Answers clients of a socket, each in a thread of its own, until the process ends.
///
/// # Errors
/// When the system has no room for a thread.
pub fn serve(
    listener: UnixListener,
    handle: impl Fn(Request, &mut Replies) + Send + Sync + 'static,
) -> io::Result<()> {
    let waiting = Arc::<AtomicUsize>::default();
    let handle = Arc::new(move |request: Request, replies: &mut Replies| {
        let permit = request.may_wait().then(|| Permit::take(&waiting, MAX_WAITING));
        match permit {
            Some(None) => turn_away(replies, MAX_WAITING),
            _ => handle(request, replies),
        }
    });
    let connections = Arc::<AtomicUsize>::default();
    thread("wb-control").spawn(move || {
        for client in listener.incoming() {
            let Ok(client) = client else {
                // Most likely, the process has no descriptor left: try again when some may be free.
                std::thread::sleep(Duration::from_millis(100));
                continue;
            };
            if let Err(e) = refuse_stranger(&client) {
                let _ = Replies::to(client).send(&Reply::Error { message: e.to_string() });
                continue;
            }
            let Some(permit) = Permit::take(&connections, MAX_CONNECTIONS) else {
                turn_away(&mut Replies::to(client), MAX_CONNECTIONS);
                continue;
            };
            let handle = handle.clone();
            // Without a thread, the connection is closed.
            let _ = thread("wb-client").spawn(move || {
                answer(client, &*handle);
                drop(permit);
            });
        }
    })?;
    Ok(())
}

/// Refuses a peer that is neither root nor the user of this process.
fn refuse_stranger(peer: &UnixStream) -> io::Result<()> {
    let uid = Uid::from_raw(getsockopt(peer, PeerCredentials)?.uid());
    if uid.is_root() || uid == geteuid() {
        return Ok(());
    }
    let why = format!("refused: user {uid} is at the other end of the socket; only root may be");
    Err(io::Error::new(io::ErrorKind::PermissionDenied, why))
}

fn turn_away(replies: &mut Replies, most: usize) {
    let message = format!("more than {most} clients at a time");
    let _ = replies.send(&Reply::Error { message });
}

/// Reads the request of one client and passes it to `handle`. Replies to an invalid request with an
/// error. If the client did not wait, for example while the daemon was stopped, drops the request:
/// the client has reported its failure.
pub fn answer(client: UnixStream, handle: &impl Fn(Request, &mut Replies)) {
    let (Ok(()), Ok(writer)) = (client.set_write_timeout(Some(PATIENCE)), client.try_clone())
    else {
        return;
    };
    let mut replies = Replies::to(writer);
    match request(client) {
        Ok(_) if replies.is_hung_up() => {}
        Ok(request) => handle(request, &mut replies),
        Err(message) => drop(replies.send(&Reply::Error { message })),
    }
}

/// The request of a client, or why it cannot be read.
fn request(client: UnixStream) -> Result<Request, String> {
    let line = Lines::of(client).next(PATIENCE).map_err(|e| format!("not a request: {e}"))?;
    let asked: Message<serde_json::Value> =
        serde_json::from_str(&line).map_err(|e| format!("not a request: {e}"))?;
    if asked.protocol() > PROTOCOL {
        let newer = asked.protocol();
        return Err(format!(
            "the volume's daemon is older than wbctl, and cannot do this (it speaks version \
             {PROTOCOL} of the protocol, and {newer} is needed); detach the volume and attach it \
             again"
        ));
    }
    serde_json::from_value(asked.body)
        .map_err(|e| format!("not a request that the volume's daemon knows: {e}"))
}

/// The name of the socket in a daemon's folder.
pub const SOCKET: &str = "socket";

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::{BufRead, BufReader};

    /// What a daemon makes of a line, and the line that it answers.
    fn asked(line: &str) -> (Option<Request>, String) {
        let (mut client, daemon) = UnixStream::pair().unwrap();
        client.write_all(line.as_bytes()).unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let request = Mutex::new(None);
        answer(daemon, &|asked, replies| {
            *request.lock() = Some(asked);
            replies.send(&Reply::Done).unwrap();
        });
        let mut reply = String::new();
        BufReader::new(client).read_line(&mut reply).unwrap();
        (request.into_inner(), reply)
    }

    fn request_of(line: &str) -> Option<Request> {
        asked(&format!("{line}\n")).0
    }

    #[test]
    fn requests_are_what_they_are_documented_to_be() {
        assert_eq!(request_of(r#"{"request":"status"}"#), Some(Request::Status));
        let detach = Request::Detach { drain: true, force: false };
        assert_eq!(request_of(r#"{"request":"detach","drain":true,"force":false}"#), Some(detach));
        assert_eq!(request_of(r#"{"request":"explode"}"#), None);
        let set = Request::Set {
            tunables: [("nr_max_batched_writeback".into(), TunableValue::Number(64))].into(),
        };
        assert_eq!(
            request_of(r#"{"request":"set","tunables":{"nr_max_batched_writeback":64}}"#),
            Some(set)
        );
        assert_eq!(
            request_of(r#"{"request":"set","tunables":{"nr_max_batched_writeback":-1}}"#),
            None
        );
    }

    #[test]
    fn a_request_of_another_version_is_taken_unless_it_says_that_it_must_not_be() {
        let detach = Some(Request::Detach { drain: true, force: false });
        for line in [
            r#"{"request":"detach","drain":true,"force":false,"colour":1}"#,
            r#"{"request":"detach","drain":true}"#,
            r#"{"protocol":1,"request":"detach","drain":true}"#,
        ] {
            assert_eq!(request_of(line), detach, "{line}");
        }
        let (none, reply) = asked("{\"protocol\":3,\"request\":\"detach\",\"drain\":true}\n");
        assert!(none.is_none() && reply.contains("is older than wbctl"), "{reply}");
        assert!(asked("{\"request\":\"explode\"}\n").1.contains("unknown variant"));
    }

    #[test]
    fn each_reply_names_the_version_and_nothing_follows_the_last_one() {
        let (client, daemon) = UnixStream::pair().unwrap();
        let mut replies = Replies::to(daemon);
        let progress = Reply::Progress { dirty_bytes: 1, left_bytes: Some(1) };
        for reply in [&progress, &Reply::Done, &progress] {
            replies.send(reply).unwrap();
        }
        assert!(replies.has_ended());
        drop(replies);
        let lines: Vec<String> = BufReader::new(client).lines().map(Result::unwrap).collect();
        assert_eq!(
            lines,
            [
                r#"{"protocol":2,"reply":"progress","dirty_bytes":1,"left_bytes":1}"#,
                r#"{"protocol":2,"reply":"done"}"#
            ]
        );
    }

    #[test]
    fn a_client_that_has_hung_up_is_noticed() {
        let (client, daemon) = UnixStream::pair().unwrap();
        drop(client);
        let mut replies = Replies::to(daemon);
        let progress = Reply::Progress { dirty_bytes: 1, left_bytes: None };
        assert!(replies.send(&progress).is_err() && replies.send(&Reply::Done).is_err());
        assert!(replies.has_ended());
    }

    #[test]
    fn what_was_asked_for_by_a_client_that_has_hung_up_is_not_done() {
        let (mut client, daemon) = UnixStream::pair().unwrap();
        client.write_all(b"{\"request\":\"detach\"}\n").unwrap();
        drop(client);
        answer(daemon, &|request, _| panic!("{request:?} was done"));
    }

    #[test]
    fn a_permit_is_free_again_when_it_is_dropped() {
        let taken = Arc::default();
        let first = Permit::take(&taken, 1);
        assert!(first.is_some() && Permit::take(&taken, 1).is_none());
        drop(first);
        assert!(Permit::take(&taken, 1).is_some());
    }

    proptest! {
        #[test]
        fn arbitrary_lines_never_panic(line in ".*") {
            let _ = serde_json::from_str::<Message<Request>>(&line);
        }
    }
}
