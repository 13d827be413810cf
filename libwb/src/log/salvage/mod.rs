//! Going on with a corrupt log, and repairing one that is not.
//!
//! Both work on the cache device alone and end with a log that recovery accepts as it is. A way on
//! gives something up, so it is taken only when it is asked for by name; a repair gives up nothing.
//! A slot that must change becomes an empty segment (length 0, which the kernel module takes as
//! well) with the id that belongs there, holds what is left of that segment, or is erased where the
//! log has not reached.
//!
//! The order of the writes makes an interruption harmless: until the last of them the log is
//! refused as before, and a second attempt finds the same; or recovery already makes of it what it
//! would make of it in the end. First comes a page of the superblock extension that tells the log
//! from an older copy of it; then the record of what is written back, since it follows from
//! segments that may go. When the log is sound, and what it covers is durable, those segments go
//! that would mislead the kernel module. The clean mark comes last.

mod mode;
mod plan;
mod scanned;
mod slot_plan;
mod surviving_blocks;
#[cfg(test)]
mod tests;
mod text;

pub use mode::SalvageMode;
pub use plan::{Certainty, GivenUp, Plan};
pub use scanned::Scanned;
pub use text::{Summary, salvage_advice, salvage_options, segments};
