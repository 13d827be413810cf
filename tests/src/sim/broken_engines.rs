//! Simple engines that prove that the simulator finds bugs: a slow but correct one, and others that
//! are broken in a known way.
//!
//! A simple engine keeps acknowledged writes in a queue in memory and brings them to the backing
//! device one by one, each with a flush of its own. So a power cut leaves a prefix. It does not use
//! the cache device.

use super::engine::{Engine, EngineConfig, EngineFuture, EngineVolume};
use futures_util::lock::Mutex as AsyncMutex;
use libwb::cache::Head;
use libwb::device::{Device, IoBuf};
use libwb::format::{SECTOR_BYTES, Sector, SegmentId, to_u64, to_usize};
use libwb::runtime::Runtime;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

/// What is wrong with an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// Nothing.
    None,
    /// A flush is acknowledged before anything is done.
    EarlyFlush,
    /// The backing device is never flushed.
    NoDeviceFlush,
    /// Now and then a write is acknowledged and forgotten.
    LostWrite,
    /// Now and then a read overlooks the newest write.
    StaleRead,
    /// The background task brings the newest write to the device first.
    Reorders,
    /// The last sector of a large write never reaches the device.
    ForgetsTail,
    /// The background task repeats an old write after newer ones.
    Resurrects,
    /// A flush never ends once much is queued.
    Hangs,
}

/// Opens volumes on a simple engine with this flaw.
#[derive(Clone, Copy, Debug)]
pub struct SimpleEngine(pub Flaw);

impl Engine for SimpleEngine {
    /// It writes in place.
    fn tears_blocks(&self) -> bool {
        true
    }

    fn open(
        &self,
        _cache: Device,
        backing: Device,
        runtime: Arc<dyn Runtime>,
        _taste: EngineConfig,
        _head: Option<Head>,
    ) -> EngineFuture<Arc<dyn EngineVolume>> {
        let engine = Arc::new(SimpleVolume {
            flaw: self.0,
            backing,
            queue: Mutex::default(),
            turn: AsyncMutex::new(()),
            counter: Mutex::new(0),
        });
        let (weak, clock) = (Arc::downgrade(&engine), runtime.clone());
        runtime.spawn(Box::pin(async move {
            loop {
                clock.sleep(Duration::from_millis(20)).await;
                let Some(engine) = weak.upgrade() else { return };
                engine.background().await;
            }
        }));
        Box::pin(async move {
            // What an engine that was killed had written may be in the device's volatile cache.
            engine.backing.flush().await.map_err(|e| e.to_string())?;
            Ok(Arc::new(Handle(engine)) as Arc<dyn EngineVolume>)
        })
    }
}

#[derive(Clone)]
struct Entry {
    sector: Sector,
    data: Vec<u8>,
}

struct SimpleVolume {
    flaw: Flaw,
    backing: Device,
    queue: Mutex<VecDeque<Entry>>,
    /// Held while entries move to the device, and while a read combines both.
    turn: AsyncMutex<()>,
    counter: Mutex<u32>,
}

impl SimpleVolume {
    /// True once in `n` calls for an engine with this flaw.
    fn strikes(&self, flaw: Flaw, n: u32) -> bool {
        let mut counter = self.counter.lock();
        *counter += 1;
        self.flaw == flaw && counter.is_multiple_of(n)
    }

    /// Reads the device's whole blocks that hold a range. Returns them and where the range begins
    /// in them.
    async fn blocks(&self, sector: Sector, length: usize) -> Result<(u64, IoBuf, usize), String> {
        let unit = u64::from(self.backing.block_size());
        let start = sector.bytes() / unit * unit;
        let end = (sector.bytes() + to_u64(length)).next_multiple_of(unit);
        let blocks = self.backing.read(start, IoBuf::zeroed(to_usize(end - start))).await;
        Ok((start, blocks.map_err(|e| e.to_string())?, to_usize(sector.bytes() - start)))
    }

    async fn store(&self, entry: &Entry) -> Result<(), String> {
        let mut data = &entry.data[..];
        if self.flaw == Flaw::ForgetsTail && data.len() >= 8 * SECTOR_BYTES {
            data = &data[..data.len() - SECTOR_BYTES];
        }
        let (start, mut blocks, at) = self.blocks(entry.sector, data.len()).await?;
        blocks[at..at + data.len()].copy_from_slice(data);
        self.backing.write(start, blocks.into()).await.map_err(|e| e.to_string())?;
        if self.flaw != Flaw::NoDeviceFlush {
            self.backing.flush().await.map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    async fn background(&self) {
        let _turn = self.turn.lock().await;
        let entry = match self.flaw {
            Flaw::Reorders => self.queue.lock().back().cloned(),
            _ => self.queue.lock().front().cloned(),
        };
        let Some(entry) = entry else { return };
        if self.store(&entry).await.is_err() {
            return;
        }
        if self.flaw == Flaw::Reorders {
            // Older entries for the same sectors follow it in time: put it back to be stored again.
            return;
        }
        self.queue.lock().pop_front();
        if self.strikes(Flaw::Resurrects, 3) {
            self.queue.lock().push_back(entry);
        }
    }

    async fn store_all(&self) -> Result<(), String> {
        let _turn = self.turn.lock().await;
        if self.flaw == Flaw::EarlyFlush {
            return Ok(());
        }
        if self.flaw == Flaw::Hangs && self.queue.lock().len() > 5 {
            std::future::pending::<()>().await;
        }
        let count = self.queue.lock().len();
        for _ in 0..count {
            let Some(entry) = self.queue.lock().front().cloned() else { break };
            self.store(&entry).await?;
            self.queue.lock().pop_front();
        }
        Ok(())
    }

    async fn load(&self, sector: Sector, mut buf: IoBuf) -> Result<IoBuf, String> {
        let _turn = self.turn.lock().await;
        let (_, blocks, at) = self.blocks(sector, buf.len()).await?;
        let length = buf.len();
        buf.copy_from_slice(&blocks[at..at + length]);
        let queue = self.queue.lock();
        let seen = queue.len() - usize::from(!queue.is_empty() && self.strikes(Flaw::StaleRead, 5));
        for entry in queue.iter().take(seen) {
            overlay(&mut buf, sector, entry);
        }
        Ok(buf)
    }
}

fn overlay(buf: &mut [u8], first: Sector, entry: &Entry) {
    let (start, end) = (first.bytes(), first.bytes() + to_u64(buf.len()));
    let (from, to) = (entry.sector.bytes(), entry.sector.bytes() + to_u64(entry.data.len()));
    let (low, high) = (start.max(from), end.min(to));
    if low < high {
        let source = &entry.data[to_usize(low - from)..to_usize(high - from)];
        buf[to_usize(low - start)..to_usize(high - start)].copy_from_slice(source);
    }
}

/// A handle to an engine; the background task ends with the last one.
struct Handle(Arc<SimpleVolume>);

impl EngineVolume for Handle {
    fn size(&self) -> u64 {
        self.0.backing.size()
    }

    /// Its queue is on no device.
    fn newest(&self) -> SegmentId {
        SegmentId::MAX
    }

    fn read(&self, sector: Sector, buf: IoBuf) -> EngineFuture<IoBuf> {
        let engine = self.0.clone();
        Box::pin(async move { engine.load(sector, buf).await })
    }

    fn write(&self, sector: Sector, data: Vec<u8>) -> EngineFuture<()> {
        if !self.0.strikes(Flaw::LostWrite, 20) {
            self.0.queue.lock().push_back(Entry { sector, data });
        }
        Box::pin(std::future::ready(Ok(())))
    }

    fn write_fua(&self, sector: Sector, data: Vec<u8>) -> EngineFuture<()> {
        let (written, flushed) = (self.write(sector, data), self.flush());
        Box::pin(async move { written.await.and(flushed.await) })
    }

    fn discard(&self, sector: Sector, count: u64) -> EngineFuture<()> {
        self.write_fua(sector, vec![0; to_usize(count) * SECTOR_BYTES])
    }

    fn tune(&self, _taste: EngineConfig) {}

    fn flush(&self) -> EngineFuture<()> {
        let engine = self.0.clone();
        Box::pin(async move { engine.store_all().await })
    }

    fn drain(&self) -> EngineFuture<()> {
        self.flush()
    }

    fn close(&self) -> EngineFuture<()> {
        self.flush()
    }
}
