//! Requests that change data, until they are answered. If the process dies alone, the kernel hands
//! them out again to the next one.

use super::engine::EngineVolume;
use super::oracle::Oracle;
use super::stamp::{self, WriteId};
use libwb::device::sim::SimRuntime;
use libwb::format::{SECTOR_BYTES, Sector, to_usize};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// A write.
    Write,
    /// A write that is durable once it is acknowledged.
    WriteFua,
    /// A discard.
    Discard,
}

/// A request that changes data.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// What it does.
    pub change: Change,
    /// Its first sector.
    pub first: Sector,
    /// How many sectors.
    pub count: u64,
}

/// The requests that are not answered.
pub type Unanswered = Arc<Mutex<BTreeMap<WriteId, Asked>>>;

/// Where requests go, and who is told.
#[derive(Clone)]
pub struct Served {
    /// The volume.
    pub volume: Arc<dyn EngineVolume>,
    /// Who judges.
    pub oracle: Arc<Mutex<Oracle>>,
    /// What ends the process.
    pub runtime: SimRuntime,
    /// What is under way.
    pub unanswered: Unanswered,
}

impl Served {
    /// Begins a request, and carries it out.
    pub async fn begin(&self, asked: Asked) -> Result<(), String> {
        let Asked { change, first, count } = asked;
        let write = {
            let mut oracle = self.oracle.lock();
            match change {
                Change::Discard => oracle.discard_begins(first, count),
                Change::Write | Change::WriteFua => oracle.write_begins(first, count),
            }
        };
        self.unanswered.lock().insert(write, asked);
        self.carry_out(write, asked).await
    }

    /// Carries out a request, for the first time or again.
    pub async fn carry_out(&self, write: WriteId, asked: Asked) -> Result<(), String> {
        let Asked { change, first, count } = asked;
        let mut data = vec![0; to_usize(count) * SECTOR_BYTES];
        stamp::fill(&mut data, first, write);
        let result = match change {
            Change::Write => self.volume.write(first, data).await,
            Change::WriteFua => self.volume.write_fua(first, data).await,
            Change::Discard => self.volume.discard(first, count).await,
        };
        self.unless_dead().await;
        self.unanswered.lock().remove(&write);
        let newest = self.volume.newest();
        let mut oracle = self.oracle.lock();
        match change {
            Change::Write => oracle.write_ends(write, first, count, result.is_ok()),
            Change::WriteFua | Change::Discard => {
                oracle.durable_write_ends(write, first, count, result.is_ok());
            }
        }
        if result.is_ok() && change != Change::Discard {
            oracle.logged(write, first, count, newest);
        }
        result
    }

    /// The process may have died in the step that ends now. Then it answers nothing any more.
    pub async fn unless_dead(&self) {
        if self.runtime.is_halted() {
            std::future::pending::<()>().await;
        }
    }
}
