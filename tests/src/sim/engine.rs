//! What the simulator tests: an engine that makes a volume of a cache device and a backing device.

use crate::recovered_view::Recover;
use futures_util::future::BoxFuture;
use libwb::cache::{Head, WriteMode};
use libwb::device::{Device, IoBuf};
use libwb::format::{Sector, SegmentId};
use libwb::rules::Rules;
use libwb::runtime::Runtime;
use std::sync::Arc;

/// The outcome of an operation; errors are text, since the simulator only reports them.
pub type EngineFuture<T> = BoxFuture<'static, Result<T, String>>;

/// What an engine's tunables are chosen by.
#[derive(Clone, Copy, Debug, Default)]
pub struct EngineConfig {
    /// Seeds the choice.
    pub seed: u64,
    /// Whether write-back is in strict order.
    pub strict: bool,
    /// Where all writes go first. `None`: the seed decides, and large writes may go around the log.
    pub mode: Option<WriteMode>,
    /// How many cells cache what is read twice. `None`: the seed decides.
    pub cells: Option<u32>,
    /// How many segments are written back at a time. `None`: the seed decides.
    pub batch: Option<u32>,
    /// Whether requests may wait for a lost link for only so long. The seed decides how long.
    pub impatient: bool,
}

/// An open volume.
pub trait EngineVolume: Send + Sync {
    /// Its size in bytes.
    fn size(&self) -> u64;
    /// The newest segment of its log.
    fn newest(&self) -> SegmentId;
    /// Whether the engine has moved blocks that it could not write back.
    fn has_moved_blocks(&self) -> bool {
        false
    }
    /// Fills a buffer.
    fn read(&self, sector: Sector, buf: IoBuf) -> EngineFuture<IoBuf>;
    /// Writes.
    fn write(&self, sector: Sector, data: Vec<u8>) -> EngineFuture<()>;
    /// Writes, and acknowledges only once the data is durable.
    fn write_fua(&self, sector: Sector, data: Vec<u8>) -> EngineFuture<()>;
    /// Makes a number of sectors read as zeros, durably.
    fn discard(&self, sector: Sector, count: u64) -> EngineFuture<()>;
    /// Makes acknowledged writes durable.
    fn flush(&self) -> EngineFuture<()>;
    /// Brings the backing device up to date.
    fn drain(&self) -> EngineFuture<()>;
    /// Changes its tunables.
    fn tune(&self, config: EngineConfig);
    /// Flushes, and ends the background tasks.
    fn close(&self) -> EngineFuture<()>;
}

/// Opens volumes.
pub trait Engine: Send + Sync {
    /// Whether a power cut may tear a block of a write that is not durable.
    fn tears_blocks(&self) -> bool {
        false
    }

    /// Whether it has a head of the log that outlives the process.
    fn has_head(&self) -> bool {
        false
    }

    /// The rules that it keeps.
    fn rules(&self) -> Rules {
        Rules::default()
    }

    /// Opens a volume, and recovers it if necessary. An engine that has none ignores the head.
    fn open(
        &self,
        cache: Device,
        backing: Device,
        runtime: Arc<dyn Runtime>,
        config: EngineConfig,
        head: Option<Head>,
    ) -> EngineFuture<Arc<dyn EngineVolume>>;

    /// The engine's recovery of a log; `None` if it keeps no log.
    fn recovery(&self) -> Option<Recover> {
        None
    }
}
