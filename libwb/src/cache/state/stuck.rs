//! Blocks that cannot be written back while others can: the backing device does not take them, or
//! the cache device does not give them back.
//!
//! Slots are used again in the order of the log. So the segment of a *stuck* block would in time
//! keep all writes waiting. Therefore the block is *moved* after some attempts: it is written to
//! the end of the log once more. Its old segment counts as written back as soon as the copy is
//! durable. There the block is tried again, at growing intervals.
//!
//! A block that cannot be read any more is *lost*. It is moved as well, with a CRC that its data
//! does not match: reads of it fail until it is written anew or discarded.
//!
//! Two kinds are not moved, and stop write-back at their segment:
//!
//! - In strict order, no block is moved: later writes must not be written back without earlier
//!   ones.
//! - Without the extension, lost blocks are not moved: no CRC could say that they are lost.

use super::index::Cached;
use super::segment_log::SegmentLog;
use crate::device::{DeviceError, IoBuf};
use crate::format::{BlockNo, PLACES, Place, SegmentId, to_u64};
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

/// A block is moved once it has failed this many times, over at least this long.
const ATTEMPTS: u32 = 4;
const PATIENCE: Duration = Duration::from_secs(5);
/// Blocks that are moved at a time: as many as one slot takes.
const MOST_MOVED: usize = 127;
/// When more fail in one batch, the device fails, and not some blocks of it.
pub(crate) const MOST_STUCK: usize = 512;
/// The same while nothing else of the batch can be written.
pub(crate) const MOST_ALONE: usize = 16;
/// The time after which a moved block is tried again; it doubles with each move.
const SHORTEST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// A block that a batch could not write back.
pub(crate) struct Failed {
    pub(crate) block: BlockNo,
    pub(crate) error: DeviceError,
    /// It cannot be read.
    pub(crate) lost: bool,
}

struct StuckBlock {
    /// Where its newest version lies.
    place: Place,
    error: DeviceError,
    lost: bool,
    /// When it first failed this way, and how often it has since.
    since: Duration,
    attempts: u32,
    moved: bool,
}

impl StuckBlock {
    /// It fails in another way than before, or is another version.
    fn begin_anew(&mut self, lost: bool, now: Duration) {
        (self.lost, self.since, self.attempts, self.moved) = (lost, now, 0, false);
    }

    fn may_be_moved(&self, now: Duration) -> bool {
        self.moved || self.attempts >= ATTEMPTS && now.saturating_sub(self.since) >= PATIENCE
    }
}

/// The stuck blocks that are known.
#[derive(Default)]
pub(crate) struct Stuck {
    blocks: BTreeMap<BlockNo, StuckBlock>,
    /// When those that were moved are tried again.
    retry_at: Duration,
    pause: Duration,
}

/// What is known of blocks that cannot be written back.
#[derive(Clone, Debug)]
pub struct StuckBlocks {
    /// How many the backing device does not take.
    pub refused: u64,
    /// How many the cache device does not give back.
    pub lost: u64,
    /// Where some of them lie on the volume, in bytes, in order.
    pub first: Vec<u64>,
    /// Why the first block that the backing device refuses cannot be written back. If it refuses
    /// none, why the first lost block cannot.
    pub error: DeviceError,
}

impl fmt::Display for StuckBlocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let StuckBlocks { refused, lost, error, .. } = self;
        let blocks = |n: u64| if n == 1 { "1 block".into() } else { format!("{n} blocks") };
        if *refused > 0 {
            write!(f, "{} cannot be written to the backing device: {error}", blocks(*refused))?;
        }
        if *refused > 0 && *lost > 0 {
            f.write_str("; and ")?;
        }
        if *lost > 0 {
            write!(
                f,
                "{} cannot be read from the cache device any more: reads of the volume fail there \
                 until it is written anew or discarded",
                blocks(*lost)
            )?;
        }
        Ok(())
    }
}

/// How many [`StuckBlocks::first`] names.
const NAMED: usize = 16;

/// How far a batch can go although some of its blocks are stuck.
pub(crate) struct Passage {
    /// The last segment that counts as written back once these blocks are moved.
    pub(crate) up_to: SegmentId,
    pub(crate) moves: Vec<(SegmentId, BlockNo)>,
    /// Why it goes no further, and whether it will in time.
    pub(crate) obstacle: Option<(DeviceError, bool)>,
}

/// A block that is to be moved, as it was read.
pub(crate) struct MovedBlock {
    pub(crate) block: BlockNo,
    pub(crate) from: Cached,
    pub(crate) data: IoBuf,
    /// Why it is lost, if it is.
    pub(crate) lost: Option<DeviceError>,
}

impl Stuck {
    /// Forgets blocks that are written back or discarded, and lost blocks that are written anew.
    /// A rewritten block that the backing device refused stays: the device will refuse the new
    /// version, too.
    pub(crate) fn prune(&mut self, log: &SegmentLog) {
        if self.blocks.is_empty() {
            return;
        }
        self.blocks.retain(|&block, stuck| {
            let newest = log.newest_version(block).filter(|newest| log.is_live(newest.place));
            let Some(Cached { place, .. }) = newest else { return false };
            let is_same = std::mem::replace(&mut stuck.place, place) == place;
            is_same || !stuck.lost
        });
        if self.blocks.is_empty() {
            self.pause = Duration::ZERO;
            self.retry_at = Duration::ZERO;
        }
    }

    /// What is known of them; `None` when there are none.
    pub(crate) fn report(&mut self, log: &SegmentLog) -> Option<StuckBlocks> {
        self.prune(log);
        let blocks = &self.blocks;
        let first = blocks.values().find(|stuck| !stuck.lost).or(blocks.values().next());
        let error = first?.error.clone();
        let lost = to_u64(blocks.values().filter(|stuck| stuck.lost).count());
        let first = blocks.keys().take(NAMED).map(|block| block.bytes()).collect();
        Some(StuckBlocks { refused: to_u64(blocks.len()) - lost, lost, first, error })
    }

    /// While it is too early to try moved blocks again: the segment before the oldest one that
    /// holds any.
    pub(crate) fn segment_before(&mut self, log: &SegmentLog, now: Duration) -> Option<SegmentId> {
        self.prune(log);
        if now >= self.retry_at {
            return None;
        }
        let moved = self.blocks.values().filter(|stuck| stuck.moved);
        moved.map(|stuck| log.id_of(stuck.place.slot)).min().map(|id| id.minus(1))
    }

    /// Whether a block is to be moved on without being tried. A drain has all tried that are not
    /// lost.
    pub(crate) fn is_passed_over(&self, block: BlockNo, is_draining: bool, now: Duration) -> bool {
        let is_early = now < self.retry_at && !is_draining;
        self.blocks.get(&block).is_some_and(|stuck| stuck.moved && (stuck.lost || is_early))
    }

    /// These blocks of a batch are on the backing device.
    pub(crate) fn written(&mut self, blocks: impl Iterator<Item = BlockNo>) {
        if !self.blocks.is_empty() {
            blocks.for_each(|block| drop(self.blocks.remove(&block)));
        }
    }

    /// Notes what has failed in a batch that ends with `last`, and says how far the batch can go
    /// all the same. `in_the_way` are blocks that have failed or were not tried, each with its
    /// oldest segment that is not written back. `movable` says whether lost blocks may be moved
    /// (`true`), and others (`false`).
    pub(crate) fn passage(
        &mut self,
        log: &SegmentLog,
        last: SegmentId,
        failed: Vec<Failed>,
        mut in_the_way: Vec<(SegmentId, BlockNo)>,
        movable: impl Fn(bool) -> bool,
        now: Duration,
    ) -> Passage {
        in_the_way.sort_unstable();
        for failed in failed {
            self.note_failed(log, failed, now);
        }
        let places = log.geometry().lap() * u64::from(PLACES);
        let too_many = to_u64(self.blocks.len()) > places / 4;
        let mut passage = Passage { up_to: last, moves: Vec::new(), obstacle: None };
        for (id, block) in in_the_way {
            let stuck = self.blocks.get(&block);
            // A log that is full of such blocks has no room for others.
            let is_movable = |stuck: &StuckBlock| movable(stuck.lost) && (stuck.moved || !too_many);
            let may_ever = stuck.is_none_or(is_movable);
            let may_now = may_ever && stuck.is_none_or(|stuck| stuck.may_be_moved(now));
            if !may_now || passage.moves.len() == MOST_MOVED {
                passage.up_to = id.minus(1);
                passage.obstacle = stuck.map(|stuck| (stuck.error.clone(), may_ever));
                break;
            }
            // If a block is no longer known as stuck, a newer version has replaced it.
            passage.moves.push((id, block));
        }
        passage
    }

    fn note_failed(&mut self, log: &SegmentLog, failed: Failed, now: Duration) {
        let Failed { block, error, lost } = failed;
        let Some(newest) = log.newest_version(block) else { return };
        let stuck = self.blocks.entry(block).or_insert_with(|| StuckBlock {
            place: newest.place,
            error: error.clone(),
            lost,
            since: now,
            attempts: 0,
            moved: false,
        });
        if stuck.lost != lost || lost && stuck.place != newest.place {
            stuck.begin_anew(lost, now);
        }
        (stuck.place, stuck.error) = (newest.place, error);
        stuck.attempts += 1;
    }

    /// A block was moved to a place.
    pub(crate) fn moved(&mut self, block: BlockNo, to: Place, lost: Option<&DeviceError>) {
        let Some(stuck) = self.blocks.get_mut(&block) else { return };
        (stuck.place, stuck.moved, stuck.lost) = (to, true, lost.is_some());
        if let Some(error) = lost {
            stuck.error = error.clone();
        }
    }

    /// Some blocks were moved. They are tried again after a pause, which grows each time.
    pub(crate) fn pause_retries(&mut self, now: Duration) {
        self.pause = (self.pause * 2).clamp(SHORTEST_PAUSE, LONGEST_PAUSE);
        self.retry_at = now + self.pause;
    }

    /// Why a block is stuck, if it is.
    pub(crate) fn error_of(&self, block: BlockNo) -> Option<DeviceError> {
        self.blocks.get(&block).map(|stuck| stuck.error.clone())
    }

    /// A block cannot be read where it is to be moved from. Returns whether it is known to be lost;
    /// else it is tried again for a while, as all are.
    pub(crate) fn cannot_be_read(
        &mut self,
        block: BlockNo,
        error: &DeviceError,
        now: Duration,
    ) -> bool {
        let Some(stuck) = self.blocks.get_mut(&block) else { return false };
        if !stuck.lost {
            stuck.begin_anew(true, now);
            stuck.error = error.clone();
            return false;
        }
        true
    }
}
