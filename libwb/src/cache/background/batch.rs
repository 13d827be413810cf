//! One batch of write-back, to the backing device: read, merged, written, flushed.

use super::runs::{DeviceRead, Run, device_reads, pieces, runs};
use super::sorted::{CHUNK, merged, sort_chunks};
use crate::cache::engine::Engine;
use crate::cache::state::segment_log::Item;
use crate::cache::state::shared::VISIT;
use crate::cache::state::stuck::{Failed, MOST_ALONE, MOST_STUCK};
use crate::device::{BlockDevice, DeviceError, IoBuf};
use crate::format::{BLOCK_BYTES, SECTOR_BYTES, SECTORS_PER_BLOCK, to_u64, to_usize};
use crate::rules::Rule;
use futures_lite::future::{poll_once, yield_now};
use futures_util::StreamExt;
use futures_util::stream::{self, FuturesUnordered};
use std::sync::atomic::Ordering;

/// The longest single write to the backing device, in sectors.
const MAX_RUN_SECTORS: u64 = 2048;
/// The queue depth of write-back on the backing device: enough to fill a disk's own queue, so that
/// the disk can reorder the writes. Each write buffers its data twice, as read and as written, at
/// most 64 MiB in all. In addition, each block of a batch takes an [`Item`] of 24 bytes. For 4096
/// segments, this is 12 MB.
const DEPTH: usize = 32;
/// Reads of the cache device at a time for each of them: more would keep those of requests and
/// commits waiting.
const READS: usize = 8;

/// Why a batch was not written back, or only in part.
pub(crate) enum BatchStop {
    /// A device failed, or some blocks cannot be written back and must not be moved.
    Device(DeviceError),
    /// Some blocks cannot be written back, and will be moved.
    Stuck(DeviceError),
    /// The cache is being closed.
    Closing,
}

impl From<DeviceError> for BatchStop {
    fn from(error: DeviceError) -> BatchStop {
        BatchStop::Device(error)
    }
}

/// What became of a batch.
#[derive(Default)]
pub(crate) struct BatchOutcome {
    /// The blocks that could not be written, sorted.
    pub(crate) failed: Vec<Failed>,
    /// Whether any could.
    pub(super) any: bool,
}

/// Why a write of a batch failed.
enum Fault {
    Closing,
    Device {
        error: DeviceError,
        /// What is to be written cannot be read.
        lost: bool,
    },
}

impl Engine {
    /// Writes sectors from the cache device to the backing device, the newest version of each, and
    /// flushes it. Of versions of the same block, the older one comes first.
    ///
    /// # Errors
    /// When the device fails rather than some of its blocks, or the flush fails.
    pub(crate) async fn write_items(
        &self,
        mut items: Vec<Item>,
    ) -> Result<BatchOutcome, BatchStop> {
        if items.is_empty() {
            return Ok(BatchOutcome::default());
        }
        let before = self.backing_flushes.failures();
        sort_chunks(&mut items).await;
        let unit = u64::from(self.writeback_device.block_size());
        let mut runs = runs(pieces(merged(&items, self.rules)), unit, MAX_RUN_SECTORS);
        let (written, suspects) = self.write_runs(&mut runs).await?;
        if let Some((_, error)) = suspects.first().filter(|_| runs.next().is_some()) {
            return Err(BatchStop::Device(error.clone()));
        }
        let failed = self.write_one_by_one(suspects, unit, written).await?;
        let any = self.note_written(&items, &failed).await;
        if self.rules.keep(Rule::BackingFlushedBeforeRecord) {
            self.backing_flushes.flush(&self.writeback_device, before).await?;
        }
        Ok(BatchOutcome { failed, any })
    }

    /// Notes which blocks are on the backing device: all but those that failed. Returns whether
    /// there are any.
    async fn note_written(&self, items: &[Item], failed: &[Failed]) -> bool {
        let is_written =
            |item: &&Item| failed.binary_search_by_key(&item.block, |it| it.block).is_err();
        let mut any = false;
        for items in items.chunks(CHUNK) {
            for items in items.chunks(VISIT.into()) {
                let mut blocks = items.iter().filter(is_written).map(|item| item.block).peekable();
                any |= blocks.peek().is_some();
                let mut visit = self.state.lock();
                visit.stuck.written(blocks);
                visit.give_way();
            }
            self.let_others().await;
        }
        any
    }

    /// Writes runs, several at a time. Returns how many succeeded, and those that failed. Stops
    /// early if most writes fail, since then the device itself has probably failed.
    async fn write_runs(
        &self,
        runs: &mut impl Iterator<Item = Run>,
    ) -> Result<(usize, Vec<(Run, DeviceError)>), BatchStop> {
        let mut writes = FuturesUnordered::new();
        let (mut written, mut failed, mut closing) = (0, Vec::new(), false);
        loop {
            let may_start = !closing
                && (failed.len() < DEPTH || failed.len() <= written)
                && writes.len() < DEPTH;
            let done = if may_start && let Some(run) = runs.next() {
                writes
                    .push(async move { self.write_run(&run).await.map_err(|fault| (run, fault)) });
                // One at a time, so that other tasks come in between.
                yield_now().await;
                poll_once(writes.next()).await
            } else {
                // Even after a failure, what was started is waited for: it must not arrive after a
                // later write.
                Some(writes.next().await)
            };
            match done {
                None => {}
                Some(Some(Ok(()))) => written += 1,
                Some(Some(Err((_, Fault::Closing)))) => closing = true,
                Some(Some(Err((run, Fault::Device { error, .. })))) => failed.push((run, error)),
                Some(None) if closing => return Err(BatchStop::Closing),
                Some(None) => return Ok((written, failed)),
            }
        }
    }

    /// Tries each block of some failed writes by itself, after `written` others succeeded. Returns
    /// those that fail again, sorted.
    async fn write_one_by_one(
        &self,
        suspects: Vec<(Run, DeviceError)>,
        unit: u64,
        mut written: usize,
    ) -> Result<Vec<Failed>, BatchStop> {
        let mut failed: Vec<Failed> = Vec::new();
        for (run, _) in suspects {
            for single in runs(run.pieces.into_iter(), unit, 1) {
                let Err(fault) = self.write_run(&single).await else {
                    written += 1;
                    continue;
                };
                let Fault::Device { error, lost } = fault else { return Err(BatchStop::Closing) };
                if failed.len() >= if written > 0 { MOST_STUCK } else { MOST_ALONE } {
                    return Err(BatchStop::Device(error));
                }
                for pieces in single.pieces.chunk_by(|a, b| a.sector.block() == b.sector.block()) {
                    let (block, error) = (pieces[0].sector.block(), error.clone());
                    failed.push(Failed { block, error, lost });
                }
            }
        }
        failed.sort_by_key(|failed| failed.block);
        // Parts of one block may have failed one by one.
        failed.dedup_by(|next, first| {
            let is_same = next.block == first.block;
            first.lost |= is_same && next.lost;
            is_same
        });
        Ok(failed)
    }

    async fn write_run(&self, run: &Run) -> Result<(), Fault> {
        if self.state.lock().lifecycle.is_stopping() {
            return Err(Fault::Closing);
        }
        if run.pieces.iter().all(|piece| piece.discarded) && self.give_up(run).await {
            let blocks = (run.end.0 - run.start.0) / SECTORS_PER_BLOCK;
            self.state.lock().writeback.gave_up(blocks, self.runtime.now());
            return Ok(());
        }
        let refused = |error| Fault::Device { error, lost: false };
        let offset = run.start.bytes();
        let length = to_usize((run.end.0 - run.start.0) * to_u64(SECTOR_BYTES));
        let mut buf = IoBuf::zeroed(length);
        if run.has_gaps {
            buf = self.writeback_device.read(offset, buf).await.map_err(refused)?;
        }
        self.read_run(run, &mut buf).await.map_err(|error| Fault::Device { error, lost: true })?;
        self.writeback_device.write(offset, buf.into()).await.map_err(refused)?;
        self.counters.written_back_bytes.add(to_u64(length));
        let (blocks, now) = (to_u64(length.div_ceil(BLOCK_BYTES)), self.runtime.now());
        self.state.lock().writeback.wrote(to_u64(length), blocks, now);
        Ok(())
    }

    /// Reads what a run writes from the cache device into its buffer.
    async fn read_run(&self, run: &Run, buf: &mut [u8]) -> Result<(), DeviceError> {
        let read = |read: DeviceRead| async move {
            let data = IoBuf::zeroed(BLOCK_BYTES * read.blocks);
            match self.read_places(read.place, data).await {
                Ok(data) => Ok((read, data)),
                Err(error) => {
                    self.look_for_newer(&read);
                    Err(error)
                }
            }
        };
        let reads = device_reads(&run.pieces).into_iter().map(read);
        let mut reads = stream::iter(reads).buffer_unordered(READS);
        while let Some(done) = reads.next().await {
            let (read, data) = done?;
            let to = to_usize((read.sector.0 - run.start.0) * to_u64(SECTOR_BYTES));
            let from = read.first * SECTOR_BYTES;
            let bytes = read.sectors * SECTOR_BYTES;
            buf[to..to + bytes].copy_from_slice(&data[from..from + bytes]);
        }
        Ok(())
    }

    /// Notes the newest segment that holds a newer version of a block that cannot be read.
    fn look_for_newer(&self, unreadable: &DeviceRead) {
        let mut visit = self.state.lock();
        let state = &mut *visit;
        let newest = state.log.newest_replacement(unreadable.place, unreadable.blocks);
        if let Some(id) = newest {
            state.writeback.replaced_by(id);
        }
    }

    /// Discards what a run of zeros covers, so that it takes no space. Returns whether that was
    /// done; if not, the zeros are written.
    async fn give_up(&self, run: &Run) -> bool {
        let length = (run.end.0 - run.start.0) * to_u64(SECTOR_BYTES);
        let can = !run.has_gaps && !self.cannot_discard.load(Ordering::Relaxed);
        can && self.writeback_device.discard(run.start.bytes(), length).await.is_ok()
    }
}
