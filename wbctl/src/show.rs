//! `wbctl list` and `wbctl status`.

use crate::config::{RecordedVolume, unknown};
use crate::leftovers::Leftovers;
use crate::volume_paths::{VolumeName, all_names};
use crate::{client, dm, prometheus};
use anyhow::{Result, bail};
use libwb::cache::{TunableValue, Tunables};
use libwb::cli::{
    self, Exit, Output, human_rate, human_size, human_time, percent, properties, table,
};
use libwb::control::{AskError, BackingLink, LiveStatus, VolumeState, VolumeStatus, ratio};
use libwb::folders;
use std::io::{ErrorKind, Write};

/// How many stuck blocks the status names.
const NAMED: usize = 4;

#[derive(clap::Args)]
pub(crate) struct StatusArgs {
    /// The volumes
    #[arg(value_name = "NAME")]
    names: Vec<VolumeName>,
    /// Print one JSON object per volume and line instead of text
    #[arg(long, group = "form")]
    json: bool,
    /// Print the numbers that `dmsetup status` shows for the kernel module, in its order, one line
    /// per volume
    #[arg(long, group = "form", requires = "names")]
    dm: bool,
    /// Print metrics for Prometheus, also for detached volumes; for example for the textfile
    /// collector of node_exporter
    #[arg(long, group = "form")]
    prometheus: bool,
}

/// The state of a volume, attached or not; `None` if nothing is known of it. A problem with one
/// volume becomes its state, and does not hide the others.
fn volume(name: &VolumeName) -> Result<Option<VolumeStatus>> {
    let (mut state, mut message) = (VolumeState::Detached, None);
    let is_running = match name.is_running() {
        // An ordinary user cannot tell this for any volume.
        Err(error) if is_forbidden(&error) => return Err(error),
        Err(error) => {
            (state, message) = (VolumeState::NotAnswering, Some(format!("{error:#}")));
            None
        }
        Ok(is_running) => Some(is_running),
    };
    if is_running == Some(true) {
        // The daemon does not answer while it recovers or ends.
        match client::look(name) {
            Ok(status) => return Ok(Some(status)),
            Err(AskError::Silent(pid)) => {
                (state, message) = (VolumeState::NotAnswering, Some(client::silence(name, pid)))
            }
            Err(AskError::NotThere | AskError::Gone) => state = VolumeState::StartingOrStopping,
            Err(error) => (state, message) = (VolumeState::NotAnswering, Some(error.to_string())),
        }
    } else if is_running == Some(false) {
        let left = Leftovers::of(name);
        message = left.message();
        if left.has_crashed {
            state = VolumeState::Crashed;
        }
    }
    let recorded = match RecordedVolume::load(name) {
        Ok(recorded) => recorded,
        Err(error) => {
            if state == VolumeState::Detached {
                state = VolumeState::UnreadableRecord;
            }
            let why = format!("{error:#}");
            message = Some(message.map_or(why.clone(), |message| format!("{message}; {why}")));
            None
        }
    };
    if recorded.is_none() && state == VolumeState::Detached && message.is_none() {
        return Ok(None);
    }
    let (cache, backing) =
        recorded.map(|volume| (volume.cache, volume.backing)).unwrap_or_default();
    let name = name.to_string();
    Ok(Some(VolumeStatus { name, state, message, cache, backing, ..VolumeStatus::default() }))
}

fn is_forbidden(error: &anyhow::Error) -> bool {
    let cause = error.root_cause().downcast_ref::<std::io::Error>();
    // An owner that wb does not trust is another error, without an errno.
    cause.is_some_and(|cause| {
        cause.kind() == ErrorKind::PermissionDenied && cause.raw_os_error().is_some()
    })
}

/// All volumes. It asks their daemons at the same time, so that several silent ones take no longer
/// than one.
fn volumes() -> Result<Vec<VolumeStatus>> {
    if folders::are_own() {
        cli::complain("wbctl", "these are your own volumes; root sees those of the system");
    }
    let names = all_names()?;
    let volumes: Vec<_> = std::thread::scope(|scope| {
        let asked: Vec<_> = names.iter().map(|name| scope.spawn(|| volume(name))).collect();
        asked
            .into_iter()
            .map(|asked| asked.join().unwrap_or_else(|_| bail!("a thread failed")))
            .collect()
    });
    volumes.into_iter().filter_map(Result::transpose).collect()
}

pub(crate) fn list(json: bool, out: &mut Output) -> Result<()> {
    let volumes = volumes()?;
    if json {
        return print_json(&volumes, out);
    }
    client::warn_of_untold(&volumes);
    if volumes.is_empty() {
        writeln!(out, "no volumes; see wbctl create")?;
        return Ok(());
    }
    let header = ["NAME", "STATE", "DEVICE", "SIZE", "DIRTY", "CACHE", "BACKING"];
    let mut table = table(header, &["NAME", "STATE", "DEVICE", "CACHE", "BACKING"]);
    for v in &volumes {
        let size = |pointer: &str, of: fn(&LiveStatus) -> u64| {
            let told = v.live.as_ref().filter(|_| v.tells(pointer));
            told.map_or("-".into(), |live| human_size(of(live)))
        };
        table.row([
            v.name.clone(),
            v.state.to_string(),
            v.device.as_ref().map_or("-".into(), |device| device.display().to_string()),
            size("/live/volume_bytes", |live| live.volume_bytes),
            size("/live/dirty_bytes", |live| live.dirty_bytes),
            v.cache.display().to_string(),
            v.backing.to_string(),
        ]);
    }
    writeln!(out, "{table}")?;
    for volume in &volumes {
        if let Some(message) = &volume.message {
            out.text(&format!("{}: {}: {message}", volume.name, volume.state), "  ")?;
        }
    }
    Ok(())
}

fn print_json(volumes: &[VolumeStatus], out: &mut Output) -> Result<()> {
    for volume in volumes {
        out.json(&volume.to_json()?)?;
    }
    Ok(())
}

/// Shows volumes. The exit code tells the worst state of the named volumes.
pub(crate) fn status(args: &StatusArgs, out: &mut Output) -> Result<Exit> {
    let (volumes, all_known) = asked(args)?;
    if args.prometheus {
        prometheus::write(&volumes, out)?;
        return Ok(if all_known { Exit::Done } else { Exit::Failed });
    }
    if args.dm {
        print_dm(&volumes, out)?;
    } else if args.json {
        print_json(&volumes, out)?;
    } else {
        print_all(&volumes, args.names.is_empty(), out)?;
    }
    if args.names.is_empty() {
        return Ok(Exit::Done);
    }
    let unknown = (!all_known).then_some(Exit::Failed);
    let exits = volumes.iter().map(|volume| exit_code(&volume.state)).chain(unknown);
    let worst = exits.max_by_key(|exit| match *exit {
        Exit::Done => 0,
        Exit::NotAttached => 1,
        Exit::Degraded => 2,
        Exit::VolumeFailed => 3,
        _ => 4,
    });
    Ok(worst.unwrap_or(Exit::Done))
}

/// The exit code of `wbctl status NAME` for a state.
fn exit_code(state: &VolumeState) -> Exit {
    match state {
        VolumeState::Failed | VolumeState::NotAnswering => Exit::VolumeFailed,
        VolumeState::Degraded => Exit::Degraded,
        VolumeState::Detached | VolumeState::Crashed | VolumeState::StartingOrStopping => {
            Exit::NotAttached
        }
        VolumeState::UnreadableRecord => Exit::Failed,
        // A newer daemon may report other states.
        _ => Exit::Done,
    }
}

/// The named volumes, and whether all of them are known. It reports an unknown name, and continues
/// with the others. Without names: all volumes that have anything to report.
fn asked(args: &StatusArgs) -> Result<(Vec<VolumeStatus>, bool)> {
    let (mut named, mut all_known) = (Vec::new(), true);
    for name in &args.names {
        match volume(name)? {
            Some(volume) => named.push(volume),
            None => {
                cli::complain("wbctl", format!("{:#}", unknown(name)));
                all_known = false;
            }
        }
    }
    if !args.names.is_empty() {
        return Ok((named, all_known));
    }
    let mut volumes = volumes()?;
    if !args.prometheus {
        volumes.retain(|volume| volume.state != VolumeState::Detached || volume.message.is_some());
    }
    Ok((volumes, true))
}

fn print_all(volumes: &[VolumeStatus], all: bool, out: &mut Output) -> Result<()> {
    client::warn_of_untold(volumes);
    if volumes.is_empty() && all {
        writeln!(out, "no volume is attached; see wbctl list")?;
    }
    // For a named volume with an unreadable record, there is nothing to show but the error.
    let is_error = |volume: &VolumeStatus| !all && volume.state == VolumeState::UnreadableRecord;
    for volume in volumes.iter().filter(|volume| is_error(volume)) {
        let why = volume.message.as_deref().unwrap_or_default();
        cli::complain("wbctl", format!("{}: {why}", volume.state));
    }
    for (nth, volume) in volumes.iter().filter(|volume| !is_error(volume)).enumerate() {
        if nth > 0 {
            writeln!(out)?;
        }
        print_status(volume, out)?;
    }
    Ok(())
}

fn print_dm(volumes: &[VolumeStatus], out: &mut Output) -> Result<()> {
    client::warn_of_untold(volumes);
    for volume in volumes {
        match &volume.live {
            Some(live) => writeln!(out, "{}", dm::line(live))?,
            None => cli::complain(
                "wbctl",
                format!(
                    "volume '{0}' is not attached; attach it with: wbctl attach {0}",
                    volume.name
                ),
            ),
        }
    }
    Ok(())
}

fn print_status(volume: &VolumeStatus, out: &mut Output) -> Result<()> {
    let mut table = properties();
    let mut row = |key: &str, value: String| table.row([key.to_string(), value]);
    row("volume", volume.name.clone());
    row("state", volume.state.to_string());
    if let Some(message) = &volume.message {
        row("why", message.clone());
    }
    row("device", volume.device.as_ref().map_or("-".into(), |device| device.display().to_string()));
    row("cache device", volume.cache.display().to_string());
    row("backing device", volume.backing.to_string());
    if let Some(live) = &volume.live {
        row(
            "size",
            format!("{}, sectors of {} bytes", human_size(live.volume_bytes), live.sector_size),
        );
        if let Some(clients) = live.clients {
            row("NBD clients", clients.to_string());
        }
        data_rows(live, &mut row);
        writeback_rows(&volume.name, live, &mut row);
        work_rows(live, &mut row);
        for (key, value) in &live.tunables {
            row(key, format!("{value} {}", Tunables::unit(key)).trim_end().into());
        }
    }
    if volume.state == VolumeState::Detached {
        row("dirty", format!("not known while detached; see wbcheck {}", volume.cache.display()));
    }
    writeln!(out, "{table}")?;
    Ok(())
}

/// The rows that tell where the data is.
fn data_rows(live: &LiveStatus, row: &mut impl FnMut(&str, String)) {
    let age = live.oldest_dirty_seconds.map(|age| format!(", the oldest for {}", human_time(age)));
    let dirty = human_size(live.dirty_bytes);
    row("dirty", format!("{dirty} only in the cache{}", age.unwrap_or_default()));
    row("used", format!("{} in the cache, dirty or clean", human_size(live.used_bytes)));
    row(
        "log",
        format!(
            "{} of {} free ({})",
            human_size(live.free_bytes),
            human_size(live.log_bytes),
            percent(ratio(live.free_bytes, live.log_bytes))
        ),
    );
    row(
        "segments",
        format!(
            "newest {}, durable to {}, written back to {}",
            live.newest_segment, live.durable_segment, live.written_back_segment
        ),
    );
}

/// The rows about write-back.
fn writeback_rows(name: &str, live: &LiveStatus, row: &mut impl FnMut(&str, String)) {
    let count = |key: &str| live.counters.get(key).copied().unwrap_or(0);
    let state = match &live.writeback_error {
        Some(error) => format!("makes no progress, trying again: {error}"),
        None if live.paused => {
            let still =
                if live.writing_back { ", but a batch or a drain is still finishing" } else { "" };
            format!("paused{still}; to resume it: wbctl resume {name}")
        }
        None if live.dirty_bytes == 0 => "nothing to do".into(),
        None if live.tunables.get("writeback_threshold") == Some(&TunableValue::Number(0)) => {
            "off (writeback_threshold=0), until the log is nearly full".into()
        }
        None => "under way, or waiting for a quiet time".into(),
    };
    row("write-back", state);
    if let Some(stuck) = &live.stuck {
        let named =
            stuck.first.iter().take(NAMED).map(u64::to_string).collect::<Vec<_>>().join(", ");
        let more = if stuck.first.len() > NAMED { ", ..." } else { "" };
        row(
            "STUCK",
            format!(
                "{} that the backing device does not take, {} lost on the cache device; at byte \
                 {named}{more} of the volume: {}",
                cli::count(stuck.refused, "block"),
                stuck.lost,
                stuck.error
            ),
        );
    }
    let statistics = &live.statistics;
    let left = statistics.writeback_seconds_left.filter(|_| live.dirty_bytes > 0);
    let left = left.map(|left| format!(", {} left", human_time(left))).unwrap_or_default();
    let rate = statistics.writeback_bytes_per_second;
    let rate = rate.map(|rate| format!("{} while it works{left}", human_rate(rate)));
    row("write-back rate", rate.unwrap_or("-".into()));
    row("written back", human_size(count("written_back_bytes")));
    let batches = match count("writeback_errors") {
        1 => "1 batch".into(),
        n => format!("{n} batches"),
    };
    let reads = cli::count(count("cache_read_errors"), "read");
    row("errors", format!("{batches} of write-back, {reads} of the cache device"));
    let asked = [
        ("cache", live.cache_requests_in_flight, live.cache_oldest_request_seconds),
        ("backing", live.backing_requests_in_flight, live.backing_oldest_request_seconds),
    ];
    for (device, requests, oldest) in asked {
        let oldest =
            oldest.map(|age| format!(", the oldest for {}", human_time(age))).unwrap_or_default();
        row(&format!("requests to {device}"), format!("{requests} in flight{oldest}"));
    }
    if let Some(link) = &live.backing_link {
        row("link to backing", in_words(link));
    }
    if let Some(failure) = &live.failure {
        row("FAILED", format!("writes are refused: {failure}"));
    }
}

fn in_words(link: &BackingLink) -> String {
    let state = match link.down_seconds {
        Some(time) => format!("down for {}", human_time(time)),
        None => format!("up, {}", cli::count(link.connections, "connection")),
    };
    let waiting = cli::count(link.waiting, "request");
    let reconnects = match link.reconnects {
        0 => String::new(),
        1 => ", was lost once".into(),
        times => format!(", was lost {times} times"),
    };
    let unflushed = human_size(link.unflushed_bytes);
    format!("{state}, {waiting} waiting, {unflushed} not flushed{reconnects}")
}

/// The rows about the activity since the counters were reset.
fn work_rows(live: &LiveStatus, row: &mut impl FnMut(&str, String)) {
    let count = |key: &str| live.counters.get(key).copied().unwrap_or(0);
    let requests = |key: &str| cli::count(count(key), "request");
    let statistics = &live.statistics;
    row("counted for", human_time(statistics.seconds));
    row("reads", format!("{}, {}", requests("reads"), human_size(count("read_bytes"))));
    row("read from backing", human_size(count("backing_read_bytes")));
    row("writes", format!("{}, {}", requests("writes"), human_size(count("write_bytes"))));
    row("around the cache", human_size(count("direct_write_bytes")));
    row("flushes", requests("flushes"));
    row("discarded", human_size(count("discarded_bytes")));
    row(
        "hits",
        format!(
            "{} of the blocks read, {} of those written",
            percent(statistics.read_hit_ratio),
            percent(statistics.write_hit_ratio)
        ),
    );
    let amplification = statistics.write_amplification.map_or("-".into(), |ratio| {
        format!("{ratio:.2} bytes to the cache device per byte written")
    });
    row("write amplification", amplification);
    for (request, latency) in &statistics.latencies {
        let time = |seconds: Option<f64>| seconds.map_or("-".into(), human_time);
        let [p50, p99, p999] =
            [latency.p50_seconds, latency.p99_seconds, latency.p999_seconds].map(time);
        row(&format!("{request} latency"), format!("p50 {p50}, p99 {p99}, p99.9 {p999}"));
    }
    let read = human_size(live.recovery_bytes);
    row("recovery", format!("{}, {read} read", human_time(live.recovery_seconds)));
    row("daemon", format!("process {}, its server process {}", live.pid, live.server_pid));
    let death = match live.outlives_server {
        true => "another server goes on, and nothing acknowledged is lost",
        false => "the volume fails (the kernel cannot hand requests to another server)",
    };
    row("if the server dies", death.into());
}

#[cfg(test)]
mod tests {
    use super::*;
    use libwb::control::by_name;

    #[test]
    fn every_number_that_can_be_tuned_has_a_unit() {
        for (key, value) in by_name(&Tunables::default()) {
            let is_number = matches!(value, TunableValue::Number(_));
            assert_eq!(!Tunables::unit(&key).is_empty(), is_number, "{key}");
        }
    }
}
