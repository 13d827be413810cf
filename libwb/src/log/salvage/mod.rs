//! Salvaging a corrupt log, and repairing a sound one.
//!
//! Both change only the cache device, and leave a log that recovery accepts. A salvage gives
//! something up, so the user must ask for it by its mode. A repair gives up nothing.
//!
//! A slot that must change ends up in one of these states:
//!
//! - an empty segment with the id that belongs there (length 0, which the kernel module accepts
//!   too);
//! - the surviving blocks of the segment that belongs there;
//! - erased, if the log has not reached the slot.
//!
//! The order of the writes makes an interruption harmless. Until the last write, one of two things
//! holds: recovery refuses the log as before, and a second attempt finds the same; or recovery
//! already gives its final result. The order is:
//!
//! - A page of the superblock extension, which distinguishes the log from an older copy.
//! - The superblock record. What is written back follows from segments that may go.
//! - The slots.
//! - Once the log is sound and durable: empty segments over those that would mislead the kernel
//!   module.
//! - The page without the clean mark, if it must go.

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
