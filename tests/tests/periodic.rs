//! What is done from time to time without being asked for.

use libwb::cache::{Cache, OpenOptions, Tunables};
use libwb::device::sim::{SimDevice, Simulation};
use libwb::device::{BlockDevice, IoBuf};
use libwb::format::{
    SEGMENT_BYTES, SUPERBLOCK_REGION_BYTES, Sector, encode_superblock_block, to_usize,
};
use libwb::runtime::Runtime;
use std::sync::Arc;
use std::time::Duration;

const BYTES: usize = 12 << 10;
const STEP: Duration = Duration::from_millis(50);

fn open(simulation: &Simulation, devices: &[Arc<SimDevice>; 2], sync_data_interval: u32) -> Cache {
    let tunables = Tunables { sync_data_interval, ..Tunables::default() };
    let [cache, backing] = devices.clone();
    let opening = Cache::open(
        cache,
        backing,
        Arc::new(simulation.runtime().clone()),
        OpenOptions::serve().tunables(tunables),
    );
    let cache = simulation.block_on(opening).expect("an end").expect("a sound log");
    cache.pause();
    cache
}

/// What a power cut leaves of a write without a flush, some time later.
fn left_after(time: Duration, sync_data_interval: u32) -> Vec<u8> {
    let simulation = Simulation::new(3);
    let mut log = vec![0; to_usize(SUPERBLOCK_REGION_BYTES) + 8 * SEGMENT_BYTES];
    encode_superblock_block(log.first_chunk_mut().expect("a block"));
    let device = |name, content| Arc::new(SimDevice::new(simulation.runtime(), name, content, 512));
    let devices = [device("cache", log), device("backing", vec![0; 1 << 20])];
    let cache = open(&simulation, &devices, sync_data_interval);
    simulation
        .block_on(cache.write(Sector(8), &[7; BYTES]))
        .expect("an end")
        .expect("sound devices");
    let runtime = simulation.runtime();
    let end = runtime.now() + time;
    // In small steps: simulated time passes while tasks still have something to do.
    while runtime.now() < end {
        simulation.block_on(runtime.sleep(STEP)).expect("an end");
    }
    drop(cache);
    simulation.kill_tasks();
    let [cache, backing] = devices;
    let durable = |device: &SimDevice, name| {
        Arc::new(SimDevice::new(simulation.runtime(), name, device.durable(), device.block_size()))
    };
    let devices = [durable(&cache, "cache"), durable(&backing, "backing")];
    let cache = open(&simulation, &devices, 0);
    let read = cache.read(Sector(8), IoBuf::zeroed(BYTES));
    simulation.block_on(read).expect("an end").expect("sound devices").to_vec()
}

#[test]
fn what_nobody_flushes_is_durable_after_sync_data_interval() {
    assert!(left_after(Duration::from_secs(5), 1) == [7; BYTES]);
    assert!(left_after(Duration::from_secs(70), 60) == [7; BYTES]);
    assert!(left_after(Duration::from_secs(30), 60) == [0; BYTES], "it is not that time yet");
    assert!(left_after(Duration::from_secs(30), 0) == [0; BYTES], "0 is never");
}
