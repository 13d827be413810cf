//! What the simulator puts to the test: something that makes a volume of a cache device and a
//! backing device.

use crate::recovered_view::Recover;
use futures_util::future::BoxFuture;
use libwb::cache::WriteMode;
use libwb::device::{Device, IoBuf};
use libwb::format::{Sector, SegmentId};
use libwb::runtime::Runtime;
use std::sync::Arc;

/// The outcome of an operation; errors are text, since the simulator only reports them.
pub type EngineFuture<T> = BoxFuture<'static, Result<T, String>>;

/// What to choose settings by.
#[derive(Clone, Copy, Debug, Default)]
pub struct EngineConfig {
    /// A random number.
    pub seed: u64,
    /// Whether write-back is to be in strict order.
    pub strict: bool,
    /// Where all writes go first; `None`: as the number has it, and large ones around the log.
    pub mode: Option<WriteMode>,
    /// With how many cells all that is read twice is cached; `None`: as the number has it.
    pub cells: Option<u32>,
    /// How many segments are written back at a time; `None`: as the number has it.
    pub batch: Option<u32>,
}

/// An open volume.
pub trait EngineVolume: Send + Sync {
    /// Its size in bytes.
    fn size(&self) -> u64;
    /// The newest segment of its log.
    fn newest(&self) -> SegmentId;
    /// Whether it has moved blocks that could not be written back.
    fn has_moved_blocks(&self) -> bool {
        false
    }
    /// Fills a buffer.
    fn read(&self, sector: Sector, buf: IoBuf) -> EngineFuture<IoBuf>;
    /// Writes.
    fn write(&self, sector: Sector, data: Vec<u8>) -> EngineFuture<()>;
    /// Writes, and makes that durable before it is acknowledged.
    fn write_fua(&self, sector: Sector, data: Vec<u8>) -> EngineFuture<()>;
    /// Makes so many sectors read as zeros, durably.
    fn discard(&self, sector: Sector, count: u64) -> EngineFuture<()>;
    /// Makes acknowledged writes durable.
    fn flush(&self) -> EngineFuture<()>;
    /// Brings the backing device up to date.
    fn drain(&self) -> EngineFuture<()>;
    /// Changes its settings.
    fn tune(&self, config: EngineConfig);
    /// Flushes, and ends the background tasks.
    fn close(&self) -> EngineFuture<()>;
}

/// Something that opens volumes.
pub trait Engine: Send + Sync {
    /// Whether a power cut may leave part of a block of a write that is not durable.
    fn tears_blocks(&self) -> bool {
        false
    }

    /// Opens a volume, recovering it if need be.
    fn open(
        &self,
        cache: Device,
        backing: Device,
        runtime: Arc<dyn Runtime>,
        config: EngineConfig,
    ) -> EngineFuture<Arc<dyn EngineVolume>>;

    /// What recovery makes of a log; `None` where there is none on the cache device.
    fn recovery(&self) -> Option<Recover> {
        None
    }
}
