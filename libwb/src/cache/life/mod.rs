//! How a cache begins and ends.

mod close;
mod kernel_compat;
mod mixture;
pub(super) mod open;
pub(super) mod options;
mod replay;
mod resume;
