//! Sealed segments to the cache device, several at a time; and its flushes, shared by all who wait for one.

use super::Inner;
use crate::device::{DeviceError, IoBuf, SharedBuf};
use crate::format::{BLOCK_BYTES, Metablock, Reason, SegmentExtension, SegmentId, crc32c, encode_header};
use crate::planted::Bug;
use futures_util::StreamExt;
use futures_util::future::{Either, select};
use futures_util::stream::FuturesUnordered;
use std::sync::Arc;
use std::time::Duration;

/// How often a failed write of a segment is tried again before writes are refused. A failed flush never is.
const RETRIES: u32 = 3;
/// The pause before the first of them. It doubles each time.
const RETRY_PAUSE: Duration = Duration::from_millis(50);

/// A sealed segment to be written.
struct Job {
    id: SegmentId,
    reason: Reason,
    metablocks: Vec<Metablock>,
    buf: Arc<IoBuf>,
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
                Either::Left((Some((id, Err(error))), _)) => {
                    tracing::error!("segment {id} cannot be written");
                    self.fail(error);
                }
                Either::Left((Some((id, Ok(crcs))), _)) => {
                    self.lock().segment_written(id, &crcs);
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

    /// The oldest sealed segment that may be written now.
    fn next_to_append(&self) -> Option<Job> {
        let mut guard = self.lock();
        let state = &mut *guard;
        if state.failure.is_some() {
            return None;
        }
        let nth = state.sealed.iter().position(|segment| !segment.started)?;
        let id = state.sealed[nth].id;
        // A power cut may lose what is not durable, in any order. Recovery tells that from corruption by its extent.
        let window = state.geometry.loss_window();
        if id.since(state.durable) > window && !self.planted.has(Bug::LossWindowIgnored) {
            state.flush_wanted.insert(id.minus(window));
            drop(guard);
            self.events.flusher.notify(usize::MAX);
            return None;
        }
        if state.is_pinned(state.geometry.slot_of(id)) && !self.planted.has(Bug::PinsIgnored) {
            // Somebody still reads what the slot held before. Who unpins it wakes the appender.
            return None;
        }
        let segment = &mut state.sealed[nth];
        segment.started = true;
        Some(Job {
            id,
            reason: segment.reason,
            metablocks: std::mem::take(&mut segment.metablocks),
            buf: segment.buf.clone(),
        })
    }

    /// Writes a segment. Returns the CRCs of its blocks, where the cache keeps them.
    async fn append(&self, job: Job) -> (SegmentId, Result<Vec<u32>, DeviceError>) {
        let Job { id, reason, mut metablocks, buf } = job;
        let data = BLOCK_BYTES..BLOCK_BYTES * (1 + metablocks.len());
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
        });
        if extension.is_some() {
            for (metablock, block) in metablocks.iter_mut().zip(buf[data.clone()].chunks(BLOCK_BYTES)) {
                metablock.crc = Some(crc32c(block));
            }
        }
        let mut header = IoBuf::zeroed(BLOCK_BYTES);
        encode_header(header.block_at_mut(0), id, &metablocks, &buf[data.clone()], extension.as_ref());
        let offset = geometry.slot_offset(geometry.slot_of(id));
        let parts = vec![header.into(), SharedBuf::part_of(buf, data)];
        let written = self.retrying(|| self.cache.write_parts(offset, parts.clone())).await;
        let written = written.inspect(|()| self.counters.appended(metablocks.len()));
        (id, written.map(|()| metablocks.iter().filter_map(|metablock| metablock.crc).collect()))
    }

    /// The background task that flushes the cache device. All who wait share its flushes.
    pub(super) async fn flusher(self: Arc<Self>) {
        loop {
            let listener = self.events.flusher.listen();
            let (due, failed, stopping) = {
                let state = self.lock();
                let due = state.flush_wanted.first().is_some_and(|&wanted| wanted <= state.written);
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

    /// Flushes the cache device, and so makes every written segment durable. A failure fails the cache, whoever
    /// asked: segments that it cost would count as durable after the next flush.
    pub(super) async fn flush_cache_device(&self) -> Result<(), DeviceError> {
        let _alone = self.flushing.lock().await;
        let written = {
            let state = self.lock();
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            state.written
        };
        let mut flushed = self.cache.flush().await;
        if flushed.is_err() && self.planted.has(Bug::FailedFlushForgiven) {
            flushed = self.retrying(|| self.cache.flush()).await;
        }
        // No second try: what the device has lost by the failure, a later flush would not report.
        flushed.inspect_err(|error| self.fail(error.clone()))?;
        self.lock().made_durable(written);
        self.events.wake_all();
        Ok(())
    }

    /// Tries an operation of the cache device again when it fails.
    pub(super) async fn retrying<F>(&self, mut operation: impl FnMut() -> F) -> Result<(), DeviceError>
    where
        F: Future<Output = Result<(), DeviceError>>,
    {
        let mut pause = RETRY_PAUSE;
        for _ in 0..RETRIES {
            match operation().await {
                Ok(()) => return Ok(()),
                Err(error) => tracing::warn!("{error}; trying again"),
            }
            self.runtime.sleep(pause).await;
            pause *= 2;
        }
        operation().await
    }

    /// A background task is over.
    pub(super) fn task_ended(&self) {
        self.lock().tasks -= 1;
        self.events.changed.notify(usize::MAX);
    }
}

fn milliseconds(since: Duration) -> u64 {
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
