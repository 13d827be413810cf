//! Cache devices as a killed process leaves them after it flushed all writes.

use crate::damage_script::VOLUME_BYTES;
use crate::{cache_bytes, noise};
use libwb::cache::{Cache, OpenOptions, Tunables, WritebackOrder};
use libwb::device::sim::Simulation;
use libwb::device::{Device, MemDevice};
use libwb::format::{SECTOR_BYTES, Sector, SuperblockExtension, to_usize};
use libwb::log::format_device::create;
use std::cell::{Cell, RefCell};
use std::sync::{Arc, LazyLock};
use uuid::Uuid;

/// Segments of these caches.
const SEGMENTS: u32 = 6;

/// A cache with the extension after its process was killed.
pub struct Crashed {
    /// What was done to it.
    pub name: &'static str,
    /// The cache device.
    pub cache: Vec<u8>,
    /// The backing device.
    pub backing: Vec<u8>,
    /// The content of the volume, all flushed.
    pub volume: Vec<u8>,
}

/// All crashed caches. Those with small segments come first.
pub static CRASHED: LazyLock<Vec<Crashed>> = LazyLock::new(|| {
    let start = CrashedBuilder::start;
    vec![
        start("many flushes, one segment").many_flushes(),
        start("more than a lap, and flushes that close a segment").lap(),
        start("drained, and gone on").drained(),
        start("closed in order, and gone on").closed(),
        start("many flushes, two segments").two_segments(),
        start("one flush, two segments").one_flush(),
    ]
});

struct CrashedBuilder {
    name: &'static str,
    simulation: Simulation,
    cache: Arc<MemDevice>,
    backing: Arc<MemDevice>,
    volume: RefCell<Vec<u8>>,
    /// Writes so far.
    writes: Cell<u64>,
}

impl CrashedBuilder {
    fn start(name: &'static str) -> CrashedBuilder {
        let size = cache_bytes(SEGMENTS);
        let builder = CrashedBuilder {
            name,
            simulation: Simulation::new(1),
            cache: Arc::new(MemDevice::new("cache", size)),
            backing: Arc::new(MemDevice::new("backing", VOLUME_BYTES)),
            volume: RefCell::new(vec![0; to_usize(VOLUME_BYTES)]),
            writes: Cell::new(0),
        };
        let device: Device = builder.cache.clone();
        let extension = SuperblockExtension::new(Uuid::from_u128(9), size);
        builder.run(create(&device, Some(&extension), |_| ())).expect("a cache");
        builder
    }

    fn run<T>(&self, future: impl Future<Output = T>) -> T {
        self.simulation.block_on(future).expect("an end")
    }

    fn open(&self, order: WritebackOrder) -> Cache {
        let runtime = Arc::new(self.simulation.runtime().clone());
        let tunables = Tunables { writeback_order: order, ..Tunables::default() };
        self.run(Cache::open(
            self.cache.clone(),
            self.backing.clone(),
            runtime,
            OpenOptions::serve().tunables(tunables),
        ))
        .expect("a cache")
    }

    fn write(&self, cache: &Cache, sector: u64, sectors: u64) {
        self.writes.update(|nth| nth + 1);
        let data = noise(self.writes.get(), sectors * 512);
        self.run(cache.write(Sector(sector), &data)).expect("a write");
        let at = to_usize(sector) * SECTOR_BYTES;
        self.volume.borrow_mut()[at..][..data.len()].copy_from_slice(&data);
    }

    fn flush(&self, cache: &Cache) {
        self.run(cache.flush()).expect("a flush");
    }

    fn write_and_flush(&self, cache: &Cache, sector: u64, sectors: u64) {
        self.write(cache, sector, sectors);
        self.flush(cache);
    }

    /// Kills the process.
    fn crashed(self, cache: Cache) -> Crashed {
        drop(cache);
        self.simulation.kill_tasks();
        let (cache, backing) = (self.cache.content(), self.backing.content());
        Crashed { name: self.name, cache, backing, volume: self.volume.into_inner() }
    }

    /// Blocks written whole, in part, and again.
    fn many_flushes(self) -> Crashed {
        let cache = self.open(WritebackOrder::Sorted);
        cache.pause();
        for nth in 0..12 {
            self.write_and_flush(&cache, 400 + 8 * nth, 8);
        }
        for nth in 0..4 {
            self.write_and_flush(&cache, 410 + 16 * nth, 3);
        }
        for nth in 0..4 {
            self.write_and_flush(&cache, 400 + 8 * nth, 8);
        }
        self.crashed(cache)
    }

    /// In strict order, a flush closes a segment.
    fn lap(self) -> Crashed {
        let cache = self.open(WritebackOrder::Strict);
        for round in 0..8 {
            self.write(&cache, 8 * round, 8);
            self.write(&cache, 200 + 16 * round, 16);
            self.write_and_flush(&cache, 403, 2 + round % 3);
        }
        self.run(cache.drain()).expect("a drain");
        cache.pause();
        for round in 0..4 {
            self.write(&cache, 16 * round, 8);
            self.write_and_flush(&cache, 400 + round, 4);
        }
        let status = cache.status();
        assert_eq!((status.written_back.0, status.newest.0), (8, 12), "segments");
        self.crashed(cache)
    }

    fn drained(self) -> Crashed {
        let cache = self.open(WritebackOrder::Sorted);
        for nth in 0..6 {
            self.write_and_flush(&cache, 40 * nth, 8);
        }
        self.run(cache.drain()).expect("a drain");
        cache.pause();
        for nth in 0..6 {
            self.write_and_flush(&cache, 20 * nth, 5);
        }
        self.crashed(cache)
    }

    fn closed(self) -> Crashed {
        let cache = self.open(WritebackOrder::Strict);
        cache.pause();
        for nth in 0..3 {
            self.write_and_flush(&cache, 24 * nth, 8);
        }
        self.run(cache.close()).expect("an orderly end");
        let cache = self.open(WritebackOrder::Sorted);
        cache.pause();
        for nth in 0..5 {
            self.write_and_flush(&cache, 16 * nth, 8);
        }
        self.crashed(cache)
    }

    fn two_segments(self) -> Crashed {
        let cache = self.open(WritebackOrder::Sorted);
        cache.pause();
        for nth in 0..140 {
            self.write(&cache, 8 * (nth * 37 % 300), 8);
            if nth % 20 == 19 {
                self.flush(&cache);
            }
        }
        self.crashed(cache)
    }

    fn one_flush(self) -> Crashed {
        let cache = self.open(WritebackOrder::Sorted);
        cache.pause();
        self.write_and_flush(&cache, 0, 8 * 132);
        self.crashed(cache)
    }
}
