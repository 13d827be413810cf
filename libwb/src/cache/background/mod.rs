//! Background tasks: what the engine does beside requests.

mod admission;
mod appender;
pub(super) mod batch;
mod flusher;
mod moving;
mod policy;
mod runs;
pub(crate) mod second_look;
mod sorted;
#[cfg(test)]
mod tests;
mod writeback;
