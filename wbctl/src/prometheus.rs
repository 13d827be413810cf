//! `wbctl status --prometheus`: metrics in the text format of Prometheus, for node_exporter's
//! textfile collector.

use libwb::cache::Counters;
use libwb::control::{LiveStatus, Stuck, VolumeState, VolumeStatus};
use serde_json::Value;
use std::fmt::Display;
use std::io::{Result, Write};

/// A gauge: its name, its help, and its place in the JSON of a volume. An unknown value has no
/// sample.
type Gauge = (&'static str, &'static str, &'static str);

const GAUGES: [Gauge; 23] = [
    ("wb_volume_bytes", "Size of the volume.", "/live/volume_bytes"),
    ("wb_log_bytes", "Size of the log.", "/live/log_bytes"),
    ("wb_log_free_bytes", "Room in the log for new segments.", "/live/free_bytes"),
    ("wb_dirty_bytes", "Data that is only in the cache.", "/live/dirty_bytes"),
    (
        "wb_oldest_dirty_seconds",
        "How long the oldest dirty data has been waiting.",
        "/live/oldest_dirty_seconds",
    ),
    ("wb_used_bytes", "Data in the cache, dirty or clean.", "/live/used_bytes"),
    ("wb_newest_segment", "Id of the newest segment.", "/live/newest_segment"),
    ("wb_durable_segment", "Segments up to this id survive a power cut.", "/live/durable_segment"),
    (
        "wb_written_back_segment",
        "Segments up to this id are written back.",
        "/live/written_back_segment",
    ),
    ("wb_writeback_paused", "1 while write-back is paused.", "/live/paused"),
    (
        "wb_writeback_seconds_left",
        "How long write-back will take at its current rate until nothing is dirty.",
        "/live/statistics/writeback_seconds_left",
    ),
    (
        "wb_writeback_bytes_per_second",
        "Rate of write-back while it worked, in the last minute.",
        "/live/statistics/writeback_bytes_per_second",
    ),
    (
        "wb_cache_requests_in_flight",
        "Requests that the cache device has not answered yet.",
        "/live/cache_requests_in_flight",
    ),
    (
        "wb_cache_oldest_request_seconds",
        "How long the oldest request to the cache device has been waiting.",
        "/live/cache_oldest_request_seconds",
    ),
    (
        "wb_backing_requests_in_flight",
        "Requests that the backing device has not answered yet.",
        "/live/backing_requests_in_flight",
    ),
    (
        "wb_backing_oldest_request_seconds",
        "How long the oldest request to the backing device has been waiting.",
        "/live/backing_oldest_request_seconds",
    ),
    (
        "wb_backing_link_up",
        "1 while the server of the backing device answers, 0 while the link is down.",
        "/live/backing_link/up",
    ),
    (
        "wb_backing_link_down_seconds",
        "How long ago the link to the backing device was lost.",
        "/live/backing_link/down_seconds",
    ),
    (
        "wb_backing_link_connections",
        "Connections to the server of the backing device.",
        "/live/backing_link/connections",
    ),
    (
        "wb_backing_link_requests_waiting",
        "Requests that wait for the server of the backing device or for the link.",
        "/live/backing_link/waiting",
    ),
    (
        "wb_backing_link_unflushed_bytes",
        "Data that the server of the backing device has acknowledged and may still lose.",
        "/live/backing_link/unflushed_bytes",
    ),
    ("wb_nbd_clients", "NBD connections that use the volume.", "/live/clients"),
    ("wb_recovery_seconds", "How long recovery took.", "/live/recovery_seconds"),
];

/// Writes the metrics of volumes.
pub(crate) fn write(volumes: &[VolumeStatus], out: &mut impl Write) -> Result<()> {
    states(volumes, out)?;
    let live: Vec<(&str, &LiveStatus)> = volumes
        .iter()
        .filter_map(|volume| Some((volume.name.as_str(), volume.live.as_ref()?)))
        .collect();
    let json = volumes.iter().map(|volume| Ok((volume.name.as_str(), volume.to_json()?)));
    let json: Vec<(&str, Value)> = json.collect::<Result<_>>()?;
    for (name, help, pointer) in GAUGES {
        head(out, name, "gauge", help)?;
        for (volume, json) in &json {
            match json.pointer(pointer) {
                Some(Value::Number(number)) => sample(out, name, volume, "", number)?,
                Some(Value::Bool(so)) => sample(out, name, volume, "", u8::from(*so))?,
                _ => {}
            }
        }
    }
    let name = "wb_writeback_failing";
    head(out, name, "gauge", "1 while write-back makes no progress.")?;
    for volume in volumes.iter().filter(|volume| volume.tells("/live/writeback_error")) {
        if let Some(live) = &volume.live {
            sample(out, name, &volume.name, "", u8::from(live.writeback_error.is_some()))?;
        }
    }
    stuck(volumes, out)?;
    let name = "wb_backing_link_reconnects_total";
    head(out, name, "counter", "How often the link to the backing device was lost and came back.")?;
    for (volume, live) in &live {
        if let Some(link) = &live.backing_link {
            sample(out, name, volume, "", link.reconnects)?;
        }
    }
    for (key, help, _) in Counters::default().iter() {
        let name = format!("wb_{key}_total");
        head(out, &name, "counter", help)?;
        for (volume, live) in &live {
            if let Some(count) = live.counters.get(key) {
                sample(out, &name, volume, "", count)?;
            }
        }
    }
    accesses(&live, out)?;
    latencies(&live, out)
}

/// The state of each volume. For one that does not answer, this is all.
fn states(volumes: &[VolumeStatus], out: &mut impl Write) -> Result<()> {
    let name = "wb_attached";
    head(out, name, "gauge", "1 while the volume is attached and its daemon answers.")?;
    for volume in volumes {
        sample(out, name, &volume.name, "", u8::from(volume.live.is_some()))?;
    }
    let name = "wb_failed";
    head(out, name, "gauge", "1 when the volume refuses writes because its cache device failed.")?;
    for volume in volumes {
        sample(out, name, &volume.name, "", u8::from(volume.state == VolumeState::Failed))?;
    }
    let name = "wb_state";
    head(out, name, "gauge", "1 for the state that the volume is in, 0 for the others.")?;
    for volume in volumes {
        for state in VolumeState::KNOWN {
            let label = format!(",state=\"{state}\"");
            sample(out, name, &volume.name, &label, u8::from(volume.state == state))?;
        }
    }
    Ok(())
}

/// Blocks that cannot be written back while others can.
fn stuck(volumes: &[VolumeStatus], out: &mut impl Write) -> Result<()> {
    type Get = fn(&Stuck) -> u64;
    let kinds: [(&str, &str, Get); 2] = [
        (
            "wb_refused_blocks",
            "Blocks that the backing device refuses; they stay in the cache.",
            |stuck| stuck.refused,
        ),
        ("wb_lost_blocks", "Blocks that the cache device lost; reads of them fail.", |stuck| {
            stuck.lost
        }),
    ];
    for (name, help, get) in kinds {
        head(out, name, "gauge", help)?;
        for volume in volumes.iter().filter(|volume| volume.tells("/live/stuck")) {
            if let Some(live) = &volume.live {
                sample(out, name, &volume.name, "", live.stuck.as_ref().map_or(0, get))?;
            }
        }
    }
    Ok(())
}

fn accesses(volumes: &[(&str, &LiveStatus)], out: &mut impl Write) -> Result<()> {
    let name = "wb_blocks_total";
    head(
        out,
        name,
        "counter",
        "Blocks that requests touched: whether cached, in RAM, and requested whole.",
    )?;
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
fn sample(
    out: &mut impl Write,
    name: &str,
    volume: &str,
    labels: &str,
    value: impl Display,
) -> Result<()> {
    writeln!(out, "{name}{{volume=\"{volume}\"{labels}}} {value}")
}
