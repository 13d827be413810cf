//! The crash simulator: a seed decides a course of work, crashes and recoveries on simulated
//! devices, and an oracle judges every read by the history of the volume.

pub mod clients;
pub mod course;
pub mod devices;
pub mod exhaustive;
pub mod ledger;
pub mod module;
pub mod oracle;
pub mod real;
mod rot;
pub mod stamp;
pub mod toys;
pub mod volume;

pub use course::{Failure, Report, run, run_watched};
