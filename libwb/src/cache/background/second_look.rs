//! A late look at the slots that recovery did not read: what stands there is written back, unless
//! the device has lost or altered something. [`second_look`] says what a slot means.

use crate::cache::engine::Engine;
use crate::cache::error::CacheError;
use crate::device::{DeviceError, Operation};
use crate::format::{BLOCK_BYTES, SegmentId, Slot, to_u64};
use crate::log::corruption::Corruption;
use crate::log::recovery::Recovery;
use crate::log::superblock::Superblock;
use crate::log::tail::{SecondLook, read_other_slot, second_look};
use crate::rules::Rule;
use futures_util::{StreamExt, stream};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// Slots that are read at the same time: few, beside what users read.
const DEPTH: usize = 8;
/// Slots after which there is a break as long as they took, but no longer than [`LONGEST_BREAK`].
const IN_A_ROW: usize = 256;
const LONGEST_BREAK: Duration = Duration::from_millis(100);

/// The slots that recovery did not read, and what it made of the others.
pub(crate) struct Unread {
    pub(crate) superblock: Superblock,
    pub(crate) recovery: Recovery,
    /// The segments that would be the next to use these slots, in the order of the log. So the log
    /// comes to a slot after the look at it, if it does not hurry.
    pub(crate) next: Range<u64>,
}

impl Engine {
    /// The background task that looks at these slots once.
    pub(crate) async fn look_again(self: Arc<Self>, unread: Unread) {
        let geometry = unread.superblock.geometry;
        let mut next = unread.next.clone().map(SegmentId);
        loop {
            let begun = self.runtime.now();
            let row: Vec<SegmentId> = next.by_ref().take(IN_A_ROW).collect();
            if row.is_empty() || self.state.lock().lifecycle.is_ending() {
                break;
            }
            let reads = row.into_iter().map(async |id| {
                let slot = geometry.slot_of(id);
                (id, slot, read_other_slot(&self.cache, geometry, slot).await)
            });
            let mut reads = stream::iter(reads).buffered(DEPTH);
            let mut damaged = Vec::new();
            while let Some((id, slot, state)) = reads.next().await {
                // The log has come to this slot meanwhile.
                if self.state.lock().log.newest() >= id {
                    continue;
                }
                match second_look(&unread.superblock, &unread.recovery, slot, &state) {
                    SecondLook::Nothing => {}
                    SecondLook::Damaged(id) => damaged.push(id),
                    SecondLook::Contradiction(what) => self.contradicted(slot, &what).await,
                }
                if self.state.lock().lifecycle.is_ending() {
                    break;
                }
            }
            drop(reads);
            // What stands on a device that contradicts the log is evidence.
            if !damaged.is_empty() && !self.state.lock().lifecycle.is_ending() {
                self.empty_damaged(damaged).await;
            }
            let took = self.runtime.now().saturating_sub(begun);
            self.pause(took.min(LONGEST_BREAK)).await;
        }
        self.task_ended();
    }

    /// The log that is served is not the one that was written. So nothing more is acknowledged, and
    /// what was acknowledged before becomes durable.
    async fn contradicted(&self, slot: Slot, what: &Corruption) {
        if !self.rules.keep(Rule::ContradictionFails) {
            return;
        }
        let offset = self.state.lock().log.geometry().slot_offset(slot);
        tracing::error!("{}: slot {slot}: {what}", self.cache.name());
        let error = DeviceError {
            device: self.cache.name().clone(),
            operation: Operation::Read,
            offset,
            length: to_u64(BLOCK_BYTES),
            cause: DeviceError::CONTRADICTS,
        };
        {
            let mut state = self.state.lock();
            state.lifecycle.close();
            // Whatever becomes of this process, the next one must not take requests.
            state.log.note_failure(&error);
        }
        match self.flush_log().await {
            // Closed: all of it is durable.
            Ok(()) | Err(CacheError::Closed) => {}
            Err(error) => tracing::error!("what was not flushed may be lost: {error}"),
        }
        self.fail(error);
    }
}
