//! Numbers as people read and write them, each with its unit.

use crate::format::{TEXT_BYTES, fitting};
use indicatif::BinaryBytes;

/// The last second of the year 9999, counted from 1970. Later times are garbage.
pub const LAST_SECOND: u64 = 253_402_300_799;

/// A size for people, such as "8 MiB" or "1.46 TiB".
pub fn human_size(bytes: u64) -> String {
    BinaryBytes(bytes).to_string().replace(".00 ", " ")
}

/// A rate for people, such as "12.5 MiB/s".
pub fn human_rate(bytes_per_second: f64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut rate = bytes_per_second.max(0.0);
    let mut unit = 0;
    while rate >= 1000.0 && unit + 1 < UNITS.len() {
        rate /= 1024.0;
        unit += 1;
    }
    let digits = usize::from(unit > 0 && rate < 100.0);
    format!("{rate:.digits$} {}/s", UNITS[unit])
}

/// A time for people, such as "64 µs" or "2 h 5 min".
pub fn human_time(seconds: f64) -> String {
    match seconds {
        s if s <= 0.0 => "0 s".into(),
        s if s < 1e-3 => format!("{:.0} µs", s * 1e6),
        s if s < 1.0 => format!("{:.1} ms", s * 1e3),
        s if s < 60.0 => format!("{s:.1} s"),
        s if s < 3600.0 => format!("{:.0} min {:.0} s", (s / 60.0).floor(), (s % 60.0).floor()),
        s if s < 86400.0 => {
            format!("{:.0} h {:.0} min", (s / 3600.0).floor(), (s % 3600.0 / 60.0).floor())
        }
        s => format!("{:.0} d {:.0} h", (s / 86400.0).floor(), (s % 86400.0 / 3600.0).floor()),
    }
}

/// A ratio in percent, such as "12.5 %"; "-" if it is not known.
pub fn percent(ratio: Option<f64>) -> String {
    ratio.map_or("-".into(), |ratio| format!("{:.1} %", ratio * 100.0))
}

/// A number with its noun, such as "1 segment" or "14 segments".
pub fn count(n: u64, noun: &str) -> String {
    match (n, noun.strip_suffix('y')) {
        (1, _) => format!("1 {noun}"),
        (_, Some(stem)) => format!("{n} {stem}ies"),
        (_, None) => format!("{n} {noun}s"),
    }
}

/// Reads a label of a cache device.
///
/// # Errors
/// When it does not fit into the superblock.
pub fn parse_label(text: &str) -> Result<String, String> {
    if fitting(text) == text {
        Ok(text.into())
    } else {
        Err(format!("longer than {TEXT_BYTES} bytes"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        assert_eq!(human_size(0), "0 B");
        assert_eq!(human_size(8 << 20), "8 MiB");
        assert_eq!(human_size(3 << 39), "1.50 TiB");
    }

    #[test]
    fn rates_keep_to_four_digits() {
        let shown = [0.0, 999.0, 1536.0, 250.0 * 1048576.0].map(human_rate);
        assert_eq!(shown, ["0 B/s", "999 B/s", "1.5 KiB/s", "250 MiB/s"]);
    }

    #[test]
    fn times_are_short() {
        let shown = [0.0, 0.000_064, 0.0021, 12.25, 61.0, 7500.0, 90_000.0].map(human_time);
        assert_eq!(
            shown,
            ["0 s", "64 µs", "2.1 ms", "12.2 s", "1 min 1 s", "2 h 5 min", "1 d 1 h"]
        );
    }

    #[test]
    fn one_is_singular() {
        assert_eq!(count(1, "segment"), "1 segment");
        assert_eq!(count(0, "segment"), "0 segments");
        assert_eq!(count(2, "entry"), "2 entries");
    }
}
