//! Blocks that cannot be written back while others can: the backing device does not take them, or
//! the cache device does not give them back.
//!
//! Slots are used again in the order of the log, so the segment of such a block would in time keep
//! all writes waiting. Therefore the block is *moved* after some attempts: it is written to the end
//! of the log once more, and its old segment counts as written back as soon as that is durable.
//! There it is tried again, at growing intervals.
//!
//! What cannot be read any more is *lost*. It is moved all the same, with a CRC that its data does
//! not match: reads of it fail until it is written anew or discarded.
//!
//! Two kinds are not moved, and stop write-back at their segment. In strict order, nothing is: what
//! is written back later must not be there without what came before. And without the extension,
//! what is lost is not: there is no CRC to say so.

use super::index::Cached;
use super::state::{Reserve, State, Wait};
use super::{CacheError, Inner};
use crate::device::{DeviceError, IoBuf};
use crate::format::{BLOCK_BYTES, BlockNo, PLACES, Place, SegmentId, crc32c, to_u64};
use crate::planted::Bug;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

/// How often, and for how long, a block is tried before it is moved.
const ATTEMPTS: u32 = 4;
const PATIENCE: Duration = Duration::from_secs(5);
/// Blocks that are moved at a time: as many as one slot takes.
const MOST_MOVED: usize = 127;
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
    /// It fails in another way than before, or is another version.
    fn begin_anew(&mut self, lost: bool, now: Duration) {
        (self.lost, self.since, self.attempts, self.moved) = (lost, now, 0, false);
    }

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
    /// Why the first of them cannot be written back: of those that the backing device does not
    /// take, if there are any.
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
pub(super) struct Passage {
    /// The last segment that counts as written back once these blocks are moved.
    pub(super) up_to: SegmentId,
    pub(super) moves: Vec<(SegmentId, BlockNo)>,
    /// Why it goes no further, and whether it will in time.
    pub(super) obstacle: Option<(DeviceError, bool)>,
}

impl State {
    /// Forgets those that are written back or discarded, and what was lost and is written anew.
    /// What the backing device does not take of one version of a block, it does not take of the
    /// next.
    pub(super) fn prune_stuck(&mut self) {
        if self.stuck.blocks.is_empty() {
            return;
        }
        let State { stuck, index, geometry, newest, written_back, .. } = self;
        stuck.blocks.retain(|&block, stuck| {
            let is_live = |it: &Cached| geometry.id_in_slot(it.place.slot, *newest) > *written_back;
            let Some(Cached { place, .. }) = index.get(block).filter(is_live) else { return false };
            let is_same = std::mem::replace(&mut stuck.place, place) == place;
            is_same || !stuck.lost
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
        let first = blocks.values().find(|stuck| !stuck.lost).or(blocks.values().next());
        let error = first?.error.clone();
        let lost = to_u64(blocks.values().filter(|stuck| stuck.lost).count());
        let first = blocks.keys().take(NAMED).map(|block| block.bytes()).collect();
        Some(StuckBlocks { refused: to_u64(blocks.len()) - lost, lost, first, error })
    }

    /// The segment before the oldest one that holds a moved block, while it is too early to try
    /// that again.
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
        let insists = || self.drain_to() > self.written_back;
        let early = || now < self.stuck.retry_at && !insists();
        self.stuck.blocks.get(&block).is_some_and(|stuck| stuck.moved && (stuck.lost || early()))
    }

    /// These blocks of a batch are on the backing device.
    pub(super) fn not_stuck(&mut self, blocks: impl Iterator<Item = BlockNo>) {
        if !self.stuck.blocks.is_empty() {
            blocks.for_each(|block| drop(self.stuck.blocks.remove(&block)));
        }
    }

    /// Notes what has failed in a batch that ends with `last`, and says how far it can go all the
    /// same. `passed_over` are blocks that were not tried, each with its segment. `movable` says
    /// whether what is lost, or is not, may be moved.
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
            if stuck.lost != lost || lost && stuck.place != newest.place {
                stuck.begin_anew(lost, now);
            }
            (stuck.place, stuck.error) = (newest.place, error);
            stuck.attempts += 1;
        }
        in_the_way.sort_unstable();
        let places = self.geometry.lap() * u64::from(PLACES);
        let too_many = to_u64(self.stuck.blocks.len()) > places / 4;
        let mut passage = Passage { up_to: last, moves: Vec::new(), obstacle: None };
        for (id, block) in in_the_way {
            let stuck = self.stuck.blocks.get(&block);
            // A log that is full of such blocks has no room for others.
            let may_ever =
                stuck.is_none_or(|stuck| movable(stuck.lost) && (stuck.moved || !too_many));
            let may_now = may_ever && stuck.is_none_or(|stuck| stuck.may_be_moved(now));
            if !may_now || passage.moves.len() == MOST_MOVED {
                passage.up_to = id.minus(1);
                passage.obstacle = stuck.map(|stuck| (stuck.error.clone(), may_ever));
                break;
            }
            // Of one that is not known any more, something newer stands.
            passage.moves.push((id, block));
        }
        passage
    }

    /// Of each of these blocks, the oldest segment up to `last` that holds anything of it. A newer
    /// version stands for an older one only if both are written back.
    fn oldest_versions(
        &self,
        last: SegmentId,
        failed: &[Failed],
    ) -> BTreeSet<(SegmentId, BlockNo)> {
        let mut wanted: BTreeSet<BlockNo> = failed.iter().map(|failed| failed.block).collect();
        let mut found = BTreeSet::new();
        let mut segments = (self.written_back.next().0..=last.0).map(SegmentId);
        while !wanted.is_empty()
            && let Some(id) = segments.next()
        {
            let slot = self.geometry.slot_of(id);
            let held = (0..PLACES).filter_map(|index| self.index.at(Place { slot, index }));
            found.extend(
                held.filter(|(block, _)| wanted.remove(block)).map(|(block, _)| (id, block)),
            );
        }
        found
    }

    /// Writes a block to the end of the log once more, if what was read of it is its newest version
    /// still. Returns whether.
    fn move_block(&mut self, copy: &Copy) -> Result<bool, Wait> {
        let Copy { block, from, data, lost } = copy;
        if self.index.get(*block) != Some(*from) {
            return Ok(false);
        }
        // Be it fenced or not: the data stays the same. A discard that waits for a slot would wait
        // for this.
        self.take_place_of(*block, from.dirty, Reserve::Use)?.copy_from_slice(data.block_at(0));
        let trusted = self.planted.has(Bug::LostTrusted);
        if let Some(open) = self.open.as_mut().filter(|_| lost.is_some() && !trusted) {
            open.lost.add(open.length - 1);
        }
        if let (Some(newest), Some(stuck)) =
            (self.index.get(*block), self.stuck.blocks.get_mut(block))
        {
            (stuck.place, stuck.moved, stuck.lost) = (newest.place, true, lost.is_some());
            if let Some(error) = lost {
                stuck.error = error.clone();
            }
        }
        Ok(true)
    }
}

impl Stuck {
    fn error_of(&self, block: BlockNo) -> Option<DeviceError> {
        self.blocks.get(&block).map(|stuck| stuck.error.clone())
    }

    /// A block cannot be read where it is to be moved from. Returns whether it is known to be lost;
    /// else it is tried again for a while, as all are.
    fn cannot_be_read(&mut self, block: BlockNo, error: &DeviceError, now: Duration) -> bool {
        let Some(stuck) = self.blocks.get_mut(&block) else { return false };
        if !stuck.lost {
            stuck.begin_anew(true, now);
            stuck.error = error.clone();
            return false;
        }
        true
    }
}

/// A block that is to be moved, as it was read.
struct Copy {
    block: BlockNo,
    from: Cached,
    data: IoBuf,
    /// Why it is lost, if it is.
    lost: Option<DeviceError>,
}

impl Inner {
    /// Moves blocks of segments up to `last`, in their order, as many as can be. Returns how many
    /// that are, and why not all. It is durable after a flush of the log.
    ///
    /// # Errors
    /// When the cache has failed, or is being closed.
    pub(super) async fn move_stuck(
        &self,
        moves: &[(SegmentId, BlockNo)],
        last: SegmentId,
    ) -> Result<(usize, Option<DeviceError>), CacheError> {
        let (mut copies, mut why) = (Vec::new(), None);
        for &(_, block) in moves {
            match self.copy_of(block, last).await {
                Ok(copy) => copies.push(copy),
                Err(error) => {
                    why = Some(error);
                    break;
                }
            }
        }
        let (mut done, mut moved) = (0, 0);
        while done < copies.len() {
            // As many as possible in one visit, or other writes could take what room there is in
            // the reserve.
            let stopped = self.noticing(self.lock(), |state| {
                // In the same visit: nothing may open a segment any more once the last one was
                // sealed.
                state.check_open()?;
                while let Some(copy) = copies.get(done) {
                    match copy.as_ref().map_or(Ok(false), |copy| state.move_block(copy)) {
                        Ok(is_moved) => (done, moved) = (done + 1, moved + usize::from(is_moved)),
                        Err(wait) => return Ok(Some(wait)),
                    }
                }
                Ok::<_, CacheError>(None)
            })?;
            match stopped {
                None => {}
                Some(Wait::Slot) => {
                    let block = copies[done].as_ref().map(|copy| copy.block);
                    let stuck = block.and_then(|block| self.lock().stuck.error_of(block));
                    why = why.or(stuck);
                    break;
                }
                Some(wait) => self.wait_for(wait).await?,
            }
        }
        self.counters.moved_blocks.add(to_u64(done));
        if moved > 0 {
            let mut state = self.lock();
            let pause = (state.stuck.pause * 2).clamp(SHORTEST_PAUSE, LONGEST_PAUSE);
            state.stuck.pause = pause;
            state.stuck.retry_at = self.runtime.now() + pause;
        }
        Ok((done, why))
    }

    /// Reads the newest version of a block. `None` when that lies beyond `last`, or nothing of it
    /// is to be written back: it stands for the others as soon as it is durable.
    ///
    /// # Errors
    /// When it cannot be read, and is not known to be lost.
    async fn copy_of(&self, block: BlockNo, last: SegmentId) -> Result<Option<Copy>, DeviceError> {
        let from = {
            let state = self.lock();
            let newest = state.index.get(block).filter(|newest| state.is_live(newest.place));
            newest.filter(|newest| state.id_of(newest.place.slot) <= last)
        };
        let Some(from) = from else { return Ok(None) };
        let error = match self.read_places(from.place, IoBuf::zeroed(BLOCK_BYTES)).await {
            Ok(data) => return Ok(Some(Copy { block, from, data, lost: None })),
            Err(error) => error,
        };
        let is_lost = self.lock().stuck.cannot_be_read(block, &error, self.runtime.now());
        if !is_lost || self.digest.is_none() {
            return Err(error);
        }
        let (data, is_whole) = self.what_is_left(from.place).await;
        let lost = (!is_whole).then(|| {
            tracing::warn!(
                "the block at byte {} of the volume is lost until it is written anew",
                block.bytes()
            );
            error
        });
        Ok(Some(Copy { block, from, data, lost }))
    }

    /// The data of a block that cannot be read right, as far as the device still gives it: somebody
    /// may make something of it. And whether it is right after all.
    async fn what_is_left(&self, place: Place) -> (IoBuf, bool) {
        let (offset, crc) = {
            let state = self.lock();
            (state.geometry.place_offset(place), state.index.crc(place))
        };
        match self.cache.read(offset, IoBuf::zeroed(BLOCK_BYTES)).await {
            Ok(data) => {
                let is_whole = crc == Some(crc32c(&data));
                (data, is_whole)
            }
            Err(_) => (IoBuf::zeroed(BLOCK_BYTES), false),
        }
    }
}
