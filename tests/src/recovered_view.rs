//! What recovery makes of a cache device: whether it refuses the device, and which version of each
//! block counts.

use futures_lite::future::block_on;
use libwb::device::{Device, IoBuf};
use libwb::format::{
    BLOCK_BYTES, BlockNo, Geometry, Place, SECTOR_BYTES, SegmentHeader, Slot, crc32c, to_usize,
};
use libwb::log::Use;
use libwb::log::recovery::{Recovery, recover};
use libwb::log::scan::{SlotContent, SlotState, scan, scan_trusting};
use libwb::log::superblock::{Superblock, read_superblock};
use libwb::log::tail::{read_tail, slots_ahead};
use std::collections::{BTreeMap, HashMap};

/// Where the newest version of a sector lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// The block.
    pub place: Place,
    /// What its CRC must be, if the device keeps one.
    pub crc: Option<u32>,
}

/// The newest versions of a block's sectors; `None` for sectors on the backing device.
pub type Sources = [Option<Source>; 8];

/// What decides over a log: [`recover`], or one with a flaw.
pub type Recover = fn(&Superblock, &[SlotState]) -> Recovery;

/// How much of the log is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// As attach does first: the tail of the log. If that does not decide, as
    /// [`Reading::Trusting`].
    Tail,
    /// Of what was durable, the headers alone.
    Trusting,
    /// As wbcheck and replay do.
    Whole,
}

/// A log that recovery accepts.
#[derive(Clone, Debug)]
pub struct RecoveredView {
    /// What recovery makes of it.
    pub recovery: Recovery,
    /// The blocks that live segments hold something of.
    pub blocks: BTreeMap<BlockNo, Sources>,
    /// The headers of the live segments, oldest first, with the entries that stand.
    pub live: Vec<SegmentHeader>,
    geometry: Geometry,
}

impl RecoveredView {
    /// Reads a device as recovery does.
    ///
    /// # Errors
    /// When that refuses it; says why.
    pub fn of(device: &Device, reading: Reading) -> Result<RecoveredView, String> {
        let superblock =
            block_on(read_superblock(device, Use::Write)).map_err(|e| e.to_string())?;
        RecoveredView::with(device, &superblock, reading, recover)
    }

    /// As [`RecoveredView::of`], for a device whose superblock was read before.
    ///
    /// # Errors
    /// As [`RecoveredView::of`].
    pub fn with(
        device: &Device,
        superblock: &Superblock,
        reading: Reading,
        recover: Recover,
    ) -> Result<RecoveredView, String> {
        let geometry = superblock.geometry;
        let mut headers: HashMap<Slot, SegmentHeader> = HashMap::new();
        let visit = |slot, content: &SlotContent| {
            match &content.header {
                Some(header) => headers.insert(slot, header.clone()),
                None => headers.remove(&slot),
            };
        };
        let recovery = match reading {
            Reading::Tail => {
                let ahead = slots_ahead(geometry);
                block_on(read_tail(device, superblock, ahead, visit)).map(|tail| tail.recovery)
            }
            Reading::Trusting => {
                Some(recover(superblock, &block_on(scan_trusting(device, superblock, visit))))
            }
            Reading::Whole => Some(recover(superblock, &block_on(scan(device, geometry, visit)))),
        };
        let Some(recovery) = recovery else {
            return RecoveredView::with(device, superblock, Reading::Trusting, recover);
        };
        if let Some(corruption) = recovery.corruption.first() {
            return Err(corruption.to_string());
        }
        let mut blocks: BTreeMap<BlockNo, Sources> = BTreeMap::new();
        let mut live = Vec::new();
        for slot in recovery.live().map(|id| geometry.slot_of(id)) {
            let header = headers.remove(&slot).ok_or("a live segment has no header")?;
            for (index, entry) in (0..).zip(&header.metablocks) {
                let source = Source { place: Place { slot, index }, crc: entry.crc };
                for (first, count) in entry.dirty.runs() {
                    blocks.entry(entry.block).or_default()[first..first + count].fill(Some(source));
                }
            }
            live.push(header);
        }
        Ok(RecoveredView { recovery, blocks, live, geometry })
    }

    /// A block of the volume as the engine serves it; none where it refuses that, for the data is
    /// not what was written.
    ///
    /// # Panics
    /// When the block lies outside.
    pub fn read(&self, cache: &Device, backing: &[u8], block: BlockNo) -> Option<Vec<u8>> {
        let mut content = backing[to_usize(block.bytes())..][..BLOCK_BYTES].to_vec();
        let Some(sources) = self.blocks.get(&block) else { return Some(content) };
        let mut of_place: Option<(Place, IoBuf)> = None;
        for (nth, source) in sources.iter().enumerate() {
            let Some(Source { place, crc }) = *source else { continue };
            let data = match of_place.take().filter(|(read, _)| *read == place) {
                Some((_, data)) => data,
                None => self.data(cache, place, crc)?,
            };
            let sector = nth * SECTOR_BYTES..(nth + 1) * SECTOR_BYTES;
            content[sector.clone()].copy_from_slice(&data[sector]);
            of_place = Some((place, data));
        }
        Some(content)
    }

    fn data(&self, cache: &Device, place: Place, crc: Option<u32>) -> Option<IoBuf> {
        let at = self.geometry.place_offset(place);
        let data =
            block_on(cache.read(at, IoBuf::zeroed(BLOCK_BYTES))).expect("a place on the device");
        crc.is_none_or(|crc| crc == crc32c(&data)).then_some(data)
    }
}
