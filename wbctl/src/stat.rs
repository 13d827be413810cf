//! `wbctl stat`: the activity of a volume, a line per interval, as iostat shows it.

use crate::client;
use crate::interval::{Interval, log_in_use};
use crate::volume_paths::VolumeName;
use anyhow::Result;
use libwb::cli::Output;
use libwb::control::LiveStatus;
use std::io::Write;
use std::time::Duration;

/// Bytes of a MiB.
const MIB: f64 = 1048576.0;
/// The longest interval in seconds: a day.
const LONGEST: f64 = 86400.0;
/// How wide a column is, with the blank before it.
const WIDTH: u16 = 9;

/// A column: its name, whether a narrow terminal shows it, and its content.
type Column = (&'static str, bool, fn(&Interval<'_>, &LiveStatus) -> Option<String>);

const COLUMNS: [Column; 14] = [
    ("r/s", true, |i, _| rate(i, "reads", 1.0)),
    ("w/s", true, |i, _| rate(i, "writes", 1.0)),
    ("f/s", true, |i, _| rate(i, "flushes", 1.0)),
    ("rMiB/s", true, |i, _| rate(i, "read_bytes", MIB)),
    ("wMiB/s", true, |i, _| rate(i, "write_bytes", MIB)),
    ("wbMiB/s", true, |i, _| rate(i, "written_back_bytes", MIB)),
    ("rhit%", false, |i, _| i.hits("read").map(percent)),
    ("log%", true, |_, now| log_in_use(now).map(percent)),
    ("r50us", false, |i, _| time(i, "read", 500)),
    ("r99us", false, |i, _| time(i, "read", 990)),
    ("w50us", false, |i, _| time(i, "write", 500)),
    ("w99us", true, |i, _| time(i, "write", 990)),
    ("f50us", false, |i, _| time(i, "flush", 500)),
    ("f99us", false, |i, _| time(i, "flush", 990)),
];

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The volume
    name: VolumeName,
    /// Print a line at this interval in seconds, instead of one line for the time since the
    /// counters were reset
    #[arg(value_parser = parse_interval)]
    interval: Option<Duration>,
    /// Stop after this many lines
    count: Option<u64>,
}

pub(crate) fn parse_interval(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().ok().filter(|seconds| (0.01..=LONGEST).contains(seconds));
    let seconds = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds.ok_or_else(|| format!("must be a number of seconds from 0.01 to {LONGEST}"))
}

pub(crate) fn stat(args: &Args, out: &mut Output) -> Result<()> {
    client::warn_of_untold(&[client::status(&args.name)?]);
    let mut before = client::live(&args.name)?;
    let all = to_u16(COLUMNS.len()) * WIDTH;
    let is_narrow = out.columns().is_some_and(|columns| columns < all);
    let columns: Vec<&Column> =
        COLUMNS.iter().filter(|(_, always, _)| *always || !is_narrow).collect();
    let row = |now: &LiveStatus, before: Option<&LiveStatus>| -> Vec<String> {
        let interval = Interval::between(before, now);
        columns.iter().map(|(_, _, cell)| cell(&interval, now).unwrap_or("-".into())).collect()
    };
    print(columns.iter().map(|(name, ..)| (*name).to_string()).collect(), out)?;
    let Some(interval) = args.interval else { return print(row(&before, None), out) };
    let mut lines = 0;
    while args.count.is_none_or(|count| lines < count) && !out.is_closed() {
        std::thread::sleep(interval);
        let now = client::live(&args.name)?;
        print(row(&now, Some(&before)), out)?;
        before = now;
        lines += 1;
    }
    Ok(())
}

/// Flushes, so that the reader of a pipe sees each line in time.
fn print(cells: Vec<String>, out: &mut Output) -> Result<()> {
    let width = usize::from(WIDTH) - 1;
    let cells: Vec<String> = cells.into_iter().map(|cell| format!("{cell:>width$}")).collect();
    writeln!(out, "{}", cells.join(" "))?;
    out.flush()?;
    Ok(())
}

fn rate(interval: &Interval<'_>, counter: &str, unit: f64) -> Option<String> {
    interval.rate(counter).map(|rate| format!("{:.1}", rate / unit))
}

fn percent(ratio: f64) -> String {
    format!("{:.1}", ratio * 100.0)
}

fn time(interval: &Interval<'_>, request: &str, per_mille: u64) -> Option<String> {
    interval.latency(request, per_mille).map(|time| time.as_micros().to_string())
}

fn to_u16(n: usize) -> u16 {
    u16::try_from(n).unwrap_or(u16::MAX)
}
