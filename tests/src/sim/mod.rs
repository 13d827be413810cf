//! The crash simulator. A seed decides a scenario of work, crashes and recoveries on simulated
//! devices. An oracle judges every read by the history of the volume.

pub mod backing_history;
mod bit_flips;
pub mod broken_engines;
pub mod clients;
pub mod devices;
pub mod engine;
pub mod exhaustive;
pub mod module;
pub mod network;
pub mod oracle;
pub mod process;
pub mod real;
pub mod scenario;
pub mod seeds;
pub mod stamp;
pub mod unanswered;

pub use scenario::{Failure, SeedReport, run, run_over_network, run_watched};
