//! What a daemon reports about its volume.

use super::{VolumeState, VolumeStatistics};
use crate::cache::{Counters, Status, StuckBlocks, TunableValue, Tunables};
use crate::device::{LinkStatus, Pending, Place};
use crate::format::{BLOCK_BYTES, SEGMENT_BYTES, to_u64};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// A volume's state, as `wbctl status --json` prints it. Sizes are bytes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct VolumeStatus {
    /// The volume's name.
    pub name: String,
    /// The state that it is in.
    pub state: VolumeState,
    /// Why it is in that state, or what is wrong with it, if there is anything to say.
    pub message: Option<String>,
    /// The block device while attached, or the address of its NBD server.
    pub device: Option<PathBuf>,
    /// The cache device.
    pub cache: PathBuf,
    /// The backing device.
    pub backing: Place,
    /// What only the daemon knows, while attached.
    pub live: Option<LiveStatus>,
    /// What a daemon of another version did not report, as JSON pointers. These values are empty or
    /// 0 here.
    #[serde(skip)]
    pub untold: Vec<String>,
}

impl VolumeStatus {
    /// Notes what is missing in the reply that this was read from.
    pub(super) fn note_untold(&mut self, told: &Value) {
        let Ok(mut known) = serde_json::to_value(&*self) else { return };
        if let Some(Value::Object(counters)) = known.pointer_mut("/live/counters") {
            for (key, ..) in Counters::default().iter() {
                counters.entry(key).or_insert(Value::Null);
            }
        }
        missing("", told, &known, &mut self.untold);
    }

    /// Whether the daemon reported the value at a JSON pointer.
    pub fn tells(&self, pointer: &str) -> bool {
        !self.untold.iter().any(|untold| untold == pointer)
    }

    /// The status as JSON. Values that the daemon did not report are null.
    ///
    /// # Errors
    /// When a path is not UTF-8.
    pub fn to_json(&self) -> serde_json::Result<Value> {
        let mut json = serde_json::to_value(self)?;
        for pointer in &self.untold {
            if let Some(value) = json.pointer_mut(pointer) {
                *value = Value::Null;
            }
        }
        Ok(json)
    }
}

/// Finds members of `known` that are not in `told`.
fn missing(at: &str, told: &Value, known: &Value, found: &mut Vec<String>) {
    match (told, known) {
        (Value::Object(told), Value::Object(known)) => {
            for (key, known) in known {
                let at = format!("{at}/{key}");
                match told.get(key) {
                    Some(told) => missing(&at, told, known, found),
                    None => found.push(at),
                }
            }
        }
        (Value::Array(told), Value::Array(known)) => {
            for (nth, (told, known)) in told.iter().zip(known).enumerate() {
                missing(&format!("{at}/{nth}"), told, known, found);
            }
        }
        _ => {}
    }
}

/// The part of a volume's state that its daemon knows. Sizes are bytes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LiveStatus {
    /// The process of the daemon that ends the volume when it ends: the keeper.
    pub pid: u32,
    /// The process of the daemon that serves requests.
    pub server_pid: u32,
    /// Whether the volume outlives that process: another one goes on where it ended.
    pub outlives_server: bool,
    /// How many connections of NBD clients use the volume; `None` if it is not served over NBD.
    pub clients: Option<u64>,
    /// Logical sector size of the volume in bytes.
    pub sector_size: u32,
    /// Size of the volume.
    pub volume_bytes: u64,
    /// Size of the log: all its segments.
    pub log_bytes: u64,
    /// Room in the log for new segments, without waiting for write-back.
    pub free_bytes: u64,
    /// Data whose newest version is only in the cache: what the backing device lacks.
    pub dirty_bytes: u64,
    /// How long the oldest dirty data has been waiting, in seconds; `None` if that is not known.
    pub oldest_dirty_seconds: Option<f64>,
    /// Data that the cache holds, dirty or clean.
    pub used_bytes: u64,
    /// How many places for blocks the log has.
    pub places: u64,
    /// The place of the next block, counted from the log's first slot.
    pub next_place: u64,
    /// The segment of that place.
    pub current_segment: u64,
    /// The newest segment of the log.
    pub newest_segment: u64,
    /// Every segment up to this one is on the cache device, perhaps in its volatile cache.
    pub written_segment: u64,
    /// Every segment up to this one survives a power cut.
    pub durable_segment: u64,
    /// Every segment up to this one is written back.
    pub written_back_segment: u64,
    /// Requests that the cache device has not answered yet.
    pub cache_requests_in_flight: u64,
    /// How long the oldest of them has been waiting, in seconds.
    pub cache_oldest_request_seconds: Option<f64>,
    /// Requests that the backing device has not answered yet.
    pub backing_requests_in_flight: u64,
    /// How long the oldest of them has been waiting, in seconds.
    pub backing_oldest_request_seconds: Option<f64>,
    /// The link to a backing device on a server.
    pub backing_link: Option<BackingLink>,
    /// Why writes are refused, if they are.
    pub failure: Option<String>,
    /// Write-back is paused.
    pub paused: bool,
    /// Write-back is active at this moment. During a pause, that is an earlier batch, a drain, or
    /// for lack of room.
    pub writing_back: bool,
    /// Why write-back makes no progress, if it makes none.
    pub writeback_error: Option<String>,
    /// Blocks that cannot be written back while others can.
    pub stuck: Option<Stuck>,
    /// How long recovery took, in seconds.
    pub recovery_seconds: f64,
    /// How many bytes of the log recovery read.
    pub recovery_bytes: u64,
    /// Tunables by name.
    pub tunables: BTreeMap<String, TunableValue>,
    /// What has happened since the volume was attached or `wbctl clear-stats`, by name.
    pub counters: BTreeMap<String, u64>,
    /// Other statistics of that time, and ratios.
    pub statistics: VolumeStatistics,
}

/// The processes of a daemon.
#[derive(Clone, Copy, Debug)]
pub struct Processes {
    /// See [`LiveStatus::pid`].
    pub keeper: u32,
    /// See [`LiveStatus::server_pid`].
    pub server: u32,
    /// See [`LiveStatus::outlives_server`].
    pub outlives_server: bool,
}

impl LiveStatus {
    /// The status of a cache, and of the requests to its two devices, in bytes and by name.
    pub fn new(
        status: &Status,
        sector_size: u32,
        [cache, backing]: [Pending; 2],
        processes: Processes,
    ) -> LiveStatus {
        LiveStatus {
            pid: processes.keeper,
            server_pid: processes.server,
            outlives_server: processes.outlives_server,
            clients: None,
            sector_size,
            volume_bytes: status.volume_bytes,
            log_bytes: status.log_bytes,
            free_bytes: status.free_segments * to_u64(SEGMENT_BYTES),
            dirty_bytes: status.dirty_blocks * to_u64(BLOCK_BYTES),
            oldest_dirty_seconds: status.oldest_dirty.map(|age| age.as_secs_f64()),
            used_bytes: status.used_blocks * to_u64(BLOCK_BYTES),
            places: status.places,
            next_place: status.next_place,
            current_segment: status.current.0,
            newest_segment: status.newest.0,
            written_segment: status.written.0,
            durable_segment: status.durable.0,
            written_back_segment: status.written_back.0,
            cache_requests_in_flight: cache.requests,
            cache_oldest_request_seconds: cache.oldest.map(|age| age.as_secs_f64()),
            backing_requests_in_flight: backing.requests,
            backing_oldest_request_seconds: backing.oldest.map(|age| age.as_secs_f64()),
            backing_link: None,
            failure: status.failure.clone(),
            paused: status.paused,
            writing_back: status.writing_back,
            writeback_error: status.writeback_error.clone(),
            stuck: status.stuck.as_ref().map(Stuck::of),
            recovery_bytes: status.recovery_bytes,
            recovery_seconds: status.recovery_time.as_secs_f64(),
            tunables: by_name(&status.tunables),
            counters: status
                .statistics
                .counters
                .iter()
                .map(|(key, _, value)| (key.into(), value))
                .collect(),
            statistics: VolumeStatistics::new(status),
        }
    }
}

/// The link to a backing device on an NBD server.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct BackingLink {
    /// Whether it stands, and the server answers.
    pub up: bool,
    /// How many connections there are.
    pub connections: u64,
    /// How long ago it was lost, in seconds, if it has not come back.
    pub down_seconds: Option<f64>,
    /// How many requests wait for an answer or for the link.
    pub waiting: u64,
    /// How often it was lost and came back.
    pub reconnects: u64,
    /// How many bytes the server has acknowledged and may still lose. They are written again after
    /// a reconnect.
    pub unflushed_bytes: u64,
    /// Why it was lost, or cannot be made.
    pub problem: Option<String>,
}

impl From<LinkStatus> for BackingLink {
    fn from(link: LinkStatus) -> BackingLink {
        BackingLink {
            up: link.down_for.is_none(),
            connections: to_u64(link.connections),
            down_seconds: link.down_for.map(|time| time.as_secs_f64()),
            waiting: to_u64(link.waiting),
            reconnects: link.reconnects,
            unflushed_bytes: link.unflushed,
            problem: link.problem,
        }
    }
}

/// Blocks of 4096 bytes that cannot be written back while others can.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Stuck {
    /// How many the backing device refuses. They stay in the cache.
    pub refused: u64,
    /// How many the cache device lost. Reads of them fail until they are rewritten or discarded.
    pub lost: u64,
    /// Where the first of them lie on the volume, in bytes.
    pub first: Vec<u64>,
    /// Why the first one cannot be written back.
    pub error: String,
}

impl Stuck {
    fn of(stuck: &StuckBlocks) -> Stuck {
        let StuckBlocks { refused, lost, first, error } = stuck;
        Stuck { refused: *refused, lost: *lost, first: first.clone(), error: error.to_string() }
    }
}

/// Tunables by name.
pub fn by_name(tunables: &Tunables) -> BTreeMap<String, TunableValue> {
    tunables.pairs().map(|(key, value)| (key.into(), value)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_was_not_told_is_known_and_null_and_what_is_unknown_is_left_out() {
        let told = json!({
            "name": "data", "colour": "red",
            "live": {
                "pid": 7, "counters": { "writes": 3 },
                "statistics": { "accesses": [{ "hit": true }] },
            },
        });
        let mut status: VolumeStatus = serde_json::from_value(told.clone()).unwrap();
        status.note_untold(&told);
        for pointer in [
            "/state",
            "/live/dirty_bytes",
            "/live/counters/reads",
            "/live/statistics/accesses/0/blocks",
        ] {
            assert!(!status.tells(pointer), "{pointer}");
        }
        for pointer in
            ["/name", "/live/pid", "/live/counters/writes", "/live/statistics/accesses/0/hit"]
        {
            assert!(status.tells(pointer), "{pointer}");
        }
        let json = status.to_json().unwrap();
        assert_eq!((&json["live"]["pid"], &json["live"]["dirty_bytes"]), (&json!(7), &Value::Null));
    }
}
