//! Whether a backing device already holds writes from after the point at which a replay is to end.
//!
//! A replay undoes nothing. If an earlier one went further, the backing device would end up with a
//! mixture of two states of the volume. Neither device records how far a replay with `--until`
//! went, but the data shows it. Such a replay wrote every block of the first segment after the
//! point, in this segment's version or a later one. One such block alone proves little, because it
//! may have changed back. So the replay is refused only if most of these blocks match.

use crate::cache::state::index::Index;
use crate::device::{Device, DeviceError, IoBuf};
use crate::format::{
    BLOCK_BYTES, BlockNo, DirtyBits, Geometry, Place, SECTOR_BYTES, SegmentHeader, SegmentId,
    to_u64, to_usize,
};
use crate::log::live::visit_headers;
use crate::log::recovery::Recovery;
use crate::log::{LogError, LogErrorKind};
use std::collections::HashMap;
use std::ops::RangeInclusive;

/// Segments whose entries are looked at at a time: 32 bytes of memory for each entry.
const AT_ONCE: u64 = 256;

/// The part of a log after a point, and where that point is.
pub(super) struct Later<'a> {
    pub(super) cache: &'a Device,
    pub(super) backing: &'a Device,
    pub(super) geometry: Geometry,
    pub(super) until: SegmentId,
    last: SegmentId,
    cut_short: Option<SegmentId>,
}

/// A dirty entry of a segment.
struct Entry {
    block: BlockNo,
    dirty: DirtyBits,
    place: Place,
}

/// A block that tells something: what the backing device holds of it, and whether that comes from
/// after the point.
struct Telling {
    found: IoBuf,
    is_later: bool,
}

impl<'a> Later<'a> {
    /// What a log, as recovery finds it, holds after a point.
    pub(super) fn of(
        cache: &'a Device,
        backing: &'a Device,
        geometry: Geometry,
        recovery: &Recovery,
        until: SegmentId,
    ) -> Later<'a> {
        Later {
            cache,
            backing,
            geometry,
            until,
            last: recovery.point,
            cut_short: recovery.cut_short(),
        }
    }

    /// Refuses to replay until the point if most of what the first segment after it wrote is on the
    /// backing device, as that segment wrote it or a later one. `index` knows the newest versions
    /// up to the point.
    pub(super) async fn refuse_mixture(&self, index: &Index) -> Result<(), LogError> {
        let Some((first, mut blocks)) = self.first_telling(index).await? else { return Ok(()) };
        let enough = blocks.len() / 2;
        let mut later = 0;
        for from in (first.0..=self.last.0).step_by(to_usize(AT_ONCE)) {
            let to = self.last.0.min(from + AT_ONCE - 1);
            for entry in self.entries(from..=to, |block| blocks.contains_key(&block)).await? {
                let Some(block) = blocks.get_mut(&entry.block).filter(|block| !block.is_later)
                else {
                    continue;
                };
                let data = self.data(entry.place).await?;
                block.is_later =
                    is_telling(&data, entry.dirty) && are_same(&data, &block.found, entry.dirty);
                later += usize::from(block.is_later);
            }
            if later > enough {
                let (backing, until) = (self.backing.name().to_string(), self.until);
                let kind = LogErrorKind::Ahead { until, segment: first };
                return Err(LogError { device: backing, kind });
            }
        }
        Ok(())
    }

    /// The first segment with blocks that can tell whether it was written back, and these blocks.
    async fn first_telling(
        &self,
        index: &Index,
    ) -> Result<Option<(SegmentId, HashMap<BlockNo, Telling>)>, LogError> {
        for id in self.until.next().0..=self.last.0 {
            // The newest of several versions counts.
            let entries = self.entries(id..=id, |_| true).await?;
            let entries: HashMap<BlockNo, Entry> =
                entries.into_iter().map(|entry| (entry.block, entry)).collect();
            let mut blocks = HashMap::new();
            for entry in entries.into_values() {
                let telling = self.telling(&entry, index).await?;
                blocks.extend(telling.map(|telling| (entry.block, telling)));
            }
            if !blocks.is_empty() {
                return Ok(Some((SegmentId(id), blocks)));
            }
        }
        Ok(None)
    }

    async fn telling(&self, entry: &Entry, index: &Index) -> Result<Option<Telling>, LogError> {
        let data = self.data(entry.place).await?;
        let found = self.found(entry.block).await?;
        let is_as_it_was = match index.get(entry.block) {
            Some(version) => are_same(&self.data(version.place).await?, &found, version.dirty),
            None => false,
        };
        if !is_telling(&data, entry.dirty) || is_as_it_was && are_same(&data, &found, entry.dirty) {
            return Ok(None);
        }
        // Data that equals the version at the point is not later, though it may have changed back.
        let found = if is_as_it_was { IoBuf::zeroed(0) } else { found };
        Ok(Some(Telling { found, is_later: false }))
    }

    async fn entries(
        &self,
        ids: RangeInclusive<u64>,
        wanted: impl Fn(BlockNo) -> bool,
    ) -> Result<Vec<Entry>, LogError> {
        let mut entries = Vec::new();
        let visit = |header: &SegmentHeader| {
            let slot = self.geometry.slot_of(header.id);
            for (index, entry) in (0..).zip(&header.metablocks) {
                if !entry.dirty.is_clean() && wanted(entry.block) {
                    let place = Place { slot, index };
                    entries.push(Entry { block: entry.block, dirty: entry.dirty, place });
                }
            }
        };
        visit_headers(self.cache, self.geometry, ids.map(SegmentId), self.cut_short, visit).await?;
        Ok(entries)
    }

    async fn data(&self, place: Place) -> Result<IoBuf, DeviceError> {
        self.cache.read(self.geometry.place_offset(place), IoBuf::zeroed(BLOCK_BYTES)).await
    }

    /// What the backing device holds of a block, as far as it reaches.
    async fn found(&self, block: BlockNo) -> Result<IoBuf, DeviceError> {
        let offset = block.0.saturating_mul(to_u64(BLOCK_BYTES));
        let length = self.backing.size().saturating_sub(offset).min(to_u64(BLOCK_BYTES));
        if length == 0 {
            return Ok(IoBuf::zeroed(0));
        }
        self.backing.read(offset, IoBuf::zeroed(to_usize(length))).await
    }
}

fn bytes_of(dirty: DirtyBits) -> impl Iterator<Item = std::ops::Range<usize>> {
    dirty.runs().map(|(first, count)| first * SECTOR_BYTES..(first + count) * SECTOR_BYTES)
}

/// Whether data on the backing device says where it comes from. Zeros do not: most of a new disk is
/// zeros.
fn is_telling(data: &[u8], dirty: DirtyBits) -> bool {
    bytes_of(dirty).any(|range| data[range].iter().any(|&byte| byte != 0))
}

fn are_same(data: &[u8], found: &[u8], dirty: DirtyBits) -> bool {
    bytes_of(dirty).all(|range| found.get(range.clone()) == Some(&data[range]))
}

#[cfg(test)]
mod tests {
    use crate::cache::{Cache, CacheError, OpenOptions};
    use crate::device::{Device, MemDevice};
    use crate::format::{
        BLOCK_BYTES, BlockNo, DirtyBits, Geometry, Metablock, SEGMENT_BYTES,
        SUPERBLOCK_REGION_BYTES, SegmentId, encode_header, encode_superblock_block, to_u64,
        to_usize,
    };
    use crate::log::{LogError, LogErrorKind};
    use crate::reactor::Reactor;
    use std::sync::Arc;

    /// A disk of 16 blocks and a sector, and a log of the base format before it.
    struct Rig {
        reactor: Reactor,
        cache: Arc<MemDevice>,
        backing: Arc<MemDevice>,
    }

    const SECTOR: usize = 512;

    /// A block, its dirty bits, and what it is filled with.
    type Version = (u64, u8, u8);

    fn rig(disk: u8, segments: &[&[Version]]) -> Rig {
        let mut content = vec![0; to_usize(SUPERBLOCK_REGION_BYTES) + 8 * SEGMENT_BYTES];
        let geometry = Geometry::of_device(to_u64(content.len())).unwrap();
        encode_superblock_block(content.first_chunk_mut().unwrap());
        for (id, versions) in (1..).map(SegmentId).zip(segments) {
            let entry = |&(block, dirty, _)| Metablock {
                block: BlockNo(block),
                dirty: DirtyBits(dirty),
                crc: None,
                lost: false,
            };
            let entries: Vec<_> = versions.iter().map(entry).collect();
            let data: Vec<u8> =
                versions.iter().flat_map(|&(_, _, fill)| [fill; BLOCK_BYTES]).collect();
            let at = to_usize(geometry.slot_offset(geometry.slot_of(id)));
            encode_header(content[at..].first_chunk_mut().unwrap(), id, &entries, &data, None);
            content[at + BLOCK_BYTES..][..data.len()].copy_from_slice(&data);
        }
        Rig {
            reactor: Reactor::start().unwrap(),
            cache: Arc::new(MemDevice::with_content("cache", content)),
            backing: Arc::new(MemDevice::with_content(
                "backing",
                vec![disk; 16 * BLOCK_BYTES + SECTOR],
            )),
        }
    }

    impl Rig {
        fn try_until(&self, id: u64, mixes: bool) -> Result<(), CacheError> {
            let (cache, backing): (Device, Device) = (self.cache.clone(), self.backing.clone());
            let runtime = Arc::new(self.reactor.handle().clone());
            let options = OpenOptions::replay_until(SegmentId(id)).mixing(mixes);
            self.reactor.block_on(async {
                Cache::open(cache, backing, runtime, options).await?.drain().await
            })
        }

        fn until(&self, id: u64) {
            self.try_until(id, false).unwrap();
        }

        /// The segment that is told to be on the disk already.
        fn refuses(&self, id: u64) -> u64 {
            match self.try_until(id, false) {
                Err(CacheError::Log(LogError {
                    kind: LogErrorKind::Ahead { segment, .. },
                    ..
                })) => segment.0,
                other => panic!("{other:?}"),
            }
        }

        fn holds(&self, block: usize) -> u8 {
            self.backing.content()[block * BLOCK_BYTES]
        }
    }

    #[test]
    fn what_came_later_is_noticed_and_is_mixed_with_what_came_before_only_on_demand() {
        // Of block 1, nothing is in the first segment.
        let rig = rig(
            9,
            &[&[(0, 0xff, 1)], &[(0, 0xff, 2), (1, 0xff, 2)], &[(0, 0xff, 3)], &[(2, 0xff, 4)]],
        );
        for id in [0, 1, 1, 2, 2, 4, 4] {
            rig.until(id);
        }
        assert_eq!([0, 1, 2, 3].map(|block| rig.holds(block)), [3, 2, 4, 9]);
        assert_eq!([0, 1, 2, 3].map(|id| rig.refuses(id)), [1, 2, 3, 4]);
        assert_eq!([0, 1, 2, 3].map(|block| rig.holds(block)), [3, 2, 4, 9], "nothing was written");
        rig.try_until(1, true).unwrap();
        assert_eq!([0, 1, 2].map(|block| rig.holds(block)), [1, 2, 4], "a mixture");
    }

    #[test]
    fn dirty_sectors_alone_are_compared() {
        let rig = rig(9, &[&[(0, 0x0f, 1)], &[(0, 0x1f, 2), (16, 0x01, 2)]]);
        rig.until(1);
        rig.until(2);
        assert_eq!(rig.backing.content()[5 * SECTOR], 9);
        assert_eq!(rig.refuses(1), 2);
    }

    #[test]
    fn what_changed_back_or_did_not_change_is_no_sign() {
        let changed_back = rig(9, &[&[(0, 0xff, 1)], &[(0, 0xff, 9), (1, 0xff, 2), (2, 0xff, 2)]]);
        changed_back.until(1);
        let written_again =
            rig(9, &[&[(0, 0xff, 1), (1, 0xff, 2)], &[(0, 0xff, 1)], &[(1, 0xff, 3)]]);
        for id in [1, 2, 1] {
            written_again.until(id);
        }
        written_again.until(3);
        assert_eq!(written_again.refuses(1), 3);
        let zeros = rig(0, &[&[(0, 0xff, 1)], &[(1, 0xff, 0), (2, 0xff, 0)], &[(3, 0xff, 3)]]);
        for id in [1, 2, 1, 3] {
            zeros.until(id);
        }
        assert_eq!(zeros.refuses(1), 3);
    }

    #[test]
    fn an_entry_beyond_the_end_of_the_disk_is_no_sign() {
        let beyond = [(u64::MAX / 8, 0xff, 9), (17, 0x01, 9), (16, 0x03, 9), (1 << 53, 0xff, 9)];
        let rig = rig(9, &[&[(0, 0xff, 1)], &beyond]);
        rig.until(1);
        rig.until(1);
        assert_eq!(rig.holds(0), 1);
    }
}
