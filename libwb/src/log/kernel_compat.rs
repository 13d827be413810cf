//! Which segments a log must not hold when the kernel module takes over the cache. Without them the
//! module shows the same volume as wb.
//!
//! **Older versions.** The module recovers a log entry by entry. At a partial version of a block,
//! it writes the dirty sectors of the previous version to the backing device. It does so even if
//! the superblock record covers both versions. Then it treats all that the record covers as clean,
//! so the older version replaces the newer one. With `update_sb_record_interval` set, it does this
//! to its own devices as well. wb leaves no older version for which this can happen.
//!
//! **Stale versions.** The module uses written-back segments as a read cache. So no such segment
//! may hold:
//!
//! - a version of a block that was discarded or written around the log since;
//! - a superseded version whose newer version is gone. A crash may leave an emptied segment after
//!   older ones, or overwrite a segment before an older one.
//!
//! The log does not show discards. So the engine empties segments before it acknowledges a discard,
//! and the empty segments show here.

use crate::device::{Device, DeviceError, IoBuf, Operation};
use crate::format::{
    BLOCK_BYTES, Geometry, Metablock, SegmentHeader, SegmentId, SuperblockExtension, empty_header,
    to_u64,
};
use crate::log::segment_writes::filler;
use futures_util::{StreamExt, stream};
use std::collections::HashSet;

/// Headers to read at once.
const DEPTH: usize = 32;

/// What lies where a written-back segment belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Remnant {
    /// No segment, or an empty one.
    Nothing,
    /// Something unreadable, or not the segment. What the module would do with it is unknown.
    Unknown,
    /// Only whole versions of blocks, all dirty.
    Whole,
    /// At least one partial or clean version of a block. To the module a clean one is not whole
    /// either.
    Partial {
        /// The previous version of the block is in the same segment.
        twice: bool,
    },
}

impl Remnant {
    fn of(entries: &[Metablock]) -> Remnant {
        if entries.is_empty() {
            return Remnant::Nothing;
        }
        if entries.iter().all(|entry| entry.dirty.is_all()) {
            return Remnant::Whole;
        }
        let mut seen = HashSet::new();
        let is_partial = |entry: &Metablock| !entry.dirty.is_clean() && !entry.dirty.is_all();
        Remnant::Partial {
            twice: entries.iter().any(|entry| !seen.insert(entry.block) && is_partial(entry)),
        }
    }
}

/// The rule: which written-back segments must be emptied. `segments` is in the order of ids.
///
/// These are all segments before the last one that is not [`Remnant::Whole`]. That one is emptied
/// too if it is unknown, or also holds the previous version of a block.
fn misleading(segments: impl IntoIterator<Item = (SegmentId, Remnant)>) -> Vec<SegmentId> {
    let (mut older, mut misleading) = (Vec::new(), Vec::new());
    for (id, remnant) in segments {
        if remnant != Remnant::Whole {
            misleading.append(&mut older);
        }
        match remnant {
            Remnant::Nothing => {}
            Remnant::Unknown | Remnant::Partial { twice: true } => misleading.push(id),
            Remnant::Whole | Remnant::Partial { twice: false } => older.push(id),
        }
    }
    misleading
}

/// The segments up to `written_back` that must be emptied before the module uses the device, oldest
/// first. A damaged segment counts as unknown, whatever its header says.
pub(crate) async fn segments_to_empty(
    device: &Device,
    geometry: Geometry,
    [written_back, newest]: [SegmentId; 2],
    is_damaged: impl Fn(SegmentId) -> bool,
) -> Vec<SegmentId> {
    let oldest = newest.minus(geometry.lap()).next();
    let reads = (oldest.0..=written_back.0).map(SegmentId).map(async |id| {
        let offset = geometry.slot_offset(geometry.slot_of(id));
        let header = device.read(offset, IoBuf::zeroed(BLOCK_BYTES)).await;
        let header = header.ok().and_then(|block| SegmentHeader::decode(block.block_at(0)).ok());
        (id, header)
    });
    let remnants = stream::iter(reads).buffered(DEPTH).map(|(id, header)| {
        let remnant = match header {
            Some(header) if header.id == SegmentId::NONE => Remnant::Nothing,
            Some(header) if header.id == id && !is_damaged(id) => Remnant::of(&header.metablocks),
            _ => Remnant::Unknown,
        };
        (id, remnant)
    });
    misleading(remnants.collect::<Vec<_>>().await)
}

/// The header block that empties a written-back segment.
pub(crate) struct Emptied {
    /// The block to write.
    pub(crate) block: IoBuf,
    /// The device has an empty segment there already.
    #[cfg_attr(not(feature = "engine"), allow(dead_code, reason = "a repair writes it anyway"))]
    pub(crate) is_there: bool,
}

/// Makes the header block of an empty segment that replaces a written-back one. The segment stays
/// in the log, so that the log can be walked without the superblock record.
///
/// If the header is readable, only its first sector changes, so a power cut leaves the old one or
/// the new one. Otherwise the whole block is new. If that write is torn, a written-back segment is
/// damaged, which loses nothing.
///
/// # Errors
/// When the header is unreadable and no later segment is known to be `durable`. A torn write could
/// then end the log before its record.
pub(crate) async fn emptied(
    device: &Device,
    geometry: Geometry,
    [id, durable]: [SegmentId; 2],
    page: Option<&SuperblockExtension>,
) -> Result<Emptied, DeviceError> {
    let offset = geometry.slot_offset(geometry.slot_of(id));
    let read = device.read(offset, IoBuf::zeroed(BLOCK_BYTES)).await.and_then(|block| {
        let header = SegmentHeader::decode(block.block_at(0)).ok().filter(|header| header.id == id);
        header.map(|header| (header, block)).ok_or_else(|| altered(device, offset))
    });
    match read {
        Ok((header, mut block)) => {
            let is_there = header.length() == 0 && header.verify(block.block_at(0), &[]);
            if !is_there {
                empty_header(block.block_at_mut(0));
            }
            Ok(Emptied { block, is_there })
        }
        Err(error) if id >= durable => Err(error),
        Err(_) => Ok(Emptied { block: filler((id, SegmentId::NONE), page), is_there: false }),
    }
}

fn altered(device: &Device, offset: u64) -> DeviceError {
    DeviceError {
        device: device.name().clone(),
        operation: Operation::Read,
        offset,
        length: to_u64(BLOCK_BYTES),
        cause: DeviceError::ALTERED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{BlockNo, DirtyBits};

    fn entry(block: u64, dirty: u8) -> Metablock {
        Metablock { block: BlockNo(block), dirty: DirtyBits(dirty), crc: None, lost: false }
    }

    #[test]
    fn a_segment_is_judged_by_its_entries() {
        let twice = |twice| Remnant::Partial { twice };
        let cases: [(&[Metablock], Remnant); 7] = [
            (&[], Remnant::Nothing),
            (&[entry(1, 0xff), entry(1, 0xff)], Remnant::Whole),
            (&[entry(1, 0xff), entry(2, 0x01)], twice(false)),
            (&[entry(1, 0x01), entry(1, 0xff)], twice(false)),
            (&[entry(1, 0xff), entry(1, 0x01)], twice(true)),
            (&[entry(1, 0x03), entry(2, 0xff), entry(1, 0x01)], twice(true)),
            (&[entry(1, 0xff), entry(1, 0)], twice(false)),
        ];
        for (entries, remnant) in cases {
            assert_eq!(Remnant::of(entries), remnant, "{entries:?}");
        }
    }

    #[test]
    fn what_stands_before_the_last_segment_that_is_not_whole_goes() {
        use Remnant::{Nothing, Unknown, Whole};
        let (once, twice) = (Remnant::Partial { twice: false }, Remnant::Partial { twice: true });
        let cases: [(&[Remnant], &[u64]); 8] = [
            (&[], &[]),
            (&[Whole, Whole], &[]),
            (&[Whole, once, Whole], &[1]),
            (&[once, Whole, once, Whole], &[1, 2]),
            (&[Whole, twice, Whole], &[1, 2]),
            (&[Whole, Nothing, Whole], &[1]),
            (&[Whole, Unknown, Whole], &[1, 2]),
            (&[Nothing, Nothing, once, Whole], &[]),
        ];
        for (segments, gone) in cases {
            let numbered = (1..).map(SegmentId).zip(segments.iter().copied());
            let ids: Vec<u64> = misleading(numbered).into_iter().map(|id| id.0).collect();
            assert_eq!(ids, gone, "{segments:?}");
        }
    }

    #[test]
    fn once_they_are_emptied_nothing_is_left_to_empty() {
        let all = [
            Remnant::Nothing,
            Remnant::Unknown,
            Remnant::Whole,
            Remnant::Partial { twice: false },
            Remnant::Partial { twice: true },
        ];
        for number in 0..5usize.pow(5) {
            let segments = (0..5u32)
                .map(|nth| (SegmentId(u64::from(nth) + 1), all[number / 5usize.pow(nth) % 5]));
            let gone = misleading(segments.clone());
            let after = segments
                .map(|(id, it)| (id, if gone.contains(&id) { Remnant::Nothing } else { it }));
            assert_eq!(misleading(after), []);
        }
    }
}
