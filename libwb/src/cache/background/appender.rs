//! Sealed segments and commits to the cache device, several at a time.

use crate::cache::engine::Engine;
use crate::cache::state::segment_log::{Appended, Job};
use crate::cache::state::shared::Waiter;
use crate::device::{DeviceError, IoBuf, SharedBuf};
use crate::format::{
    BLOCK_BYTES, Commit, Geometry, Place, Reason, SegmentExtension, crc32c, encode_header,
};
use crate::rules::Rule;
use futures_util::StreamExt;
use futures_util::future::{Either, join_all, select};
use futures_util::stream::FuturesUnordered;
use nix::errno::Errno;
use std::sync::Arc;
use std::time::Duration;

/// How often a failed write of a segment is tried again before writes are refused. A failed flush
/// or durable write is never tried again.
const RETRIES: u32 = 3;
/// The same where the device has no room, as a sparse file on a full filesystem: an administrator
/// may make room. With the pauses that is some 20 seconds.
const ROOM_RETRIES: u32 = 10;
/// The pause before the first of them. It doubles each time, up to a limit.
const RETRY_PAUSE: Duration = Duration::from_millis(50);
const MAX_RETRY_PAUSE: Duration = Duration::from_secs(5);

impl Engine {
    /// The background task that writes sealed segments and commits.
    pub(crate) async fn appender(self: Arc<Self>) {
        let mut in_flight = FuturesUnordered::new();
        loop {
            let listener = self.state.listen(Waiter::Appender);
            while let Some(job) = self.next_to_append() {
                in_flight.push(self.append(job));
            }
            if in_flight.is_empty() {
                if self.state.lock().lifecycle.is_stopping() {
                    break;
                }
                listener.await;
                continue;
            }
            match select(in_flight.next(), listener).await {
                Either::Left((Some(Err(error)), _)) => self.fail(error),
                Either::Left((Some(Ok(done)), _)) => self.state.lock().log.appended(&done),
                Either::Left((None, _)) | Either::Right(_) => {}
            }
        }
        self.task_ended();
    }

    fn next_to_append(&self) -> Option<Job> {
        let mut state = self.state.lock();
        if state.lifecycle.failure().is_some() {
            return None;
        }
        state.log.start_next_job()
    }

    /// Writes a commit, or the rest of a segment.
    async fn append(&self, job: Job) -> Result<Appended, DeviceError> {
        let Job { id, reason, mut metablocks, first, data, before, may_be_durable } = job;
        let (geometry, durable, written_back) = {
            let visit = self.state.lock();
            let log = &visit.log;
            (log.geometry(), log.durable(), log.written_back())
        };
        let claims_truly = self.rules.keep(Rule::OnlyDurableClaimed);
        let extension = self.digest.map(|digest| SegmentExtension {
            digest,
            reason,
            durable: if claims_truly { durable } else { id.minus(1) },
            written_back,
            time: milliseconds(self.runtime.wall_clock()),
            before,
        });
        let (length, added) = (metablocks.len(), &mut metablocks[usize::from(first)..]);
        if extension.is_some() {
            for (metablock, block) in added.iter_mut().zip(data.chunks(BLOCK_BYTES)) {
                let crc = crc32c(block);
                metablock.crc = Some(if metablock.lost { !crc } else { crc });
            }
        }
        let crcs: Vec<u32> = added.iter().filter_map(|metablock| metablock.crc).collect();
        let mut header = IoBuf::zeroed(BLOCK_BYTES);
        let checksum =
            encode_header(header.block_at_mut(0), id, &metablocks, &data, extension.as_ref());
        let place = Place { slot: geometry.slot_of(id), index: first };
        let added = data.len();
        let writes = writes(geometry, place, header.into(), data);
        let is_durable = may_be_durable && self.cache.prefers_durable_writes();
        let written = match is_durable {
            true => self.write_log_durably(&writes).await,
            false => self.retrying(|| self.write_log(&writes, false)).await,
        };
        written.inspect_err(|_| tracing::error!("segment {id} cannot be written"))?;
        self.counters.appended(reason, length, added);
        #[allow(clippy::cast_possible_truncation)] // at most PLACES
        let commit = (reason == Reason::Open).then_some(Commit { length: length as u8, checksum });
        Ok(Appended { id, first, crcs, commit, is_durable })
    }

    /// Makes these writes. Ends when all have, even after a failure: a write that is still out must
    /// not overtake a second try.
    async fn write_log(&self, writes: &[Write], durably: bool) -> Result<(), DeviceError> {
        let writing = writes.iter().cloned().map(|(offset, parts)| match durably {
            true => self.cache.write_durably(offset, parts),
            false => self.cache.write_parts(offset, parts),
        });
        join_all(writing).await.into_iter().collect()
    }

    /// Makes these writes durably. The device may flush for that, so this is like a flush: there is
    /// no other meanwhile, and no second try.
    async fn write_log_durably(&self, writes: &[Write]) -> Result<(), DeviceError> {
        let _alone = match self.rules.keep(Rule::DurableWriteAlone) {
            true => Some(self.flushing.lock().await),
            false => None,
        };
        let written = match self.rules.keep(Rule::FailedDurableWriteFinal) {
            true => self.write_log(writes, true).await,
            false => self.retrying(|| self.write_log(writes, true)).await,
        };
        // Before a flush may begin: it would not report what the device has lost by the failure.
        written.inspect_err(|error| self.fail(error.clone()))
    }

    /// Tries an operation of the cache device again when it fails.
    pub(crate) async fn retrying<F>(
        &self,
        mut operation: impl FnMut() -> F,
    ) -> Result<(), DeviceError>
    where
        F: Future<Output = Result<(), DeviceError>>,
    {
        let (mut tries, mut pause) = (0, RETRY_PAUSE);
        loop {
            match operation().await {
                Err(error) if tries < retries(&error) => tracing::warn!("{error}; trying again"),
                done => return done,
            }
            self.runtime.sleep(pause).await;
            tries += 1;
            pause = (pause * 2).min(MAX_RETRY_PAUSE);
        }
    }
}

/// A write to the cache device: its offset, and its data in pieces.
type Write = (u64, Vec<SharedBuf>);

/// The writes that make a commit or a segment: its header, and data from some place on.
fn writes(geometry: Geometry, first: Place, header: SharedBuf, data: SharedBuf) -> Vec<Write> {
    let offset = geometry.slot_offset(first.slot);
    if data.is_empty() {
        return vec![(offset, vec![header])];
    }
    if first.index == 0 {
        return vec![(offset, vec![header, data])];
    }
    vec![(offset, vec![header]), (geometry.place_offset(first), vec![data])]
}

/// How often it is tried again after an error.
fn retries(error: &DeviceError) -> u32 {
    match error.cause {
        Errno::ENOSPC | Errno::EDQUOT => ROOM_RETRIES,
        _ => RETRIES,
    }
}

fn milliseconds(since: Duration) -> u64 {
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
