//! Requests: futures that their callers poll.

mod discard;
mod flush;
pub(super) mod pinned;
mod range_lock;
mod read;
mod reservation;
mod write;
mod write_around;

pub(super) use discard::Space;
