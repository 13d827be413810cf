//! Blocks that cannot be written back while others can: the backing device does not take them, or the cache device does
//! not give them back.
//!
//! Slots are used again in the order of the log, so the segment of such a block would in time keep all writes waiting.
//! Therefore the block is *moved* after some attempts: it is written to the end of the log once more, and its old segment
//! counts as written back as soon as that is durable. There it is tried again, at growing intervals.
//!
//! What cannot be read any more is *lost*. It is moved all the same, with a CRC that its data does not match: reads of it
//! fail until it is written anew or discarded.
//!
//! Two kinds are not moved, and stop write-back at their segment. In strict order, nothing is: what is written back later
//! must not be there without what came before. And without the extension, what is lost is not: there is no CRC to say so.

use super::state::{Reserve, State, Wait};
use super::{CacheError, Inner};
use crate::device::{DeviceError, IoBuf};
use crate::format::{BLOCK_BYTES, BlockNo, DirtyBits, PLACES, Place, SegmentId, to_u64};
use crate::planted::Bug;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// How often, and for how long, a block is tried before it is moved.
const ATTEMPTS: u32 = 4;
const PATIENCE: Duration = Duration::from_secs(5);
/// Blocks that are moved at a time: as many as one slot takes.
pub(super) const MOST_MOVED: usize = 127;
/// Where so many fail in one batch, the device fails, and not some blocks of it.
pub(super) const MOST_STUCK: usize = 512;
/// The same while nothing else of the batch can be written.
pub(super) const MOST_ALONE: usize = 16;
/// The time after which a moved block is tried again; it doubles with each move.
const SHORTEST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// A block that a batch could not write back.
pub(super) struct Failed {
    pub(super) block: BlockNo,
    pub(super) error: DeviceError,
    /// It cannot be read.
    pub(super) lost: bool,
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
    fn may_be_moved(&self, now: Duration) -> bool {
        self.moved || self.attempts >= ATTEMPTS && now.saturating_sub(self.since) >= PATIENCE
    }
}

/// All that are known.
#[derive(Default)]
pub(super) struct Stuck {
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
    /// Why the first of them cannot be written back.
    pub error: DeviceError,
}

/// How many [`StuckBlocks::first`] names.
const NAMED: usize = 16;

/// How far a batch can go although some of its blocks are stuck.
pub(super) struct Passage {
    /// The last segment that counts as written back once these blocks are moved.
    pub(super) up_to: SegmentId,
    pub(super) moves: Vec<BlockNo>,
    /// Why it goes no further, and whether it will in time.
    pub(super) obstacle: Option<(DeviceError, bool)>,
}

impl State {
    /// Forgets those that were written anew, discarded, or are written back.
    pub(super) fn prune_stuck(&mut self) {
        if self.stuck.blocks.is_empty() {
            return;
        }
        let State { stuck, index, geometry, newest, written_back, .. } = self;
        stuck.blocks.retain(|&block, stuck| {
            let is_newest = index.get(block).is_some_and(|cached| cached.place == stuck.place);
            is_newest && geometry.id_in_slot(stuck.place.slot, *newest) > *written_back
        });
        if stuck.blocks.is_empty() {
            stuck.pause = Duration::ZERO;
            stuck.retry_at = Duration::ZERO;
        }
    }

    /// What is known of them; `None` when there are none.
    pub(super) fn stuck_blocks(&mut self) -> Option<StuckBlocks> {
        self.prune_stuck();
        let blocks = &self.stuck.blocks;
        let error = blocks.values().next()?.error.clone();
        let lost = to_u64(blocks.values().filter(|stuck| stuck.lost).count());
        let first = blocks.keys().take(NAMED).map(|block| block.bytes()).collect();
        Some(StuckBlocks { refused: to_u64(blocks.len()) - lost, lost, first, error })
    }

    /// The segment before the oldest one that holds a moved block, while it is too early to try that again.
    pub(super) fn before_stuck(&mut self, now: Duration) -> Option<SegmentId> {
        self.prune_stuck();
        if now >= self.stuck.retry_at {
            return None;
        }
        let moved = self.stuck.blocks.values().filter(|stuck| stuck.moved);
        moved.map(|stuck| self.id_of(stuck.place.slot)).min().map(|id| id.minus(1))
    }

    /// Whether a block is to be moved on without being tried.
    pub(super) fn is_passed_over(&self, block: BlockNo, now: Duration) -> bool {
        let insists = self.drain_to() > self.written_back;
        let early = now < self.stuck.retry_at && !insists;
        self.stuck.blocks.get(&block).is_some_and(|stuck| stuck.moved && (stuck.lost || early))
    }

    /// Blocks of a batch are on the backing device.
    pub(super) fn not_stuck(&mut self, block: BlockNo) {
        self.stuck.blocks.remove(&block);
    }

    /// Notes what has failed in a batch that ends with `last`, and says how far it can go all the same. `passed_over` are
    /// blocks that were not tried, each with its segment. `movable` says whether what is lost, or is not, may
    /// be moved.
    pub(super) fn passage(
        &mut self,
        last: SegmentId,
        failed: Vec<Failed>,
        passed_over: Vec<(SegmentId, BlockNo)>,
        movable: impl Fn(bool) -> bool,
        now: Duration,
    ) -> Passage {
        let mut in_the_way = passed_over;
        in_the_way.extend(self.oldest_versions(last, &failed));
        for Failed { block, error, lost } in failed {
            let Some(newest) = self.index.get(block) else { continue };
            let stuck = self.stuck.blocks.entry(block).or_insert_with(|| StuckBlock {
                place: newest.place,
                error: error.clone(),
                lost,
                since: now,
                attempts: 0,
                moved: false,
            });
            if stuck.lost != lost {
                (stuck.since, stuck.attempts, stuck.lost) = (now, 0, lost);
            }
            (stuck.place, stuck.error) = (newest.place, error);
            stuck.attempts += 1;
        }
        in_the_way.sort_unstable();
        let mut passage = Passage { up_to: last, moves: Vec::new(), obstacle: None };
        for (id, block) in in_the_way {
            let Some(stuck) = self.stuck.blocks.get(&block) else { continue };
            let may_ever = movable(stuck.lost);
            if !may_ever || !stuck.may_be_moved(now) || passage.moves.len() == MOST_MOVED {
                passage.up_to = id.minus(1);
                passage.obstacle = Some((stuck.error.clone(), may_ever));
                break;
            }
            passage.moves.push(block);
        }
        passage
    }

    /// Of each of these blocks, the oldest segment up to `last` that holds anything of it. A newer version stands for an older
    /// one only if both are written back.
    fn oldest_versions(&self, last: SegmentId, failed: &[Failed]) -> BTreeSet<(SegmentId, BlockNo)> {
        let mut wanted: BTreeSet<BlockNo> = failed.iter().map(|failed| failed.block).collect();
        let mut found = BTreeSet::new();
        let mut segments = (self.written_back.next().0..=last.0).map(SegmentId);
        while !wanted.is_empty()
            && let Some(id) = segments.next()
        {
            let slot = self.geometry.slot_of(id);
            let held = (0..PLACES).filter_map(|index| self.index.at(Place { slot, index }));
            found.extend(held.filter(|(block, _)| wanted.remove(block)).map(|(block, _)| (id, block)));
        }
        found
    }

    /// Writes a block to the end of the log once more, if `place` holds its newest version still.
    fn move_block(
        &mut self,
        block: BlockNo,
        place: Place,
        dirty: DirtyBits,
        data: &[u8; BLOCK_BYTES],
        lost: Option<&DeviceError>,
    ) -> Result<(), Wait> {
        if self.index.get(block).is_none_or(|newest| newest.place != place) {
            return Ok(());
        }
        if self.is_fenced(block) {
            return Err(Wait::Fence(block));
        }
        self.take_place_of(block, dirty, Reserve::Use)?.copy_from_slice(data);
        let trusted = self.planted.has(Bug::LostTrusted);
        if let Some(open) = self.open.as_mut().filter(|_| lost.is_some() && !trusted) {
            open.lost.add(open.length - 1);
        }
        if let (Some(newest), Some(stuck)) = (self.index.get(block), self.stuck.blocks.get_mut(&block)) {
            stuck.place = newest.place;
            stuck.moved = true;
            if let Some(error) = lost {
                (stuck.lost, stuck.error) = (true, error.clone());
            }
        }
        Ok(())
    }
}

impl Inner {
    /// Moves blocks of segments up to `last`. It is durable afterwards.
    ///
    /// # Errors
    /// When there is no room for them, or the cache fails or is being closed.
    pub(super) async fn move_stuck(&self, blocks: Vec<BlockNo>, last: SegmentId) -> Result<(), CacheError> {
        if blocks.is_empty() {
            return Ok(());
        }
        for block in blocks {
            self.move_on(block, last).await?;
            self.counters.moved_blocks.add(1);
        }
        {
            let mut state = self.lock();
            let pause = (state.stuck.pause * 2).clamp(SHORTEST_PAUSE, LONGEST_PAUSE);
            state.stuck.pause = pause;
            state.stuck.retry_at = self.runtime.now() + pause;
        }
        if self.planted.has(Bug::MovedNotDurable) {
            return Ok(());
        }
        self.flush_log().await
    }

    async fn move_on(&self, block: BlockNo, last: SegmentId) -> Result<(), CacheError> {
        loop {
            let newest = {
                let state = self.lock();
                state.check_open()?;
                let newest = state.index.get(block).filter(|newest| state.is_live(newest.place));
                // A newer version stands for it, as soon as that is durable.
                newest.filter(|newest| state.id_of(newest.place.slot) <= last)
            };
            let Some(newest) = newest else { return Ok(()) };
            let read = self.read_places(newest.place, IoBuf::zeroed(BLOCK_BYTES)).await;
            let (data, error) = match read {
                Ok(data) => (data, None),
                Err(error) if self.digest.is_none() => return Err(error.into()),
                Err(error) => (self.what_is_left(newest.place).await, Some(error)),
            };
            let moved = self.noticing(self.lock(), |state| {
                state.move_block(block, newest.place, newest.dirty, data.block_at(0), error.as_ref())
            });
            match moved {
                Ok(()) => {
                    let what =
                        if error.is_some() { "lost until it is written anew" } else { "kept in the cache" };
                    tracing::warn!("the block at byte {} of the volume is {what}", block.bytes());
                }
                Err(Wait::Slot) => {
                    let stuck = self.lock().stuck.blocks.get(&block).map(|stuck| stuck.error.clone());
                    return Err(stuck.map_or(CacheError::Closed, CacheError::Full));
                }
                Err(wait) => self.wait_for(wait).await?,
            }
        }
    }

    /// The data of a block that is lost, as far as the device still gives it: somebody may make something of it.
    async fn what_is_left(&self, place: Place) -> IoBuf {
        let offset = self.lock().geometry.place_offset(place);
        let read = self.cache.read(offset, IoBuf::zeroed(BLOCK_BYTES)).await;
        read.unwrap_or_else(|_| IoBuf::zeroed(BLOCK_BYTES))
    }
}
