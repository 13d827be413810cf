//! The events of a volume, as the report of a failure shows them.

use super::version::Moment;
use crate::sim::stamp::WriteId;
use std::fmt::Write as _;
use std::ops::Range;

/// How many events of a sector a report shows.
const EVENTS_SHOWN: usize = 60;

#[derive(Clone, Debug)]
pub(super) enum Event {
    Submit(WriteId, &'static str, Range<u64>),
    Done(WriteId, Range<u64>, bool),
    Flush(&'static str, Moment, bool),
    Note(String),
}

/// What happened to a sector, or to all.
pub(super) fn history(events: &[(Moment, Event)], sector: Option<u64>) -> String {
    let concerns = |range: &Range<u64>| sector.is_none_or(|sector| range.contains(&sector));
    let lines: Vec<String> = events
        .iter()
        .filter_map(|(moment, event)| {
            let text = match event {
                Event::Submit(write, what, range) => concerns(range)
                    .then(|| format!("{write}, a {what} of sectors {range:?}, submitted")),
                Event::Done(write, range, ok) => concerns(range)
                    .then(|| format!("{write} {}", if *ok { "acknowledged" } else { "failed" })),
                Event::Flush(what, began, ok) => Some(format!(
                    "{what} submitted at {began} {}",
                    if *ok { "acknowledged" } else { "failed" }
                )),
                Event::Note(text) => Some(text.clone()),
            };
            text.map(|text| format!("{moment:>8}  {text}"))
        })
        .collect();
    let skipped = lines.len().saturating_sub(EVENTS_SHOWN);
    let mut history = match sector {
        Some(sector) => format!("history of sector {sector}:\n"),
        None => "history:\n".to_string(),
    };
    if skipped > 0 {
        let _ = writeln!(history, "          ({skipped} earlier events)");
    }
    history + &lines[skipped..].join("\n")
}
