//! Stuck blocks to the end of the log: see [`stuck`](crate::cache::state::stuck).

use crate::cache::engine::Engine;
use crate::cache::error::CacheError;
use crate::cache::state::stuck::MovedBlock;
use crate::cache::state::wait::Wait;
use crate::device::{DeviceError, IoBuf};
use crate::format::{BLOCK_BYTES, BlockNo, Place, SegmentId, crc32c, to_u64};

impl Engine {
    /// Moves as many of these blocks, from segments up to `last`, as possible, in the given order.
    /// Returns how many it moved, and why not all. The copies are durable after a flush of the log.
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
            let wait = {
                let mut state = self.state.lock();
                // In the same visit: no segment may be opened once the last one was sealed.
                state.lifecycle.check_open()?;
                loop {
                    let Some(copy) = copies.get(done) else { break None };
                    match copy.as_ref().map_or(Ok(false), |copy| state.move_block(copy)) {
                        Ok(is_moved) => (done, moved) = (done + 1, moved + usize::from(is_moved)),
                        Err(wait) => break Some(wait),
                    }
                }
            };
            match wait {
                None => {}
                Some(Wait::Slot) => {
                    let block = copies[done].as_ref().map(|copy| copy.block);
                    let stuck = block.and_then(|block| self.state.lock().stuck.error_of(block));
                    why = why.or(stuck);
                    break;
                }
                Some(wait) => self.wait_for(wait).await?,
            }
        }
        self.counters.moved_blocks.add(to_u64(done));
        if moved > 0 {
            self.state.lock().stuck.pause_retries(self.runtime.now());
        }
        Ok((done, why))
    }

    /// Reads the newest version of a block. `None` when that lies beyond `last`, or has nothing to
    /// be written back: it stands for the others as soon as it is durable.
    ///
    /// # Errors
    /// When it cannot be read, and is not known to be lost.
    async fn copy_of(
        &self,
        block: BlockNo,
        last: SegmentId,
    ) -> Result<Option<MovedBlock>, DeviceError> {
        let from = {
            let state = self.state.lock();
            let log = &state.log;
            let newest = log.newest_version(block).filter(|newest| log.is_live(newest.place));
            newest.filter(|newest| log.id_of(newest.place.slot) <= last)
        };
        let Some(from) = from else { return Ok(None) };
        let error = match self.read_places(from.place, IoBuf::zeroed(BLOCK_BYTES)).await {
            Ok(data) => return Ok(Some(MovedBlock { block, from, data, lost: None })),
            Err(error) => error,
        };
        let is_lost = self.state.lock().stuck.cannot_be_read(block, &error, self.runtime.now());
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
        Ok(Some(MovedBlock { block, from, data, lost }))
    }

    /// The data of a block that cannot be verified, as far as the device still gives it: it may be
    /// of use to its owner. And whether it is right after all.
    async fn what_is_left(&self, place: Place) -> (IoBuf, bool) {
        let (offset, crc) = {
            let state = self.state.lock();
            (state.log.geometry().place_offset(place), state.log.crc(place))
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
