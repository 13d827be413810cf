//! A bit of a cache device flips: what becomes of the volume?

use crate::recovered_view::{Reading, Recover, RecoveredView};
use futures_lite::future::block_on;
use libwb::device::{Device, IoBuf, MemDevice};
use libwb::format::{
    BLOCK_BYTES, BlockNo, DirtyBits, FirstSector, Geometry, Place, RECORD_BLOCK_OFFSET,
    SECTOR_BYTES, SEGMENT_BYTES, SUPERBLOCK_REGION_BYTES, SegmentId, Slot, SuperblockExtension,
    decode_record, to_u64, to_usize,
};
use libwb::log::Use;
use libwb::log::superblock::{Superblock, read_superblock};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// The effect of a flipped bit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FlipEffect {
    /// The volume is what it was.
    Whole,
    /// Recovery refuses the cache, or reads of some of its blocks fail.
    Refused,
    /// Blocks silently fell back to older data. The device does not prove that the lost data was
    /// durable.
    UnprovenLost,
    /// Anything else.
    Wrong(String),
}

/// An entry of a live segment.
struct Entry {
    place: Place,
    block: BlockNo,
    dirty: DirtyBits,
}

/// A cache device with the extension, as it was when its bits were right.
pub struct Subject {
    image: Vec<u8>,
    backing: Vec<u8>,
    device: Device,
    superblock: Superblock,
    view: RecoveredView,
    recover: Recover,
    /// All entries of live segments, in the order of the log.
    entries: Vec<Entry>,
    /// How many of them the device proves durable.
    proven: usize,
    /// The blocks that the entries belong to.
    volume: BTreeMap<BlockNo, Vec<u8>>,
}

impl Subject {
    /// Takes a cache device that recovery accepts, and its backing device.
    ///
    /// # Errors
    /// When recovery refuses it.
    pub fn new(image: Vec<u8>, mut backing: Vec<u8>, recover: Recover) -> Result<Subject, String> {
        backing.resize(backing.len().next_multiple_of(BLOCK_BYTES), 0);
        let device: Device = Arc::new(MemDevice::with_content("cache", image.clone()));
        let superblock =
            block_on(read_superblock(&device, Use::Write)).map_err(|e| e.to_string())?;
        let view = RecoveredView::with(&device, &superblock, Reading::Trusting, recover)?;
        if view.blocks.keys().any(|block| block.bytes() >= to_u64(backing.len())) {
            return Err("data beyond the end of the backing device".into());
        }
        let read = |&block| (block, view.read(&device, &backing, block));
        let volume = view.blocks.keys().map(read);
        let volume = volume.filter_map(|(block, data)| Some((block, data?))).collect();
        let mut subject = Subject {
            image,
            backing,
            device,
            superblock,
            view,
            recover,
            entries: Vec::new(),
            proven: 0,
            volume,
        };
        subject.read_log();
        Ok(subject)
    }

    /// What recovery makes of the device with all its bits right.
    pub fn view(&self) -> &RecoveredView {
        &self.view
    }

    /// How the device is laid out.
    pub fn geometry(&self) -> Geometry {
        self.superblock.geometry
    }

    /// Whether the superblock record proves itself.
    pub fn has_proved_record(&self) -> bool {
        let block = self.image[to_usize(RECORD_BLOCK_OFFSET)..].first_chunk();
        block
            .and_then(|block| decode_record(block).ok())
            .is_some_and(|record| record.digest.is_some())
    }

    /// The device. While a bit is judged, it is flipped here.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// A block of the volume.
    ///
    /// # Panics
    /// When it lies outside.
    pub fn block(&self, block: BlockNo) -> &[u8] {
        let backing = || &self.backing[to_usize(block.bytes())..][..BLOCK_BYTES];
        self.volume.get(&block).map_or_else(backing, Vec::as_slice)
    }

    /// The first sector of the header in a slot, if its own CRC proves that it was written for this
    /// cache, and there.
    pub fn header(&self, slot: Slot) -> Option<FirstSector> {
        let at = to_usize(self.superblock.geometry.slot_offset(slot));
        let header = FirstSector::decode(self.image[at..].first_chunk()?).ok()?;
        let digest = self.superblock.extension.as_ref().map(SuperblockExtension::digest);
        let is_ours = header.extension.is_some_and(|extension| Some(extension.digest) == digest);
        (is_ours && self.superblock.geometry.slot_of(header.id) == slot).then_some(header)
    }

    /// Lists the entries of live segments, and counts those that a header or the clean mark proves
    /// durable.
    fn read_log(&mut self) {
        let geometry = self.superblock.geometry;
        let mut durable =
            self.superblock.extension.as_ref().and_then(|page| page.clean).unwrap_or_default();
        for header in geometry.all_slots().filter_map(|slot| self.header(slot)) {
            let claim = header.extension.map(|extension| extension.durable).unwrap_or_default();
            durable = durable.max(if claim < header.id { claim } else { SegmentId::NONE });
        }
        for header in &self.view.live {
            let before =
                header.extension.and_then(|extension| extension.before).map_or(0, |it| it.length);
            for (index, entry) in (0..).zip(&header.metablocks) {
                let place = Place { slot: geometry.slot_of(header.id), index };
                self.entries.push(Entry { place, block: entry.block, dirty: entry.dirty });
                if header.id <= durable || index < before {
                    self.proven = self.entries.len();
                }
            }
        }
    }

    /// Flips a bit, judges the effect, and flips it back.
    pub fn judge(&self, at: u64, bit: u8) -> FlipEffect {
        self.flip(at, bit);
        let outcome = self.outcome(at);
        self.flip(at, bit);
        outcome
    }

    /// Flips a bit of [`Subject::device`].
    ///
    /// # Panics
    /// When it lies outside.
    pub fn flip(&self, at: u64, bit: u8) {
        let sector = at - at % to_u64(SECTOR_BYTES);
        let mut data =
            block_on(self.device.read(sector, IoBuf::zeroed(SECTOR_BYTES))).expect("a sector");
        data[to_usize(at - sector)] ^= 1 << bit;
        block_on(self.device.write(sector, data.into())).expect("a sector");
    }

    fn outcome(&self, at: u64) -> FlipEffect {
        let Ok(superblock) = block_on(read_superblock(&self.device, Use::Write)) else {
            return FlipEffect::Refused;
        };
        // If the superblock reads the same, so does the rest of the device.
        if at < SUPERBLOCK_REGION_BYTES && superblock == self.superblock {
            return FlipEffect::Whole;
        }
        let judged = self.outcome_of(&superblock, Reading::Trusting, at);
        match self.outcome_of(&superblock, Reading::Tail, at) {
            // What it does not read may be damaged.
            FlipEffect::Whole => judged,
            tail if tail == judged => judged,
            tail => FlipEffect::Wrong(format!("the tail alone: {tail:?}; all of it: {judged:?}")),
        }
    }

    fn outcome_of(&self, superblock: &Superblock, reading: Reading, at: u64) -> FlipEffect {
        let is_outside = |block: &BlockNo| block.bytes() >= to_u64(self.backing.len());
        match RecoveredView::with(&self.device, superblock, reading, self.recover) {
            Ok(found) if !found.blocks.keys().any(is_outside) => {
                self.compare(&found, self.place_of(at))
            }
            _ => FlipEffect::Refused,
        }
    }

    /// The place of the data block at an offset.
    fn place_of(&self, at: u64) -> Option<Place> {
        let at = to_usize(at.checked_sub(SUPERBLOCK_REGION_BYTES)?);
        let block = (at % SEGMENT_BYTES / BLOCK_BYTES).checked_sub(1)?;
        Some(Place {
            slot: Slot(u32::try_from(at / SEGMENT_BYTES).ok()?),
            index: u8::try_from(block).ok()?,
        })
    }

    fn compare(&self, found: &RecoveredView, touched: Option<Place>) -> FlipEffect {
        let (before, now) = (&self.view.blocks, &found.blocks);
        let named: BTreeSet<BlockNo> = before.keys().chain(now.keys()).copied().collect();
        let is_touched = |block: &BlockNo| {
            let places = now.get(block).into_iter().flatten().flatten().map(|source| source.place);
            places.into_iter().any(|place| Some(place) == touched)
        };
        let suspect = |block: &BlockNo| before.get(block) != now.get(block) || is_touched(block);
        let suspects: Vec<BlockNo> = named.into_iter().filter(suspect).collect();
        let unproven = self.entries[self.proven..].iter().map(|entry| entry.block);
        let served: BTreeMap<BlockNo, Option<Vec<u8>>> = suspects
            .iter()
            .copied()
            .chain(unproven)
            .map(|block| (block, found.read(&self.device, &self.backing, block)))
            .collect();
        let is_lost = |block: &&BlockNo| {
            served[*block].as_ref().is_some_and(|data| data != self.block(**block))
        };
        let lost: Vec<_> = suspects.iter().filter(is_lost).collect();
        match lost.first() {
            None if served.values().any(Option::is_none) => FlipEffect::Refused,
            None => FlipEffect::Whole,
            Some(_)
                if (self.proven..=self.entries.len()).any(|cut| self.is_state(cut, &served)) =>
            {
                FlipEffect::UnprovenLost
            }
            Some(first) => FlipEffect::Wrong(format!(
                "{} blocks are lost, the first is {first}; recovery point {} instead of {}",
                lost.len(),
                found.recovery.point,
                self.view.recovery.point
            )),
        }
    }

    /// Whether these blocks hold what they held when the log had `cut` entries.
    fn is_state(&self, cut: usize, served: &BTreeMap<BlockNo, Option<Vec<u8>>>) -> bool {
        served
            .iter()
            .all(|(&block, data)| data.as_ref().is_none_or(|data| *data == self.state(cut, block)))
    }

    fn state(&self, cut: usize, block: BlockNo) -> Vec<u8> {
        let mut content = self.backing[to_usize(block.bytes())..][..BLOCK_BYTES].to_vec();
        for entry in self.entries[..cut].iter().filter(|entry| entry.block == block) {
            let data = &self.image[to_usize(self.superblock.geometry.place_offset(entry.place))..];
            for (first, count) in entry.dirty.runs() {
                let sectors = first * SECTOR_BYTES..(first + count) * SECTOR_BYTES;
                content[sectors.clone()].copy_from_slice(&data[sectors]);
            }
        }
        content
    }
}
