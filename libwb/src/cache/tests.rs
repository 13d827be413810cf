//! The engine on devices in memory. Crashes are the simulator's business; here it is the plain behaviour.

use super::{Cache, Tunables};
use crate::device::{Device, IoBuf, MemDevice};
use crate::format::{
    SEGMENT_BYTES, SUPERBLOCK_REGION_BYTES, Sector, encode_superblock_block, to_u64, to_usize,
};
use crate::reactor::Reactor;
use std::sync::Arc;

struct Rig {
    reactor: Reactor,
    cache: Arc<MemDevice>,
    backing: Arc<MemDevice>,
}

impl Rig {
    fn new(segments: u64, backing_blocks: usize) -> Rig {
        let mut content = vec![0; to_usize(SUPERBLOCK_REGION_BYTES + segments * to_u64(SEGMENT_BYTES))];
        encode_superblock_block(content.first_chunk_mut().unwrap());
        let old: Vec<u8> = (0..backing_blocks * 8).flat_map(|sector| stamp(sector, 0)).collect();
        Rig {
            reactor: Reactor::start().unwrap(),
            cache: Arc::new(MemDevice::with_content("cache", content)),
            backing: Arc::new(MemDevice::with_content("backing", old)),
        }
    }

    fn open(&self) -> Cache {
        let (cache, backing): (Device, Device) = (self.cache.clone(), self.backing.clone());
        let runtime = Arc::new(self.reactor.handle().clone());
        self.reactor.block_on(Cache::open(cache, backing, runtime, Tunables::default())).unwrap()
    }

    fn write(&self, cache: &Cache, sector: usize, count: usize, version: u8) {
        let data: Vec<u8> = (sector..sector + count).flat_map(|sector| stamp(sector, version)).collect();
        self.reactor.block_on(cache.write(Sector(to_u64(sector)), &data)).unwrap();
    }

    fn check(&self, cache: &Cache, sector: usize, versions: &[u8]) {
        let buf = IoBuf::zeroed(versions.len() * 512);
        let data = self.reactor.block_on(cache.read(Sector(to_u64(sector)), buf)).unwrap();
        let found: Vec<u8> = data.chunks(512).map(|sector| sector[8]).collect();
        assert_eq!(found, versions);
        for (nth, bytes) in data.chunks(512).enumerate() {
            assert_eq!(bytes, stamp(sector + nth, versions[nth]));
        }
    }
}

fn stamp(sector: usize, version: u8) -> [u8; 512] {
    let mut bytes = [version; 512];
    bytes[..8].copy_from_slice(&to_u64(sector).to_le_bytes());
    bytes
}

#[test]
fn a_read_composes_ram_cache_and_backing_per_sector() {
    let rig = Rig::new(8, 64);
    let cache = rig.open();
    rig.write(&cache, 2, 2, 1);
    rig.reactor.block_on(cache.flush()).unwrap();
    rig.write(&cache, 3, 2, 2);
    rig.check(&cache, 0, &[0, 0, 1, 2, 2, 0, 0, 0, 0, 0]);
    rig.reactor.block_on(cache.flush()).unwrap();
    rig.check(&cache, 0, &[0, 0, 1, 2, 2, 0, 0, 0, 0, 0]);
    rig.reactor.block_on(cache.drain()).unwrap();
    rig.check(&cache, 1, &[0, 1, 2, 2, 0]);
    rig.write(&cache, 0, 1, 3);
    rig.check(&cache, 0, &[3, 0, 1, 2, 2, 0, 0, 0, 0]);
    rig.reactor.block_on(cache.close()).unwrap();
}

#[test]
fn what_was_flushed_is_there_after_reopening_and_a_drain_leaves_it_on_the_backing_device() {
    let rig = Rig::new(3, 512);
    let cache = rig.open();
    for round in 1..=4u8 {
        for at in (0..4000).step_by(37) {
            rig.write(&cache, at, 1 + at % 23, round);
        }
        rig.reactor.block_on(cache.flush()).unwrap();
    }
    let before = rig.reactor.block_on(cache.read(Sector(0), IoBuf::zeroed(512 * 4096))).unwrap();
    rig.reactor.block_on(cache.close()).unwrap();
    let cache = rig.open();
    let after = rig.reactor.block_on(cache.read(Sector(0), IoBuf::zeroed(512 * 4096))).unwrap();
    assert!(before[..] == after[..]);
    rig.reactor.block_on(cache.drain()).unwrap();
    assert_eq!(cache.status().dirty_blocks, 0);
    rig.reactor.block_on(cache.close()).unwrap();
    assert!(before[..] == rig.backing.content()[..]);
}

#[test]
fn requests_outside_the_volume_are_refused() {
    let rig = Rig::new(1, 2);
    let cache = rig.open();
    assert!(rig.reactor.block_on(cache.write(Sector(15), &[0; 1024])).is_err());
    assert!(rig.reactor.block_on(cache.write(Sector(u64::MAX), &[0; 512])).is_err());
    assert!(rig.reactor.block_on(cache.write(Sector(0), &[0; 511])).is_err());
    assert!(rig.reactor.block_on(cache.read(Sector(16), IoBuf::zeroed(512))).is_err());
    rig.reactor.block_on(cache.close()).unwrap();
    assert!(rig.reactor.block_on(cache.write(Sector(0), &[0; 512])).is_err());
}
