//! The daemon's control socket: requests and replies, one JSON object a line.
//!
//! A client sends one request and reads replies until one that ends the exchange: anything but
//! [`Reply::Progress`].

mod statistics;

pub use statistics::{AccessCount, Latency, VolumeStatistics, hit_ratio, ratio};

use crate::cache::{Status, TunableValue, Tunables};
use crate::device::Pending;
use crate::device::probe::identity;
use crate::format::{BLOCK_BYTES, SEGMENT_BYTES, to_u64};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// The longest line that is read from a socket, in bytes.
const MAX_LINE: u64 = 64 * 1024;
/// Clients served at a time. More are turned away.
const MAX_CLIENTS: usize = 32;

/// How long a client may take to send its request, or to take a reply.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a daemon may take to answer where one can do without.
const SOON: Duration = Duration::from_secs(2);

/// What a client asks of a daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// For a [`Reply::Status`].
    Status,
    /// To make everything acknowledged durable.
    Flush,
    /// To write everything back, with [`Reply::Progress`] meanwhile.
    Drain,
    /// For [`Reply::Tunables`].
    Tunables,
    /// To let all counters start anew.
    ClearStats,
    /// To change tunables, all of them or none.
    Set {
        /// Tunables by name.
        tunables: BTreeMap<String, TunableValue>,
    },
    /// To write nothing back any more, but for a drain, and when the log is full.
    Pause,
    /// To end a pause.
    Resume,
    /// To stop serving and exit.
    Detach {
        /// Write everything back first, with [`Reply::Progress`] meanwhile.
        drain: bool,
        /// Stop even while the device is held.
        force: bool,
    },
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
        tunables: BTreeMap<String, TunableValue>,
    },
    /// A drain is under way.
    Progress {
        /// What is still to be written back.
        dirty_bytes: u64,
    },
    /// It is done.
    Done,
    /// It failed, or was refused.
    Error {
        /// Why, in a line.
        message: String,
    },
}

/// A volume's state, as `wbctl status --json` prints it. Sizes are bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// The volume's name.
    pub name: String,
    /// `attached`, `attached read-only`, `detached`, `starting or stopping`, or `failed` when writes are refused.
    pub state: String,
    /// The loop device, while attached.
    pub device: Option<PathBuf>,
    /// The cache device.
    pub cache: PathBuf,
    /// The backing device.
    pub backing: PathBuf,
    /// What only the daemon knows, while attached.
    pub live: Option<LiveStatus>,
}

/// The part of a volume's state that its daemon knows. Sizes are bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LiveStatus {
    /// The daemon's process id.
    pub pid: u32,
    /// Logical sector size of the loop device in bytes.
    pub sector_size: u32,
    /// Size of the volume.
    pub volume_bytes: u64,
    /// Size of the log: all its segments.
    pub log_bytes: u64,
    /// Room in the log for new segments, without waiting for write-back.
    pub free_bytes: u64,
    /// Data whose newest version is only in the cache: what the backing device lacks.
    pub dirty_bytes: u64,
    /// For how long the oldest of it has been waiting, in seconds; `None` where nobody knows.
    pub oldest_dirty_seconds: Option<f64>,
    /// Data that the cache holds a version of, dirty or clean.
    pub used_bytes: u64,
    /// How many places for blocks the log has.
    pub places: u64,
    /// The place that the next block takes, counted from the log's first slot.
    pub next_place: u64,
    /// The segment of that place.
    pub current_segment: u64,
    /// The newest segment of the log.
    pub newest_segment: u64,
    /// Every segment up to this one is on the cache device, perhaps in its volatile cache.
    pub written_segment: u64,
    /// Every segment up to this one survives a power cut.
    pub durable_segment: u64,
    /// Every segment up to this one is written back.
    pub written_back_segment: u64,
    /// Requests that the cache device has not answered yet.
    #[serde(default)]
    pub cache_requests_in_flight: u64,
    /// For how long the oldest of them has been waiting, in seconds.
    #[serde(default)]
    pub cache_oldest_request_seconds: Option<f64>,
    /// Requests that the backing device has not answered yet.
    #[serde(default)]
    pub backing_requests_in_flight: u64,
    /// For how long the oldest of them has been waiting, in seconds.
    #[serde(default)]
    pub backing_oldest_request_seconds: Option<f64>,
    /// Why writes are refused, if they are.
    pub failure: Option<String>,
    /// Write-back is paused.
    pub paused: bool,
    /// Why write-back does not get on, if it does not.
    pub writeback_error: Option<String>,
    /// How long recovery took, in seconds.
    pub recovery_seconds: f64,
    /// How many bytes of the log recovery read.
    pub recovery_bytes: u64,
    /// Tunables by name.
    pub tunables: BTreeMap<String, TunableValue>,
    /// What has happened since the volume was attached or `wbctl clear-stats`, by name.
    pub counters: BTreeMap<String, u64>,
    /// What else was counted in that time, and what follows from it.
    pub statistics: VolumeStatistics,
}

impl LiveStatus {
    /// What a cache says, in bytes and by name, and what its cache device and its backing device
    /// have been asked.
    pub fn new(status: &Status, sector_size: u32, [cache, backing]: [Pending; 2]) -> LiveStatus {
        LiveStatus {
            pid: std::process::id(),
            sector_size,
            volume_bytes: status.volume_bytes,
            log_bytes: status.log_bytes,
            free_bytes: status.free_segments * to_u64(SEGMENT_BYTES),
            dirty_bytes: status.dirty_blocks * to_u64(BLOCK_BYTES),
            oldest_dirty_seconds: status.oldest_dirty.map(|age| age.as_secs_f64()),
            used_bytes: status.used_blocks * to_u64(BLOCK_BYTES),
            places: status.places,
            next_place: status.next_place,
            current_segment: status.current.0,
            newest_segment: status.newest.0,
            written_segment: status.written.0,
            durable_segment: status.durable.0,
            written_back_segment: status.written_back.0,
            cache_requests_in_flight: cache.requests,
            cache_oldest_request_seconds: cache.oldest.map(|age| age.as_secs_f64()),
            backing_requests_in_flight: backing.requests,
            backing_oldest_request_seconds: backing.oldest.map(|age| age.as_secs_f64()),
            failure: status.failure.clone(),
            paused: status.paused,
            writeback_error: status.writeback_error.clone(),
            recovery_bytes: status.recovery_bytes,
            recovery_seconds: status.recovery_time.as_secs_f64(),
            tunables: by_name(&status.tunables),
            counters: status.statistics.counters.iter().map(|(key, _, value)| (key.into(), value)).collect(),
            statistics: VolumeStatistics::new(status),
        }
    }
}

/// Tunables by name.
pub fn by_name(tunables: &Tunables) -> BTreeMap<String, TunableValue> {
    tunables.pairs().map(|(key, value)| (key.into(), value)).collect()
}

/// Sends replies to one client.
pub struct Replies(UnixStream);

impl Replies {
    /// Sends a reply.
    ///
    /// # Errors
    /// When the client is gone.
    pub fn send(&mut self, reply: &Reply) -> io::Result<()> {
        let mut line = serde_json::to_vec(reply)?;
        line.push(b'\n');
        self.0.write_all(&line)
    }

    /// To reply to the same client from another thread.
    ///
    /// # Errors
    /// When the process has too many files open.
    pub fn try_clone(&self) -> io::Result<Replies> {
        self.0.try_clone().map(Replies)
    }
}

/// Answers clients of a socket, each on a thread of its own, until the process ends.
///
/// # Errors
/// When the socket cannot be made. A stale one of that name is replaced.
pub fn serve(path: &Path, handle: impl Fn(Request, &mut Replies) + Send + Sync + 'static) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    let handle = Arc::new(handle);
    let clients = Arc::new(AtomicUsize::new(0));
    std::thread::Builder::new().name("wb-control".into()).spawn(move || {
        for client in listener.incoming() {
            let Ok(client) = client else {
                // Out of descriptors, most likely: come again when some may be free.
                std::thread::sleep(Duration::from_millis(100));
                continue;
            };
            if clients.fetch_add(1, Ordering::SeqCst) >= MAX_CLIENTS {
                clients.fetch_sub(1, Ordering::SeqCst);
                let message = format!("more than {MAX_CLIENTS} clients at a time");
                let _ = Replies(client).send(&Reply::Error { message });
                continue;
            }
            let (handle, done) = (handle.clone(), clients.clone());
            let thread = std::thread::Builder::new().name("wb-client".into()).spawn(move || {
                answer(client, &*handle);
                done.fetch_sub(1, Ordering::SeqCst);
            });
            if thread.is_err() {
                clients.fetch_sub(1, Ordering::SeqCst);
            }
        }
    })?;
    Ok(())
}

/// Reads the request of one client and hands it over. What is no request is answered with an error.
pub fn answer(client: UnixStream, handle: &impl Fn(Request, &mut Replies)) {
    let limited = client.set_read_timeout(Some(PATIENCE)).and(client.set_write_timeout(Some(PATIENCE)));
    let (Ok(()), Ok(replies)) = (limited, client.try_clone()) else { return };
    let mut replies = Replies(replies);
    match read_line(&mut BufReader::new(client)) {
        Ok(line) => match serde_json::from_str(&line) {
            Ok(request) => handle(request, &mut replies),
            Err(e) => drop(replies.send(&Reply::Error { message: format!("not a request: {e}") })),
        },
        Err(e) => drop(replies.send(&Reply::Error { message: format!("not a request: {e}") })),
    }
}

fn read_line(from: &mut impl BufRead) -> io::Result<String> {
    let mut line = String::new();
    from.take(MAX_LINE).read_line(&mut line)?;
    if line.ends_with('\n') {
        return Ok(line);
    }
    let what = if line.is_empty() { "the connection ended" } else { "the line is cut off or too long" };
    Err(io::Error::new(io::ErrorKind::UnexpectedEof, what))
}

/// The folder that has one for each running daemon.
pub fn run_dir() -> PathBuf {
    std::env::var_os("WB_RUN_DIR").map_or_else(|| "/run/wb".into(), PathBuf::from)
}

/// The daemon's socket, in its folder of that.
pub const SOCKET: &str = "socket";

/// The attached volume that a device belongs to, as far as the daemons may be asked and answer soon.
pub fn volume_of(device: &Path) -> Option<String> {
    let wanted = identity(device).ok()?;
    let is_wanted = |path: &Path| identity(path).is_ok_and(|found| found == wanted);
    std::fs::read_dir(run_dir()).ok()?.flatten().find_map(|daemon| {
        let mut client = Client::connect(&daemon.path().join(SOCKET)).ok()?;
        client.0.get_mut().set_read_timeout(Some(SOON)).ok()?;
        match client.ask(&Request::Status, |_| ()).ok()? {
            Reply::Status(volume) if is_wanted(&volume.cache) || is_wanted(&volume.backing) => {
                Some(volume.name)
            }
            _ => None,
        }
    })
}

/// A connection to a daemon.
pub struct Client(BufReader<UnixStream>);

impl Client {
    /// Connects to a daemon's socket.
    ///
    /// # Errors
    /// When none listens there.
    pub fn connect(path: &Path) -> io::Result<Client> {
        Ok(Client(BufReader::new(UnixStream::connect(path)?)))
    }

    /// Sends a request; shows progress to `progress`; returns the reply that ends the exchange.
    ///
    /// # Errors
    /// When the daemon goes away before that.
    pub fn ask(&mut self, request: &Request, mut progress: impl FnMut(u64)) -> io::Result<Reply> {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        self.0.get_mut().write_all(&line)?;
        loop {
            match serde_json::from_str(&read_line(&mut self.0)?)? {
                Reply::Progress { dirty_bytes } => progress(dirty_bytes),
                reply => return Ok(reply),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn requests_are_what_they_are_documented_to_be() {
        let parse = |text| serde_json::from_str::<Request>(text);
        assert_eq!(parse(r#"{"request":"status"}"#).unwrap(), Request::Status);
        let detach = Request::Detach { drain: true, force: false };
        assert_eq!(parse(r#"{"request":"detach","drain":true,"force":false}"#).unwrap(), detach);
        assert!(parse(r#"{"request":"detach","drain":true,"force":false,"colour":1}"#).is_err());
        assert!(parse(r#"{"request":"explode"}"#).is_err());
        let set = parse(r#"{"request":"set","tunables":{"nr_max_batched_writeback":64}}"#).unwrap();
        assert_eq!(
            set,
            Request::Set { tunables: [("nr_max_batched_writeback".into(), TunableValue::Number(64))].into() }
        );
        assert!(parse(r#"{"request":"set","tunables":{"nr_max_batched_writeback":-1}}"#).is_err());
    }

    #[test]
    fn a_long_line_is_refused_without_being_read_whole() {
        let mut endless = BufReader::new(io::repeat(b'a'));
        assert!(read_line(&mut endless).is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_lines_never_panic(line in ".*") {
            let _ = serde_json::from_str::<Request>(&line);
        }
    }
}
