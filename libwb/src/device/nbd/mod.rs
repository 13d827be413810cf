//! A device on an NBD server, over connections that may be lost.
//!
//! A lost connection is no error of the disk: requests wait, and are sent again over a new one.
//! Errors that the server answers are errors of the disk, and go to the caller.
//!
//! # What is written again
//!
//! A server that came back may have lost every write that no flush covers. So acknowledged writes
//! are *remembered* until a flush that was sent after them has succeeded. After a reconnect they
//! are written again, before anything else goes out. Newer data takes the place of older data in
//! what is remembered; a durable write takes it away. So nothing older ever follows. If more than
//! 64 MiB would be remembered, writes wait, and the device flushes by itself. If such a flush
//! fails, or data cannot be written again, the next flush of the caller fails.
//!
//! # Old connections
//!
//! If one of several connections is lost, all are closed. But the server may live, and still
//! carry out what the old connections had under way: a write may come *late*. This is why no old
//! data comes back:
//!
//! - A write that was acknowledged has been carried out. It does not come late.
//! - A write goes out only when no write under way overlaps it. So what is acknowledged last was
//!   carried out last.
//! - A write that may come late is sent again, with the same data. It does not matter which of the
//!   two comes first.
//! - After a reconnect with such writes, a flush goes out before anything but remembered data: a
//!   server whose disk stands still takes connections, too, but answers no flush.
//! - Any other operation that changes the range of such a write waits until the server has
//!   presumably forgotten the old connections: 5 s after it has answered that flush.
//! - Remembered data does not wait. Where a write that may come late overlaps it, that write is the
//!   newer one, and is sent again later. Where remembered data was itself being written again and
//!   may come late, it has either not changed since, or the newer write has waited for it.
//!
//! A process that has died, or has given up the link, may have left writes under way, too. So
//! whoever opens the export to write makes durable what is there before anything else, and then
//! waits for those 5 s before it changes anything.
//!
//! The limits of this: a server that carries out a request of an old connection more than 5 s after
//! it has answered that flush can bring back old data. The protocol offers no protection. And a
//! write that has failed, whether with an error of the disk or because the link was down for too
//! long, may have been carried out, in part or late.
//!
//! # Silence
//!
//! A connection with requests under way that is silent for 30 s counts as lost. Each time that
//! happens, the limit doubles, up to 4 minutes, until a flush succeeds: else a server whose flush
//! takes longer would never get to its end.

mod connection;
mod connector;
mod coverage;
mod dial;
mod handshake;
mod keeper;
mod late;
mod operation;
mod remembered;
mod shared;
mod state;
#[cfg(test)]
mod tests;

pub use connector::{BoxStream, Connector, Stream};
pub use dial::{Dial, TlsError};
pub use handshake::LinkError;
#[cfg(feature = "sim")]
pub(in crate::device) use handshake::read_message;

use super::{
    BlockDevice, DeviceError, IoBuf, IoFuture, LinkStatus, Operation, Pending, SharedBuf, all,
};
use crate::format::{to_u64, to_usize};
use crate::nbd::{ExportName, TransmissionFlags};
use crate::pending::Requests;
use crate::rules::Rules;
use crate::runtime::Runtime;
use futures_channel::oneshot;
use futures_util::future::join_all;
use futures_util::{StreamExt, stream};
use handshake::Agreed;
use keeper::{Route, keep};
use nix::errno::Errno;
use operation::{Kind, Outcome};
use serde::{Deserialize, Serialize};
use shared::Shared;
use state::State;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// How much one request zeroes at most, in bytes: a server may have to write that many zeros.
const MOST_ZEROS: u64 = 32 << 20;

/// How many requests of one discard are under way at a time.
const ZEROS_AT_A_TIME: usize = 8;

/// How many bytes are remembered at most. Beyond that the device flushes by itself.
const MOST_REMEMBERED: u64 = 64 << 20;

/// How an export is opened.
#[derive(Clone, Debug)]
pub struct Options {
    export: ExportName,
    writable: bool,
    timeout: Option<Duration>,
    most_remembered: u64,
    rules: Rules,
}

impl Options {
    /// Reads the export with this name. Requests wait for a lost link without a time limit.
    pub fn new(export: ExportName) -> Options {
        Options {
            export,
            writable: false,
            timeout: None,
            most_remembered: MOST_REMEMBERED,
            rules: Rules::default(),
        }
    }

    /// Sets whether the export is written, too.
    #[must_use]
    pub fn writable(self, writable: bool) -> Options {
        Options { writable, ..self }
    }

    /// Sets how long requests wait for a lost link before they fail with `ETIMEDOUT`, until
    /// [`BlockDevice::set_timeout`] says otherwise.
    #[must_use]
    pub fn timeout(self, timeout: Option<Duration>) -> Options {
        Options { timeout, ..self }
    }

    /// Sets how many bytes are remembered at most, so that a test comes to that limit.
    #[cfg(feature = "sim")]
    #[must_use]
    pub fn remembering(self, most_remembered: u64) -> Options {
        Options { most_remembered, ..self }
    }

    /// Sets the rules. A test may break one of them.
    #[cfg(feature = "sim")]
    #[must_use]
    pub fn rules(self, rules: Rules) -> Options {
        Options { rules, ..self }
    }
}

/// What a client and a server have agreed upon. A process passes it to the one that goes on after
/// it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terms(Agreed);

/// Where requests go.
#[derive(Clone)]
struct Queue {
    shared: Arc<Shared>,
    requests: Arc<Requests>,
}

impl Queue {
    /// Begins an operation that fits one request. It goes on if the receiver is dropped.
    fn begin(&self, offset: u64, length: u64, kind: Kind) -> oneshot::Receiver<Outcome> {
        let (done, result) = oneshot::channel();
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        let in_flight = Some(self.requests.begin());
        self.shared.begin(operation::Operation { offset, length, kind, done, in_flight });
        result
    }
}

/// How an operation has ended.
async fn outcome(begun: oneshot::Receiver<Outcome>) -> Outcome {
    begun.await.unwrap_or(Err(Errno::ECANCELED))
}

/// An export of an NBD server.
pub struct NbdDevice {
    name: Arc<str>,
    identity: String,
    agreed: Agreed,
    queue: Queue,
}

impl NbdDevice {
    /// Connects to a server and opens an export. `name` is its name in messages.
    ///
    /// # Errors
    /// Says why the export cannot be used. The first connection must succeed at once.
    pub async fn open(
        runtime: Arc<dyn Runtime>,
        connector: Arc<dyn Connector>,
        name: &str,
        options: Options,
    ) -> Result<NbdDevice, LinkError> {
        let Options { export, writable, timeout, most_remembered, rules } = options;
        let identity = identity_of(&export);
        let route = Route { connector, export };
        let (connections, agreed) = route.connect(&*runtime).await?;
        if writable && agreed.flags.contains(TransmissionFlags::READ_ONLY) {
            return Err(LinkError::ReadOnly);
        }
        if writable && !agreed.flags.contains(TransmissionFlags::SEND_FLUSH) {
            return Err(LinkError::NoFlush);
        }
        let mut state = State::new(agreed, timeout, most_remembered, rules);
        if writable {
            state.begin_after_another();
        }
        let shared = Arc::new(Shared::new(state, runtime.clone()));
        runtime.spawn(Box::pin(keep(shared.clone(), route, Some(connections))));
        Ok(NbdDevice::of(shared, agreed, [name.into(), identity], writable))
    }

    /// Goes on with an export that a process used which has died. Does not wait for a connection:
    /// requests do. What the server then has is made durable before any of them. They fail if the
    /// export is not on `terms`.
    ///
    /// # Errors
    /// When no device can be used on these terms.
    pub fn go_on(
        runtime: Arc<dyn Runtime>,
        connector: Arc<dyn Connector>,
        name: &str,
        options: Options,
        terms: Terms,
    ) -> Result<NbdDevice, LinkError> {
        let Options { export, writable, timeout, most_remembered, rules } = options;
        let Terms(agreed) = terms;
        if !agreed.makes_sense() {
            return Err(LinkError::Nonsense("what another process has left"));
        }
        let identity = identity_of(&export);
        let route = Route { connector, export };
        let mut state = State::new(agreed, timeout, most_remembered, rules);
        state.begin_down(runtime.now());
        if writable {
            state.begin_after_another();
        }
        let shared = Arc::new(Shared::new(state, runtime.clone()));
        runtime.spawn(Box::pin(keep(shared.clone(), route, None)));
        Ok(NbdDevice::of(shared, agreed, [name.into(), identity], writable))
    }

    fn of(
        shared: Arc<Shared>,
        mut agreed: Agreed,
        [name, identity]: [String; 2],
        writable: bool,
    ) -> NbdDevice {
        if !writable {
            agreed.flags |= TransmissionFlags::READ_ONLY;
        }
        let queue = Queue { shared, requests: Arc::default() };
        NbdDevice { name: name.into(), identity, agreed, queue }
    }

    /// On what terms the export is used.
    pub fn terms(&self) -> Terms {
        Terms(self.queue.shared.state().agreed())
    }

    /// Whether it takes no writes.
    pub fn is_read_only(&self) -> bool {
        self.offers(TransmissionFlags::READ_ONLY)
    }

    fn offers(&self, flags: TransmissionFlags) -> bool {
        self.agreed.flags.contains(flags)
    }

    /// What is said when a request fails.
    fn failure(
        &self,
        operation: Operation,
        offset: u64,
        length: u64,
    ) -> impl Fn(Errno) -> DeviceError + Clone + Send + 'static {
        let device = self.name.clone();
        move |cause| DeviceError { device: device.clone(), operation, offset, length, cause }
    }

    /// Checks where a request is, and whether it may change anything there.
    fn check(&self, operation: Operation, offset: u64, length: u64) -> Result<(), DeviceError> {
        let unit = u64::from(self.agreed.block_size);
        let end = offset.checked_add(length).filter(|&end| end <= self.size());
        let fits = end.is_some() && offset.is_multiple_of(unit) && length.is_multiple_of(unit);
        let changes = operation != Operation::Read;
        let cause = match () {
            () if !fits => Errno::EINVAL,
            () if changes && self.is_read_only() => Errno::EROFS,
            () => return Ok(()),
        };
        Err(self.failure(operation, offset, length)(cause))
    }

    fn write_all(&self, offset: u64, parts: Vec<SharedBuf>, durably: bool) -> IoFuture<()> {
        let operation = if durably { Operation::DurableWrite } else { Operation::Write };
        let length = to_u64(parts.iter().map(|part| part.len()).sum());
        if let Err(error) = self.check(operation, offset, length) {
            return Box::pin(std::future::ready(Err(error)));
        }
        let mut at = offset;
        let begun = split(parts, to_usize(self.agreed.most.into())).into_iter().map(|parts| {
            let length = to_u64(parts.iter().map(|part| part.len()).sum());
            let begun = self.queue.begin(at, length, Kind::Write { parts, durably });
            at += length;
            begun
        });
        let (begun, failed) = (begun.collect(), self.failure(operation, offset, length));
        Box::pin(async move { ended(begun).await.map(drop).map_err(failed) })
    }

    fn make_zeros(&self, offset: u64, length: u64, keep_space: bool) -> IoFuture<()> {
        let operation = Operation::Discard;
        if let Err(error) = self.check(operation, offset, length) {
            return Box::pin(std::future::ready(Err(error)));
        }
        let failed = self.failure(operation, offset, length);
        if !self.offers(TransmissionFlags::SEND_WRITE_ZEROES) {
            return Box::pin(std::future::ready(Err(failed(Errno::EOPNOTSUPP))));
        }
        let queue = self.queue.clone();
        let zero = move |range: Range<u64>| {
            let (queue, failed) = (queue.clone(), failed.clone());
            async move {
                let kind = Kind::Zero { keep_space };
                let begun = queue.begin(range.start, range.end - range.start, kind);
                outcome(begun).await.map(drop).map_err(failed)
            }
        };
        let zeros = stream::iter(ranges(offset, length, MOST_ZEROS)).map(zero);
        Box::pin(all(zeros.buffer_unordered(ZEROS_AT_A_TIME)))
    }
}

impl Drop for NbdDevice {
    fn drop(&mut self) {
        self.queue.shared.state().close();
        self.queue.shared.tell();
    }
}

fn identity_of(export: &ExportName) -> String {
    match export.as_str() {
        "" => String::new(),
        name => format!("NBD export {name}"),
    }
}

/// Waits for all operations, even after a failure.
async fn ended(begun: Vec<oneshot::Receiver<Outcome>>) -> Result<Vec<IoBuf>, Errno> {
    join_all(begun.into_iter().map(outcome)).await.into_iter().collect()
}

/// The ranges of at most `most` bytes that make up a longer one.
fn ranges(offset: u64, length: u64, most: u64) -> impl Iterator<Item = Range<u64>> {
    let end = offset + length;
    let starts = std::iter::successors(Some(offset), move |at| Some(at + most));
    starts.take_while(move |&at| at < end).map(move |at| at..end.min(at + most))
}

/// Divides the parts of a write among requests of at most `most` bytes.
fn split(parts: Vec<SharedBuf>, most: usize) -> Vec<Vec<SharedBuf>> {
    let mut requests = vec![Vec::new()];
    let mut room = most;
    for part in parts {
        let mut begin = 0;
        while begin < part.len() {
            if room == 0 {
                requests.push(Vec::new());
                room = most;
            }
            let end = part.len().min(begin + room);
            if let Some(request) = requests.last_mut() {
                request.push(part.part(begin..end));
            }
            room -= end - begin;
            begin = end;
        }
    }
    requests.retain(|request| !request.is_empty());
    requests
}

impl BlockDevice for NbdDevice {
    fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// An incomplete unit of I/O at the end of the export is not used.
    fn size(&self) -> u64 {
        self.agreed.size / u64::from(self.agreed.block_size) * u64::from(self.agreed.block_size)
    }

    /// The name of the export. One without a name has no identity.
    fn identity(&self) -> &str {
        &self.identity
    }

    fn block_size(&self) -> u32 {
        self.agreed.block_size
    }

    fn pending(&self) -> Pending {
        self.queue.requests.pending()
    }

    fn link(&self) -> Option<LinkStatus> {
        let shared = &self.queue.shared;
        Some(shared.state().status(shared.now()))
    }

    fn set_timeout(&self, timeout: Option<Duration>) {
        let shared = &self.queue.shared;
        shared.state().set_timeout(timeout, shared.now());
        shared.tell();
    }

    fn read(&self, offset: u64, buf: IoBuf) -> IoFuture<IoBuf> {
        let length = to_u64(buf.len());
        if let Err(error) = self.check(Operation::Read, offset, length) {
            return Box::pin(std::future::ready(Err(error)));
        }
        if length == 0 {
            return Box::pin(std::future::ready(Ok(buf)));
        }
        let failed = self.failure(Operation::Read, offset, length);
        let most = u64::from(self.agreed.most);
        if length <= most {
            let begun = self.queue.begin(offset, length, Kind::Read(buf));
            return Box::pin(async move { outcome(begun).await.map_err(failed) });
        }
        let begun = ranges(offset, length, most).map(|range| {
            let length = range.end - range.start;
            self.queue.begin(range.start, length, Kind::Read(IoBuf::zeroed(0)))
        });
        let (begun, mut buf) = (begun.collect(), buf);
        Box::pin(async move {
            let mut at = 0;
            for part in ended(begun).await.map_err(failed)? {
                buf[at..at + part.len()].copy_from_slice(&part);
                at += part.len();
            }
            Ok(buf)
        })
    }

    fn write(&self, offset: u64, data: SharedBuf) -> IoFuture<()> {
        self.write_all(offset, vec![data], false)
    }

    fn write_parts(&self, offset: u64, parts: Vec<SharedBuf>) -> IoFuture<()> {
        self.write_all(offset, parts, false)
    }

    fn prefers_durable_writes(&self) -> bool {
        self.offers(TransmissionFlags::SEND_FUA)
    }

    fn write_durably(&self, offset: u64, parts: Vec<SharedBuf>) -> IoFuture<()> {
        if self.prefers_durable_writes() {
            return self.write_all(offset, parts, true);
        }
        let length = to_u64(parts.iter().map(|part| part.len()).sum());
        let refused = self.failure(Operation::DurableWrite, offset, length)(Errno::EOPNOTSUPP);
        Box::pin(std::future::ready(Err(refused)))
    }

    fn flush(&self) -> IoFuture<()> {
        if self.is_read_only() {
            return Box::pin(std::future::ready(Ok(())));
        }
        let (begun, failed) =
            (self.queue.begin(0, 0, Kind::Flush), self.failure(Operation::Flush, 0, 0));
        Box::pin(async move { outcome(begun).await.map(drop).map_err(failed) })
    }

    /// Does not trim: the protocol does not say what a trimmed range reads as.
    fn discard(&self, offset: u64, length: u64) -> IoFuture<()> {
        self.make_zeros(offset, length, false)
    }

    fn zero(&self, offset: u64, length: u64) -> IoFuture<()> {
        self.make_zeros(offset, length, true)
    }
}
