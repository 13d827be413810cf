//! Back-pressure before the log is full.
//!
//! From [`TIGHT`] on, writes are paced: each waits for its turn at a rate that falls from four times what write-back
//! frees to half of that as the last slots fill. So a full log settles where writes come in as fast as they go out,
//! each a little late, instead of all stopping while a batch is written back.

use super::state::State;
use crate::format::{PLACES, to_u64};
use std::time::Duration;

/// Writes are paced when less than this part of the slots is free: one in so many.
pub(super) const TIGHT: u64 = 4;
/// What a place costs, in 256ths of the time that write-back takes to free one, when the pacing begins.
const FIRST_PRICE: u64 = 64;
/// And when no slot is left.
const LAST_PRICE: u64 = 512;

/// No write waits longer for its turn. Beyond that it waits for a slot, as all do when the log is full: a price that was
/// measured on full segments says little where flushes close them almost empty.
const LONGEST: Duration = Duration::from_millis(500);

/// When writes may go.
#[derive(Default)]
pub(super) struct Throttle {
    /// The time that write-back takes to free a place, as measured of late; zero before it was.
    per_place: Duration,
    /// When the next write may go.
    next: Duration,
    /// Up to where in the log places were charged for, counted from its beginning.
    charged: u64,
}

impl Throttle {
    /// Write-back has freed so many segments in this time.
    pub(super) fn measured(&mut self, segments: u64, took: Duration) {
        let places = u32::try_from(segments.saturating_mul(u64::from(PLACES))).unwrap_or(u32::MAX).max(1);
        let now = took / places;
        self.per_place = if self.per_place.is_zero() { now } else { (self.per_place * 3 + now) / 4 };
    }

    /// The time that write-back takes to free a place, if it is known.
    pub(super) fn per_place(&self) -> Option<Duration> {
        (!self.per_place.is_zero()).then_some(self.per_place)
    }
}

impl State {
    /// Whether writes are paced.
    pub(super) fn is_tight(&self) -> bool {
        self.free_slots() * TIGHT < self.geometry.lap() && self.throttle.per_place().is_some()
    }

    /// Charges for a write of so many blocks, and says how long it is to wait.
    pub(super) fn admit(&mut self, now: Duration, blocks: usize) -> Duration {
        let position = self.position();
        if !self.is_tight() {
            self.throttle.charged = position;
            self.throttle.next = now;
            return Duration::ZERO;
        }
        let tight_below = (self.geometry.lap() / TIGHT).max(1);
        let taken = tight_below.saturating_sub(self.free_slots());
        let price = FIRST_PRICE + (LAST_PRICE - FIRST_PRICE) * taken / tight_below;
        let throttle = &mut self.throttle;
        // A flush closes a segment with places left, and what that wastes is paid for as well.
        let wasted = position.saturating_sub(throttle.charged).min(u64::from(PLACES));
        throttle.charged = throttle.charged.max(position) + to_u64(blocks);
        let start = throttle.next.max(now).min(now + LONGEST);
        let places = u32::try_from(to_u64(blocks) + wasted).unwrap_or(u32::MAX);
        let price = u32::try_from(price).unwrap_or(u32::MAX);
        throttle.next = start + throttle.per_place * places / 256 * price;
        start - now
    }

    /// How many places the log has taken since its beginning.
    fn position(&self) -> u64 {
        let in_open = self.open.as_ref().map_or(u64::from(PLACES), |open| u64::from(open.length));
        self.newest.minus(1).0 * u64::from(PLACES) + in_open
    }
}
