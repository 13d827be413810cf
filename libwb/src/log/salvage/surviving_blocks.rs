//! The blocks of a damaged segment that a CRC or the checksum proves good.

use crate::device::{Device, DeviceError, IoBuf};
use crate::format::{
    BLOCK_BYTES, BlockNo, Geometry, Metablock, Place, Reason, SegmentExtension, SegmentHeader,
    SegmentId, Slot, crc32c, encode_header, to_u64,
};
use futures_util::{StreamExt, stream};

/// Blocks to read at once.
const DEPTH: usize = 16;

/// A damaged segment with a sound header and at least one good block.
pub(super) struct SurvivingBlocks {
    slot: Slot,
    id: SegmentId,
    extension: SegmentExtension,
    metablocks: Vec<Metablock>,
    /// Which of the blocks are proved good.
    good: Vec<bool>,
}

impl SurvivingBlocks {
    /// Finds the good blocks of segment `id` in its slot. The header and each block have a CRC. If
    /// only the header's first sector is damaged, the checksum of the base format proves all blocks
    /// or none. In a segment without the extension nothing can be proved.
    pub(super) async fn find(
        device: &Device,
        geometry: Geometry,
        id: SegmentId,
        digest: Option<u32>,
    ) -> Option<SurvivingBlocks> {
        let (slot, digest) = (geometry.slot_of(id), digest?);
        let block =
            device.read(geometry.slot_offset(slot), IoBuf::zeroed(BLOCK_BYTES)).await.ok()?;
        let header = match SegmentHeader::decode(block.block_at(0)) {
            Ok(header) if header.extension.is_some() => {
                let is_ours = header.extension.is_some_and(|extension| extension.digest == digest);
                (is_ours && header.is_whole).then_some(header)
            }
            _ => {
                let presumed =
                    SegmentHeader::presumed(block.block_at(0)).filter(|it| it.length() > 0)?;
                let place = geometry.place_offset(Place { slot, index: 0 });
                let data = device.read(place, IoBuf::zeroed(presumed.data_bytes())).await.ok()?;
                let mut presumed = presumed.verify(block.block_at(0), &data).then_some(presumed)?;
                for (entry, block) in presumed.metablocks.iter_mut().zip(data.chunks(BLOCK_BYTES)) {
                    entry.crc = Some(crc32c(block));
                }
                Some(presumed)
            }
        };
        let header = header.filter(|header| header.id == id)?;
        let unknown = SegmentExtension {
            digest,
            reason: Reason::Salvage,
            durable: SegmentId::NONE,
            written_back: SegmentId::NONE,
            time: 0,
            before: None,
        };
        let known = |it| SegmentExtension { reason: Reason::Salvage, before: None, ..it };
        let extension = header.extension.map_or(unknown, known);
        let is_good = async |(index, entry): (u8, &Metablock)| {
            let place = geometry.place_offset(Place { slot, index });
            let data = device.read(place, IoBuf::zeroed(BLOCK_BYTES)).await;
            data.is_ok_and(|data| entry.crc == Some(crc32c(&data)))
        };
        let good: Vec<bool> = stream::iter((0..).zip(&header.metablocks))
            .map(is_good)
            .buffered(DEPTH)
            .collect()
            .await;
        let metablocks = header.metablocks;
        good.contains(&true).then_some(SurvivingBlocks { slot, id, extension, metablocks, good })
    }

    /// The dirty blocks without a good version.
    pub(super) fn lost(&self) -> Vec<BlockNo> {
        let entries = || self.metablocks.iter().zip(&self.good);
        let lost =
            entries().enumerate().filter(|(_, (entry, good))| !**good && !entry.dirty.is_clean());
        let lost = lost.filter(|(nth, (bad, _))| {
            !entries().skip(*nth).any(|(e, good)| *good && e.block == bad.block)
        });
        lost.map(|(_, (entry, _))| entry.block).collect()
    }

    /// The number of good dirty blocks.
    pub(super) fn kept(&self) -> u64 {
        let kept = self
            .metablocks
            .iter()
            .zip(&self.good)
            .filter(|(entry, good)| **good && !entry.dirty.is_clean());
        to_u64(kept.count())
    }

    /// Makes the segment valid again. Good blocks stay in place. A copy of a good neighbour, entry
    /// and data, replaces each bad block; this does not change the meaning of the log. The header
    /// comes last, so that until then the same blocks survive.
    pub(super) async fn write(
        &self,
        device: &Device,
        geometry: Geometry,
    ) -> Result<(), DeviceError> {
        let length = self.good.iter().rposition(|&good| good).map_or(0, |last| last + 1);
        let mut metablocks = self.metablocks[..length].to_vec();
        let place = |index| geometry.slot_offset(self.slot) + to_u64(BLOCK_BYTES * (1 + index));
        for bad in (0..length).filter(|&index| !self.good[index]) {
            let before = (0..bad).rev().find(|&index| self.good[index]);
            let Some(twin) = before.or_else(|| (bad..length).find(|&index| self.good[index]))
            else {
                continue;
            };
            metablocks[bad] = self.metablocks[twin];
            let data = device.read(place(twin), IoBuf::zeroed(BLOCK_BYTES)).await?;
            device.write(place(bad), data.into()).await?;
        }
        device.flush().await?;
        let mut block = IoBuf::zeroed(BLOCK_BYTES);
        // Every remaining entry has its CRC.
        encode_header(block.block_at_mut(0), self.id, &metablocks, &[], Some(&self.extension));
        device.write(geometry.slot_offset(self.slot), block.into()).await
    }
}
