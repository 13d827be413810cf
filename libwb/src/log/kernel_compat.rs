//! What a log must not hold when the kernel module gets the cache, so that it shows the same volume
//! as we do.
//!
//! When the module recovers a log and comes to a partial version of a block, it writes the dirty
//! sectors of the version before to the backing device, even if the superblock record says that
//! both had been written back long ago. Then it takes all that the record covers for clean. So the
//! older version stands over the newer one. It does so to its own devices as well, where
//! `update_sb_record_interval` is set. We leave no older version with which that could happen.
//!
//! And it takes written-back segments for a read cache. So none may hold a version of a block that
//! was discarded since, or written around the log; nor one that was superseded, where what
//! superseded it is gone: a crash may leave a segment empty with older ones as they were, or
//! overwrite one before those that came before it. What was discarded, the log does not show: the
//! engine empties segments for that before it acknowledges a discard, and so leaves a trace here.

use crate::device::{Device, DeviceError, IoBuf, Operation};
use crate::format::{
    BLOCK_BYTES, Geometry, Metablock, SegmentHeader, SegmentId, SuperblockExtension, empty_header,
    to_u64,
};
use crate::log::segment_writes::filler;
use futures_util::{StreamExt, stream};
use std::collections::HashSet;

/// Headers that are read at the same time.
const DEPTH: usize = 32;

/// What stands where a written-back segment belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Remnant {
    /// Nothing, or an empty segment.
    Nothing,
    /// Something that cannot be read, or is not the segment. There is no telling what the module
    /// would make of it.
    Unknown,
    /// Whole versions of blocks, all dirty.
    Whole,
    /// A partial or a clean version of a block at least, in which the module sees no whole one
    /// either.
    Partial {
        /// The version before it is in the same segment.
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

/// The rule: which of the written-back segments must be emptied. They come in the order of their
/// ids.
///
/// All before the last that holds a partial version, or a clean one, or of which nothing is left or
/// known; and that one if it holds the version before, too, or is not known.
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

/// The segments of a log up to `written_back` that must be emptied before the module gets the
/// device, oldest first. Of those that are damaged, the headers are not asked.
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

/// The header block that makes a written-back segment an empty one.
pub(crate) struct Emptied {
    /// What is to be written.
    pub(crate) block: IoBuf,
    /// The device shows that already.
    pub(crate) is_there: bool,
}

/// Makes up the header block of an empty segment for the place of one that is written back.
/// Segments stay in the log, so that it can be walked without the superblock record too. Where the
/// header can be read, its first sector alone changes, so that a power cut leaves the one or the
/// other. Where it cannot, the whole block is made anew: torn, that is a damaged segment that is
/// written back, which costs nothing.
///
/// # Errors
/// When the header cannot be read of a segment after which none stands that is known to be
/// `durable`: torn, it could end the log below its record.
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
