//! The time that a modelled hard disk needs for write-back under the engine's policy and under the
//! kernel module's. The module's policy is modelled here: it takes the oldest 32 segments at a
//! time, sorts their blocks and merges neighbours.

use crate::Options;
use crate::model_disk::{ModelDisk, QUEUE};
use crate::report::{Goal, Round, Row, Table};
use crate::setup;
use crate::virtual_time::VirtualTime;
use anyhow::{Context, Result};
use fastrand::Rng;
use futures_util::{StreamExt, stream};
use libwb::device::{BlockDevice, Device, IoBuf, MemDevice};
use libwb::format::{BLOCK_BYTES, BlockNo, PLACES, SEGMENT_BYTES, to_u64, to_usize};
use libwb::runtime::Runtime;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// What is written to the log.
const WRITTEN_BYTES: u64 = 1 << 30;
const DISK_BYTES: u64 = 1 << 40;
const DISK_BLOCKS: u64 = DISK_BYTES / BLOCK_BYTES as u64;
/// Twice the written data: write-back begins when half of the log is dirty.
const LOG_BYTES: u64 = 2 * WRITTEN_BYTES + (64 << 20);
/// What the module takes at a time.
const MODULE_BATCH: usize = 32;
/// The longest write of either policy.
const RUN_BLOCKS: u64 = (1 << 20) / BLOCK_BYTES as u64;

/// Measures each set once: the result is the same each time.
pub(crate) fn measure(_options: &Options) -> Result<Vec<Table>> {
    type Set = (&'static str, Goal, fn(u64) -> Vec<BlockNo>);
    let sets: [Set; 4] = [
        ("uniform", Goal::AtMost(0.6), uniform),
        ("Zipf, exponent 1", Goal::None, zipf),
        ("filesystem-like", Goal::AtMost(0.4), filesystem),
        ("filesystem-like, with a database", Goal::AtMost(0.4), filesystem_with_database),
    ];
    let mut rows = Vec::new();
    for (name, goal, set) in sets {
        setup::check_signals()?;
        let writes = set(WRITTEN_BYTES / to_u64(BLOCK_BYTES));
        let baseline = module(&writes)?;
        rows.push(Row::new(name, goal, vec![Round { baseline, cache: engine(&writes)? }]));
    }
    Ok(vec![Table {
        title: "Write-back of 1 GiB of 4 KiB writes to a modelled disk of 1 TiB with 7200 \
                revolutions a minute"
            .into(),
        unit: "seconds of the disk's time",
        baseline: "the kernel module's policy, modelled: the oldest 32 segments at a time, sorted \
                   and merged",
        rows,
    }])
}

fn engine(writes: &[BlockNo]) -> Result<f64> {
    let time = VirtualTime::default();
    let runtime: Arc<dyn Runtime> = Arc::new(time.clone());
    let disk = ModelDisk::new(runtime.clone(), DISK_BYTES);
    let device: Device = Arc::new(MemDevice::new("cache", LOG_BYTES));
    let run = async {
        let cache = setup::new_cache(device, Arc::new(disk), runtime).await?;
        cache.pause();
        let data = [0x5a; BLOCK_BYTES];
        for block in writes {
            cache.write(block.sector(), &data).await?;
        }
        cache.flush().await?;
        let before = time.now();
        cache.drain().await?;
        let took = time.now().saturating_sub(before);
        cache.close().await?;
        anyhow::Ok(took.as_secs_f64())
    };
    time.block_on(run).context("the engine waits for an event that never comes")?
}

fn module(writes: &[BlockNo]) -> Result<f64> {
    let time = VirtualTime::default();
    let disk = ModelDisk::new(Arc::new(time.clone()), DISK_BYTES);
    let segments = segments(writes);
    let newest: HashMap<BlockNo, usize> = segments
        .iter()
        .zip(0..)
        .flat_map(|(blocks, nth)| blocks.iter().map(move |&b| (b, nth)))
        .collect();
    let run = async {
        for (batch, first) in segments.chunks(MODULE_BATCH).zip((0..).step_by(MODULE_BATCH)) {
            let of_batch = batch.iter().zip(first..).flat_map(|(blocks, nth)| {
                let newest = &newest;
                blocks.iter().copied().filter(move |block| newest[block] == nth)
            });
            let mut blocks: Vec<_> = of_batch.collect();
            blocks.sort_unstable();
            stream::iter(merged(&blocks).into_iter().map(|(start, bytes)| {
                let data = IoBuf::zeroed(bytes).into();
                disk.write(start.bytes(), data)
            }))
            .buffer_unordered(QUEUE)
            .collect::<Vec<_>>()
            .await;
        }
    };
    time.block_on(run).context("the disk waits for an event that never comes")?;
    Ok(time.now().as_secs_f64())
}

/// Which blocks each segment holds. A block that is written again while its segment is open takes
/// no second place.
fn segments(writes: &[BlockNo]) -> Vec<HashSet<BlockNo>> {
    let mut segments = vec![HashSet::new()];
    for &block in writes {
        if segments.last().is_none_or(|open| open.len() == usize::from(PLACES)) {
            segments.push(HashSet::new());
        }
        segments.last_mut().map(|open| open.insert(block));
    }
    segments
}

/// Starts and lengths in bytes of runs of neighbours.
fn merged(blocks: &[BlockNo]) -> Vec<(BlockNo, usize)> {
    let mut runs: Vec<(BlockNo, u64)> = Vec::new();
    for &block in blocks {
        match runs.last_mut() {
            Some((start, count)) if start.0 + *count == block.0 && *count < RUN_BLOCKS => {
                *count += 1
            }
            _ => runs.push((block, 1)),
        }
    }
    runs.into_iter().map(|(start, count)| (start, to_usize(count) * BLOCK_BYTES)).collect()
}

fn uniform(count: u64) -> Vec<BlockNo> {
    let mut random = Rng::with_seed(1);
    (0..count).map(|_| BlockNo(random.u64(..DISK_BLOCKS))).collect()
}

/// The nth most frequent block is written in proportion to 1/n. Neighbours in frequency are not
/// neighbours on the disk.
// A model.
#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn zipf(count: u64) -> Vec<BlockNo> {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut random = Rng::with_seed(2);
    let mut one = || {
        let uniform = random.u64(..1 << 52) as f64 / (1_u64 << 52) as f64;
        let rank = (DISK_BLOCKS as f64).powf(uniform) as u64;
        BlockNo(rank.wrapping_mul(ODD) % DISK_BLOCKS)
    };
    (0..count).map(|_| one()).collect()
}

/// Sixteen files grow at a time, 64 KiB by 64 KiB, each in a free stretch of one of 256 groups.
/// Each step also writes the group's bitmap, an inode block, and a circular journal of 128 MiB.
fn filesystem(count: u64) -> Vec<BlockNo> {
    files(count, false)
}

/// In addition, one write in ten goes anywhere into a database of 4 GiB. Write-back of these few
/// alone takes longer than that of all others.
fn filesystem_with_database(count: u64) -> Vec<BlockNo> {
    files(count, true)
}

fn files(count: u64, with_database: bool) -> Vec<BlockNo> {
    const GROUPS: u64 = 256;
    const GROUP: u64 = DISK_BLOCKS / GROUPS;
    const METADATA: u64 = 64;
    const CHUNK: u64 = 16;
    const JOURNAL: u64 = (128 << 20) / BLOCK_BYTES as u64;
    const DATABASE: u64 = (4 << 30) / BLOCK_BYTES as u64;
    let mut random = Rng::with_seed(3);
    let mut writes: Vec<BlockNo> = Vec::new();
    let mut free: Vec<u64> = (0..GROUPS).map(|group| group * GROUP + METADATA).collect();
    // For each file: where it continues, and how many chunks are left.
    let mut files = [(0, 0_u64); 16];
    let mut journal = 0;
    while to_u64(writes.len()) < count {
        let nth = to_usize(random.u64(..to_u64(files.len())));
        let file = &mut files[nth];
        if file.1 == 0 {
            // From 64 KiB to 64 MiB, small ones as often as large ones.
            let chunks = 1 << random.u64(..11);
            let start = &mut free[to_usize(random.u64(..GROUPS / 2))];
            *file = (*start, chunks);
            *start += chunks * CHUNK;
        }
        writes.extend((file.0..file.0 + CHUNK).map(BlockNo));
        *file = (file.0 + CHUNK, file.1 - 1);
        let group = file.0 / GROUP * GROUP;
        writes.extend([BlockNo(group), BlockNo(group + 1 + random.u64(..METADATA - 1))]);
        for _ in 0..3 {
            writes.push(BlockNo(DISK_BLOCKS / 2 + journal % JOURNAL));
            journal += 1;
        }
        if with_database && random.u64(..10) < 4 {
            let database = DISK_BLOCKS / 4 * 3;
            writes.extend((0..5).map(|_| BlockNo(database + random.u64(..DATABASE))));
        }
    }
    writes.truncate(to_usize(count));
    writes
}

const _: () = assert!(LOG_BYTES.is_multiple_of(SEGMENT_BYTES as u64));
