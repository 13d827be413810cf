//! Sealed segments and commits to the cache device, several at a time; and its flushes, shared by
//! all who wait for one.

use super::Inner;
use super::commits::{Job, Position};
use super::state::State;
use crate::device::{DeviceError, IoBuf, SharedBuf};
use crate::format::{
    BLOCK_BYTES, Commit, Geometry, Place, Reason, SegmentExtension, SegmentId, crc32c,
    encode_header,
};
use crate::planted::Bug;
use futures_util::StreamExt;
use futures_util::future::{Either, join_all, select};
use futures_util::stream::FuturesUnordered;
use nix::errno::Errno;
use std::sync::Arc;
use std::time::Duration;

/// How often a failed write of a segment is tried again before writes are refused. A failed flush
/// never is.
const RETRIES: u32 = 3;
/// The same where the device has no room, as a sparse file on a full filesystem: somebody may make
/// room. With the pauses that is some 20 seconds.
const ROOM_RETRIES: u32 = 10;
/// The pause before the first of them. It doubles each time, up to a limit.
const RETRY_PAUSE: Duration = Duration::from_millis(50);
const MAX_RETRY_PAUSE: Duration = Duration::from_secs(5);

/// Segments that may be on the device without being durable before it is flushed, whether anybody
/// waits or not: what a recovery has to read whole.
const MAX_UNDURABLE: u64 = 64;

/// What became of a job.
struct Appended {
    id: SegmentId,
    first: u8,
    crcs: Vec<u32>,
    /// Where it was one.
    commit: Option<Commit>,
}

impl Inner {
    /// The background task that writes sealed segments.
    pub(super) async fn appender(self: Arc<Self>) {
        let mut in_flight = FuturesUnordered::new();
        loop {
            let listener = self.events.appender.listen();
            while let Some(job) = self.next_to_append() {
                in_flight.push(self.append(job));
            }
            if in_flight.is_empty() {
                if self.lock().stopping {
                    break;
                }
                listener.await;
                continue;
            }
            match select(in_flight.next(), listener).await {
                Either::Left((Some(Err(error)), _)) => self.fail(error),
                Either::Left((Some(Ok(appended)), _)) => {
                    self.lock().appended(&appended);
                    self.events.flusher.notify(usize::MAX);
                    self.events.changed.notify(usize::MAX);
                    self.events.writeback.notify(usize::MAX);
                    self.events.staging.notify(usize::MAX);
                }
                Either::Left((None, _)) | Either::Right(_) => {}
            }
        }
        self.task_ended();
    }

    /// What may be written now: the rest of the oldest sealed segment, or a commit.
    fn next_to_append(&self) -> Option<Job> {
        let mut guard = self.lock();
        let state = &mut *guard;
        if state.failure.is_some() {
            return None;
        }
        let wanted = state.flush_wanted.len();
        let id = state.next_to_append();
        // A power cut may lose what is not durable, in any order. Recovery tells that from
        // corruption by its extent.
        let window = state.geometry.write_window();
        let beyond = |id: &SegmentId| id.since(state.durable) > window;
        let too_far = id.filter(beyond).filter(|_| !self.planted.has(Bug::LossWindowIgnored));
        if let Some(id) = too_far {
            state.want(Position::end_of(id.minus(window)));
        }
        if state.flush_wanted.len() > wanted {
            self.events.flusher.notify(usize::MAX);
        }
        let id = id.filter(|_| too_far.is_none())?;
        if state.is_pinned(state.geometry.slot_of(id)) && !self.planted.has(Bug::PinsIgnored) {
            // Somebody still reads what the slot held before. Who unpins it wakes the appender.
            return None;
        }
        state.start_job(id)
    }

    /// Writes a commit, or the rest of a segment.
    async fn append(&self, job: Job) -> Result<Appended, DeviceError> {
        let Job { id, reason, mut metablocks, first, data, before } = job;
        let (geometry, durable, written_back) = {
            let state = self.lock();
            (state.geometry, state.durable, state.written_back)
        };
        let extension = self.digest.map(|digest| SegmentExtension {
            digest,
            reason,
            durable: if self.planted.has(Bug::DurableClaimedEarly) { id.minus(1) } else { durable },
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
        let header = SharedBuf::from(header);
        let written = self
            .retrying(|| self.write_segment(geometry, place, header.clone(), data.clone()))
            .await;
        written.inspect_err(|_| tracing::error!("segment {id} cannot be written"))?;
        self.counters.appended(reason, length, data.len());
        #[allow(clippy::cast_possible_truncation)] // at most PLACES
        let commit = (reason == Reason::Open).then_some(Commit { length: length as u8, checksum });
        Ok(Appended { id, first, crcs, commit })
    }

    /// Writes the header of a segment, and data from some place on.
    async fn write_segment(
        &self,
        geometry: Geometry,
        first: Place,
        header: SharedBuf,
        data: SharedBuf,
    ) -> Result<(), DeviceError> {
        let offset = geometry.slot_offset(first.slot);
        if data.is_empty() {
            return self.cache.write(offset, header).await;
        }
        if first.index == 0 {
            return self.cache.write_parts(offset, vec![header, data]).await;
        }
        let writes = [
            self.cache.write(offset, header),
            self.cache.write(geometry.place_offset(first), data),
        ];
        // Both, even after a failure: who tries again must not be overtaken by a write that is
        // still out.
        join_all(writes).await.into_iter().collect()
    }

    /// The background task that flushes the cache device. All who wait share its flushes.
    pub(super) async fn flusher(self: Arc<Self>) {
        loop {
            let listener = self.events.flusher.listen();
            let (due, failed, stopping) = {
                let state = self.lock();
                let due = state
                    .flush_wanted
                    .first()
                    .is_some_and(|&wanted| wanted <= state.written_position());
                (due, state.failure.is_some(), state.stopping)
            };
            if failed || (stopping && !due) {
                break;
            }
            if !due {
                listener.await;
            } else {
                // A failure shows in the state.
                let _ = self.flush_cache_device().await;
            }
        }
        self.task_ended();
    }

    /// Flushes the cache device, and so makes durable what had been written when it began. A
    /// failure fails the cache, whoever asked: segments that it cost would count as durable after
    /// the next flush.
    pub(super) async fn flush_cache_device(&self) -> Result<(), DeviceError> {
        let _alone = self.flushing.lock().await;
        let mut written = {
            let state = self.lock();
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            state.written_position()
        };
        let mut flushed = self.cache.flush().await;
        if flushed.is_err() && self.planted.has(Bug::FailedFlushForgiven) {
            flushed = self.retrying(|| self.cache.flush()).await;
        }
        // No second try: what the device has lost by the failure, a later flush would not report.
        flushed.inspect_err(|error| self.fail(error.clone()))?;
        if self.planted.has(Bug::CommitCountedLate) {
            written = self.lock().written_position();
        }
        self.lock().made_durable(written);
        self.events.wake_all();
        Ok(())
    }

    /// Tries an operation of the cache device again when it fails.
    pub(super) async fn retrying<F>(
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

    /// A background task is over.
    pub(super) fn task_ended(&self) {
        self.lock().tasks -= 1;
        self.events.changed.notify(usize::MAX);
    }
}

/// How often it is tried again after an error.
fn retries(error: &DeviceError) -> u32 {
    match error.cause {
        Errno::ENOSPC | Errno::EDQUOT => ROOM_RETRIES,
        _ => RETRIES,
    }
}

impl State {
    fn appended(&mut self, appended: &Appended) {
        let Appended { id, first, crcs, commit } = appended;
        self.note_crcs(*id, *first, crcs);
        match commit {
            Some(commit) => self.commit_written(*id, *commit),
            None => self.segment_written(*id),
        }
        if self.written.since(self.durable) >= MAX_UNDURABLE {
            self.want(Position::end_of(self.written));
        }
    }
}

fn milliseconds(since: Duration) -> u64 {
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
