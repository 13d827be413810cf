//! `wbctl stat`: what a volume does, a line for each interval, as iostat does it.

use crate::client;
use crate::place::Name;
use anyhow::{Result, bail};
use libwb::cli::Output;
use libwb::control::{AccessCount, LiveStatus, hit_ratio};
use std::io::Write;
use std::time::Duration;

/// Bytes of a MiB.
const MIB: f64 = 1048576.0;
/// The longest interval in seconds: a day.
const LONGEST: f64 = 86400.0;

const COLUMNS: [&str; 14] = [
    "r/s", "w/s", "f/s", "rMiB/s", "wMiB/s", "wbMiB/s", "rhit%", "dirty%", "r50us", "r99us", "w50us",
    "w99us", "f50us", "f99us",
];

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The volume
    name: Name,
    /// Print a line for each so many seconds, instead of one for all time since the counters started
    #[arg(value_parser = parse_interval)]
    interval: Option<Duration>,
    /// End after so many lines
    count: Option<u64>,
}

fn parse_interval(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().ok().filter(|seconds| (0.01..=LONGEST).contains(seconds));
    let seconds = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds.ok_or_else(|| format!("must be a number of seconds from 0.01 to {LONGEST}"))
}

pub(crate) fn stat(args: &Args, out: &mut Output) -> Result<()> {
    let mut before = look(&args.name)?;
    print(&COLUMNS.map(String::from), out)?;
    let Some(interval) = args.interval else { return print(&row(&before, None), out) };
    let mut lines = 0;
    while args.count.is_none_or(|count| lines < count) && !out.is_closed() {
        std::thread::sleep(interval);
        let now = look(&args.name)?;
        print(&row(&now, Some(&before)), out)?;
        before = now;
        lines += 1;
    }
    Ok(())
}

fn look(name: &Name) -> Result<LiveStatus> {
    match client::status(name)?.live {
        Some(live) => Ok(live),
        None => bail!("the daemon of '{name}' says nothing of its work"),
    }
}

/// At once, so that a reader at the other end of a pipe sees each line in time.
fn print(cells: &[String], out: &mut Output) -> Result<()> {
    for (nth, cell) in cells.iter().enumerate() {
        write!(out, "{}{cell:>8}", if nth == 0 { "" } else { " " })?;
    }
    writeln!(out)?;
    out.flush()?;
    Ok(())
}

/// Whether counters have started anew between two looks.
fn is_anew(now: &LiveStatus, before: &LiveStatus) -> bool {
    let less =
        now.counters.iter().any(|(key, value)| before.counters.get(key).is_some_and(|was| value < was));
    less || now.pid != before.pid || now.statistics.seconds < before.statistics.seconds
}

/// What happened between two looks, or since the counters started.
fn row(now: &LiveStatus, before: Option<&LiveStatus>) -> [String; COLUMNS.len()] {
    let before = before.filter(|before| !is_anew(now, before));
    let seconds = now.statistics.seconds - before.map_or(0.0, |before| before.statistics.seconds);
    let rate = |key: &str, unit: f64| {
        let count = |live: &LiveStatus| live.counters.get(key).copied().unwrap_or(0);
        let counted = count(now).saturating_sub(before.map_or(0, count)) as f64;
        if seconds > 0.0 { format!("{:.1}", counted / unit / seconds) } else { "-".into() }
    };
    let percent = |ratio: Option<f64>| ratio.map_or("-".into(), |ratio| format!("{:.1}", ratio * 100.0));
    let dirty = (now.log_bytes > 0).then(|| 1.0 - now.free_bytes as f64 / now.log_bytes as f64);
    let time = |request: &str, share| {
        let histogram = |live: &LiveStatus| live.statistics.latencies.get(request).map(|l| l.histogram());
        let taken = histogram(now).unwrap_or_default();
        let taken = taken.since(&before.and_then(histogram).unwrap_or_default());
        taken.per_mille(share).map_or("-".into(), |time| time.as_micros().to_string())
    };
    [
        rate("reads", 1.0),
        rate("writes", 1.0),
        rate("flushes", 1.0),
        rate("read_bytes", MIB),
        rate("write_bytes", MIB),
        rate("written_back_bytes", MIB),
        percent(hit_ratio(&met(now, before), "read")),
        percent(dirty),
        time("read", 500),
        time("read", 990),
        time("write", 500),
        time("write", 990),
        time("flush", 500),
        time("flush", 990),
    ]
}

/// The blocks that requests met between two looks.
fn met(now: &LiveStatus, before: Option<&LiveStatus>) -> Vec<AccessCount> {
    let mut met = now.statistics.accesses.clone();
    if let Some(before) = before {
        for (now, before) in met.iter_mut().zip(&before.statistics.accesses) {
            now.blocks = now.blocks.saturating_sub(before.blocks);
        }
    }
    met
}
