//! `wbctl status --prometheus`: metrics in the text format of Prometheus, for node_exporter's textfile collector.

use crate::show::FAILED;
use libwb::cache::Counters;
use libwb::control::{LiveStatus, VolumeStatus};
use std::fmt::Display;
use std::io::{Result, Write};

/// A number that goes up and down: its name, what it is, and where to find it.
type Gauge = (&'static str, &'static str, fn(&LiveStatus) -> Option<f64>);

const GAUGES: [Gauge; 18] = [
    ("wb_volume_bytes", "Size of the volume.", |live| Some(live.volume_bytes as f64)),
    ("wb_log_bytes", "Size of the log.", |live| Some(live.log_bytes as f64)),
    ("wb_log_free_bytes", "Room in the log for new segments.", |live| Some(live.free_bytes as f64)),
    ("wb_dirty_bytes", "Data that is only in the cache.", |live| Some(live.dirty_bytes as f64)),
    ("wb_oldest_dirty_seconds", "For how long the oldest dirty data has been waiting.", |live| {
        live.oldest_dirty_seconds
    }),
    ("wb_used_bytes", "Data in the cache, dirty or clean.", |live| Some(live.used_bytes as f64)),
    ("wb_newest_segment", "Id of the newest segment.", |live| Some(live.newest_segment as f64)),
    ("wb_durable_segment", "Segments up to this id survive a power cut.", |live| {
        Some(live.durable_segment as f64)
    }),
    ("wb_written_back_segment", "Segments up to this id are written back.", |live| {
        Some(live.written_back_segment as f64)
    }),
    ("wb_writeback_paused", "1 while write-back is paused.", |live| Some(f64::from(u8::from(live.paused)))),
    ("wb_writeback_seconds_left", "How long write-back takes at its rate until nothing is dirty.", |live| {
        live.statistics.writeback_seconds_left
    }),
    ("wb_writeback_failing", "1 while write-back does not get on.", |live| {
        Some(f64::from(u8::from(live.writeback_error.is_some())))
    }),
    ("wb_writeback_bytes_per_second", "How fast write-back frees the log while it works.", |live| {
        live.statistics.writeback_bytes_per_second
    }),
    ("wb_cache_requests_in_flight", "Requests that the cache device has not answered yet.", |live| {
        Some(live.cache_requests_in_flight as f64)
    }),
    (
        "wb_cache_oldest_request_seconds",
        "For how long the oldest request to the cache device has waited.",
        |live| live.cache_oldest_request_seconds,
    ),
    ("wb_backing_requests_in_flight", "Requests that the backing device has not answered yet.", |live| {
        Some(live.backing_requests_in_flight as f64)
    }),
    (
        "wb_backing_oldest_request_seconds",
        "For how long the oldest request to the backing device has waited.",
        |live| live.backing_oldest_request_seconds,
    ),
    ("wb_recovery_seconds", "How long recovery took.", |live| Some(live.recovery_seconds)),
];

/// Writes the metrics of volumes.
pub(crate) fn write(volumes: &[VolumeStatus], out: &mut impl Write) -> Result<()> {
    for (name, help, state) in [
        ("wb_attached", "1 while the volume is attached.", None),
        ("wb_failed", "1 when the volume refuses writes since its cache device failed.", Some(FAILED)),
    ] {
        head(out, name, "gauge", help)?;
        for volume in volumes {
            let so = state.map_or(volume.live.is_some(), |state| volume.state == state);
            sample(out, name, &volume.name, "", u8::from(so))?;
        }
    }
    let live: Vec<(&str, &LiveStatus)> =
        volumes.iter().filter_map(|volume| Some((volume.name.as_str(), volume.live.as_ref()?))).collect();
    for (name, help, get) in GAUGES {
        head(out, name, "gauge", help)?;
        for (volume, live) in &live {
            if let Some(value) = get(live) {
                sample(out, name, volume, "", value)?;
            }
        }
    }
    for (key, help, _) in Counters::default().iter() {
        let name = format!("wb_{key}_total");
        head(out, &name, "counter", help)?;
        for (volume, live) in &live {
            sample(out, &name, volume, "", live.counters.get(key).unwrap_or(&0))?;
        }
    }
    accesses(&live, out)?;
    latencies(&live, out)
}

fn accesses(volumes: &[(&str, &LiveStatus)], out: &mut impl Write) -> Result<()> {
    let name = "wb_blocks_total";
    head(out, name, "counter", "Blocks that requests met: whether cached, in RAM, and wanted whole.")?;
    for (volume, live) in volumes {
        for met in &live.statistics.accesses {
            let labels = format!(
                ",request=\"{}\",hit=\"{}\",in_ram=\"{}\",whole=\"{}\"",
                met.request, met.hit, met.in_ram, met.whole
            );
            sample(out, name, volume, &labels, met.blocks)?;
        }
    }
    Ok(())
}

fn latencies(volumes: &[(&str, &LiveStatus)], out: &mut impl Write) -> Result<()> {
    let name = "wb_request_seconds";
    head(out, name, "histogram", "How long requests took.")?;
    for (volume, live) in volumes {
        for (request, latency) in &live.statistics.latencies {
            let request = format!(",request=\"{request}\"");
            let mut up_to = 0u64;
            for (limit, count) in latency.histogram().iter() {
                up_to = up_to.saturating_add(count);
                let limit = limit.map_or("+Inf".into(), |limit| limit.as_secs_f64().to_string());
                let labels = format!("{request},le=\"{limit}\"");
                sample(out, &format!("{name}_bucket"), volume, &labels, up_to)?;
            }
            sample(out, &format!("{name}_sum"), volume, &request, latency.total_seconds)?;
            sample(out, &format!("{name}_count"), volume, &request, latency.requests)?;
        }
    }
    Ok(())
}

fn head(out: &mut impl Write, name: &str, kind: &str, help: &str) -> Result<()> {
    writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}")
}

/// One line. A volume's name has no character that would have to be escaped.
fn sample(out: &mut impl Write, name: &str, volume: &str, labels: &str, value: impl Display) -> Result<()> {
    writeln!(out, "{name}{{volume=\"{volume}\"{labels}}} {value}")
}
