//! What a cache counts, as its daemon reports it.

use crate::cache::{Accesses, Histogram, Statistics, Status, Timed};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;

/// The statistics since the volume was attached or since `wbctl clear-stats`. `None` where nothing
/// is known yet.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct VolumeStatistics {
    /// How long that is.
    pub seconds: f64,
    /// The share of the blocks read that the cache held.
    pub read_hit_ratio: Option<f64>,
    /// Of the blocks written, the share that was in the cache.
    pub write_hit_ratio: Option<f64>,
    /// Bytes written to the cache device for each byte that was written to the volume.
    pub write_amplification: Option<f64>,
    /// The rate of write-back while it worked in the last minute, in bytes per second; `None` while
    /// it makes no progress.
    pub writeback_bytes_per_second: Option<f64>,
    /// How long write-back needs at that rate until nothing is dirty.
    pub writeback_seconds_left: Option<f64>,
    /// Blocks that requests touched, by how the cache held them, in the order of the kernel module.
    pub accesses: Vec<AccessCount>,
    /// How long requests took: `read`, `write`, `flush`.
    pub latencies: BTreeMap<String, Latency>,
}

/// How many blocks of one kind requests touched.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AccessCount {
    /// `read` or `write`.
    pub request: String,
    /// The cache held a version of the block.
    pub hit: bool,
    /// That version was in RAM, on its way to the cache device.
    pub in_ram: bool,
    /// The request covered all 4096 bytes of the block.
    pub whole: bool,
    /// How many blocks.
    pub blocks: u64,
}

/// How long requests of a kind took. A percentile is the upper limit of its bucket.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Latency {
    /// How many requests.
    pub requests: u64,
    /// Their total time.
    pub total_seconds: f64,
    /// Half of them took no longer.
    pub p50_seconds: Option<f64>,
    /// 99 of 100 took no longer.
    pub p99_seconds: Option<f64>,
    /// 999 of 1000 took no longer.
    pub p999_seconds: Option<f64>,
    /// How many took up to 1 µs, then up to 2, up to 4, and so on; the last has no limit.
    pub buckets: Vec<u64>,
}

impl Latency {
    fn new(histogram: &Histogram) -> Latency {
        let percentile = |share| histogram.per_mille(share).map(|time| time.as_secs_f64());
        Latency {
            requests: histogram.count(),
            total_seconds: histogram.total.as_secs_f64(),
            p50_seconds: percentile(500),
            p99_seconds: percentile(990),
            p999_seconds: percentile(999),
            buckets: histogram.buckets.clone(),
        }
    }

    /// The same as a histogram.
    pub fn histogram(&self) -> Histogram {
        let total = Duration::try_from_secs_f64(self.total_seconds).unwrap_or_default();
        Histogram { buckets: self.buckets.clone(), total }
    }
}

impl VolumeStatistics {
    /// The statistics of a cache.
    pub fn new(status: &Status) -> VolumeStatistics {
        let Statistics { time, counters, accesses, latencies } = &status.statistics;
        let pace = status.writeback_pace;
        let accesses = access_counts(accesses);
        let latency = |kind: Timed| (kind.name().to_string(), Latency::new(latencies.of(kind)));
        VolumeStatistics {
            seconds: time.as_secs_f64(),
            read_hit_ratio: hit_ratio(&accesses, "read"),
            write_hit_ratio: hit_ratio(&accesses, "write"),
            write_amplification: ratio(counters.cache_write_bytes, counters.write_bytes),
            writeback_bytes_per_second: pace.map(|pace| pace.bytes_per_second),
            writeback_seconds_left: pace
                .map(|pace| pace.per_block.as_secs_f64() * status.blocks_to_write_back as f64),
            accesses,
            latencies: Timed::ALL.map(latency).into(),
        }
    }
}

fn access_counts(accesses: &Accesses) -> Vec<AccessCount> {
    let count = |(access, blocks): (crate::cache::Access, u64)| AccessCount {
        request: if access.write { "write" } else { "read" }.into(),
        hit: access.hit,
        in_ram: access.in_ram,
        whole: access.whole,
        blocks,
    };
    accesses.iter().map(count).collect()
}

/// The share of the blocks touched by requests of a kind that the cache held.
pub fn hit_ratio(accesses: &[AccessCount], request: &str) -> Option<f64> {
    let of = |hits_only: bool| {
        let met = accesses.iter().filter(|met| met.request == request && (met.hit || !hits_only));
        met.fold(0u64, |sum, met| sum.saturating_add(met.blocks))
    };
    ratio(of(true), of(false))
}

/// A ratio; `None` if the whole is 0.
pub fn ratio(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}
