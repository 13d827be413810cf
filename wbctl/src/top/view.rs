//! What `wbctl top` shows: it turns a daemon's reports into a picture, without a terminal.

use crate::interval::{Interval, log_in_use};
use libwb::cache::{PACING_DIVISOR, URGENT_BELOW};
use libwb::cli::{human_rate, human_size, human_time, percent};
use libwb::control::{LiveStatus, VolumeStatus};
use libwb::format::{SEGMENT_BYTES, to_u64};
use ratatui::buffer::Buffer;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Paragraph, Sparkline, Widget};
use std::collections::VecDeque;
use std::time::Duration;

/// Samples that are kept for the curves: more than any terminal has columns.
const KEPT: usize = 1000;
/// How wide the names at the left are.
const NAMES: u16 = 13;
/// Above this share of the log in use, writes are slowed down.
const TIGHT: f64 = 1.0 - 1.0 / PACING_DIVISOR as f64;
/// Above this share, write-back continues whatever the load.
const NEARLY_FULL: f64 = 1.0 - 1.0 / URGENT_BELOW as f64;

/// What one sample adds to the curves.
#[derive(Clone, Copy, Default)]
struct Point {
    write_rate: u64,
    writeback_rate: u64,
    write_p99_micros: u64,
}

/// All that is shown.
pub(super) struct View {
    is_coloured: bool,
    interval: Duration,
    volume: Option<VolumeStatus>,
    before: Option<LiveStatus>,
    /// Newest last.
    points: VecDeque<Point>,
    /// Why there is no new sample, if there is none.
    gone: Option<String>,
    /// What the daemon does not report, if anything.
    untold: Option<String>,
}

impl View {
    pub(super) fn new(is_coloured: bool, interval: Duration) -> View {
        let points = VecDeque::with_capacity(KEPT);
        View { is_coloured, interval, volume: None, before: None, points, gone: None, untold: None }
    }

    /// Takes in a report of the daemon, or why there is none. The previous report stays visible.
    pub(super) fn look(&mut self, told: anyhow::Result<VolumeStatus>) {
        let volume = match told {
            Ok(volume) => volume,
            Err(error) => {
                self.gone = Some(format!("{error:#}"));
                return;
            }
        };
        self.gone = None;
        self.untold = (!volume.untold.is_empty()).then(|| {
            let untold: Vec<&str> =
                volume.untold.iter().filter_map(|it| it.rsplit('/').next()).collect();
            format!("the daemon is of another version and does not report {}", untold.join(", "))
        });
        self.before = self.volume.take().and_then(|volume| volume.live);
        if let (Some(before), Some(now)) = (&self.before, &volume.live) {
            let interval = Interval::between(Some(before), now);
            let rate = |counter| round(interval.rate(counter).unwrap_or_default());
            let p99 = interval.latency("write", 990).unwrap_or_default();
            if self.points.len() == KEPT {
                self.points.pop_front();
            }
            self.points.push_back(Point {
                write_rate: rate("write_bytes"),
                writeback_rate: rate("written_back_bytes"),
                write_p99_micros: u64::try_from(p99.as_micros()).unwrap_or(u64::MAX),
            });
        }
        self.volume = Some(volume);
    }

    fn colour(&self, colour: Color) -> Style {
        if self.is_coloured { Style::new().fg(colour) } else { Style::new() }
    }
}

/// A rate without its fraction, saturated.
fn round(rate: f64) -> u64 {
    Duration::try_from_secs_f64(rate.max(0.0)).map_or(u64::MAX, |rate| rate.as_secs())
}

impl Widget for &View {
    fn render(self, area: Rect, buf: &mut Buffer) {
        let [title, banner, rest] =
            Layout::vertical([Constraint::Length(1), Constraint::Length(1), Constraint::Fill(1)])
                .areas(area);
        self.title(title, buf);
        if let Some(why) = self.gone.as_ref().or(self.untold.as_ref()) {
            let text = format!(" {why} ");
            let style = self.colour(Color::Red).add_modifier(Modifier::BOLD | Modifier::REVERSED);
            Paragraph::new(text).style(style).render(banner, buf);
        }
        if let Some(live) = self.volume.as_ref().and_then(|volume| volume.live.as_ref()) {
            self.body(live, rest, buf);
        }
    }
}

impl View {
    fn title(&self, area: Rect, buf: &mut Buffer) {
        let Some(volume) = &self.volume else { return };
        let device =
            volume.device.as_ref().map_or("-".into(), |device| device.display().to_string());
        let left = Line::from(vec![
            Span::styled(format!(" {}", volume.name), Style::new().add_modifier(Modifier::BOLD)),
            Span::raw(format!(
                "  {device}  {}",
                if self.gone.is_some() { "gone; last known state" } else { volume.state.name() }
            )),
        ]);
        let right = format!("every {} s, q quits ", self.interval.as_secs_f64());
        Paragraph::new(right).right_aligned().render(area, buf);
        left.render(area, buf);
    }

    fn body(&self, live: &LiveStatus, area: Rect, buf: &mut Buffer) {
        let rows = [
            Constraint::Length(2),
            Constraint::Length(1),
            Constraint::Length(5),
            Constraint::Length(1),
            Constraint::Length(5),
            Constraint::Length(1),
            Constraint::Fill(1),
            Constraint::Fill(1),
            Constraint::Fill(1),
        ];
        let [log, _, facts, _, work, _, writes, writeback, p99] =
            Layout::vertical(rows).areas(area);
        self.log(live, log, buf);
        Paragraph::new(self.facts(live)).render(facts, buf);
        Paragraph::new(self.work(live)).render(work, buf);
        let newest = self.points.back().copied().unwrap_or_default();
        let time = |micros: u64| human_time(Duration::from_micros(micros).as_secs_f64());
        let rate = |rate: u64| human_rate(rate as f64);
        self.curve("writes", |p| p.write_rate, &rate, newest, Color::Green, writes, buf);
        self.curve("write-back", |p| p.writeback_rate, &rate, newest, Color::Cyan, writeback, buf);
        self.curve("write p99", |p| p.write_p99_micros, &time, newest, Color::Yellow, p99, buf);
    }

    /// How full the log is, and the write position among its slots, from left to right.
    fn log(&self, live: &LiveStatus, area: Rect, buf: &mut Buffer) {
        let in_use = log_in_use(live).unwrap_or_default();
        let (word, colour) = match in_use {
            full if full >= NEARLY_FULL => ("nearly full: slowed down", Color::Red),
            tight if tight >= TIGHT => ("writes slowed down", Color::Yellow),
            _ => ("", Color::Green),
        };
        let text = format!(
            " {:<12}{} in use, {} of {} free  {word}",
            "log",
            percent(Some(in_use)),
            human_size(live.free_bytes),
            human_size(live.log_bytes),
        );
        let [words, bar] = Layout::vertical([Constraint::Length(1); 2]).areas(area);
        Span::styled(text, self.colour(colour)).render(words, buf);
        let [name, bar] =
            Layout::horizontal([Constraint::Length(NAMES), Constraint::Fill(1)]).areas(bar);
        Span::raw(" position").render(name, buf);
        let columns = bar.width.saturating_sub(1);
        for (x, cell) in (bar.x..).zip(position(live, columns)) {
            let style = match cell {
                '█' => self.colour(colour),
                '▶' => self.colour(Color::White).add_modifier(Modifier::BOLD),
                _ => self.colour(Color::DarkGray),
            };
            buf[(x, bar.y)].set_char(cell).set_style(style);
        }
    }

    fn facts(&self, live: &LiveStatus) -> Vec<Line<'static>> {
        let statistics = &live.statistics;
        let age =
            live.oldest_dirty_seconds.map(|age| format!(", the oldest for {}", human_time(age)));
        let rate = statistics.writeback_bytes_per_second.zip(statistics.writeback_seconds_left);
        let writeback = match (&live.writeback_error, rate) {
            (Some(error), _) => format!("makes no progress, trying again: {error}"),
            (None, _) if live.paused => "paused".into(),
            (None, Some((rate, left))) => {
                format!("{} while it works, {} left", human_rate(rate), human_time(left))
            }
            (None, None) => "-".into(),
        };
        let errors = ["writeback_errors", "cache_read_errors"]
            .map(|key| live.counters.get(key).unwrap_or(&0));
        let trouble = live.failure.as_ref().map_or_else(
            || format!("{} of write-back, {} of cache reads", errors[0], errors[1]),
            |failure| format!("FAILED, writes are refused: {failure}"),
        );
        let is_bad = live.failure.is_some() || errors != [&0, &0];
        let amplification =
            statistics.write_amplification.map_or("-".into(), |ratio| format!("{ratio:.2}"));
        let line = |name: &str, text: String| Line::from(format!(" {name:<12}{text}"));
        vec![
            line(
                "dirty",
                format!(
                    "{} only in the cache{}",
                    human_size(live.dirty_bytes),
                    age.unwrap_or_default()
                ),
            ),
            line("used", format!("{} in the cache, dirty or clean", human_size(live.used_bytes))),
            line("write-back", writeback),
            line(
                "hits",
                format!(
                    "{} of reads, {} of writes; amplification {amplification}",
                    percent(statistics.read_hit_ratio),
                    percent(statistics.write_hit_ratio)
                ),
            ),
            line("errors", trouble).style(if is_bad {
                self.colour(Color::Red)
            } else {
                Style::new()
            }),
        ]
    }

    /// The activity since the last sample.
    fn work(&self, live: &LiveStatus) -> Vec<Line<'static>> {
        let interval = Interval::between(self.before.as_ref(), live);
        let line = |name: &str, requests: &str, bytes: &str, kind: &str| {
            let rate = |key: &str| interval.rate(key).filter(|_| !key.is_empty());
            let requests = rate(requests).map_or("-".into(), |rate| format!("{rate:.0} /s"));
            let bytes = rate(bytes).map_or("-".into(), human_rate);
            let time = |share| {
                let time = interval.latency(kind, share);
                time.map_or("-".into(), |time| human_time(time.as_secs_f64()))
            };
            let [p50, p99, p999] = [500, 990, 999].map(time);
            Line::from(format!(" {name:<12}{requests:>11}{bytes:>13}{p50:>11}{p99:>11}{p999:>11}"))
        };
        let header = format!(
            " {:<12}{:>11}{:>13}{:>11}{:>11}{:>11}",
            "", "requests", "throughput", "p50", "p99", "p99.9"
        );
        vec![
            Line::styled(header, Style::new().add_modifier(Modifier::BOLD)),
            line("reads", "reads", "read_bytes", "read"),
            line("writes", "writes", "write_bytes", "write"),
            line("flushes", "flushes", "", "flush"),
            line("write-back", "", "written_back_bytes", ""),
        ]
    }

    /// A curve of the samples, the newest at the right, with the newest and the largest value
    /// beside it.
    #[expect(clippy::too_many_arguments, reason = "what to draw, how, and where")]
    fn curve(
        &self,
        name: &str,
        value: fn(&Point) -> u64,
        words: &dyn Fn(u64) -> String,
        newest: Point,
        colour: Color,
        area: Rect,
        buf: &mut Buffer,
    ) {
        let [names, curve] =
            Layout::horizontal([Constraint::Length(NAMES + 19), Constraint::Fill(1)]).areas(area);
        let shown = usize::from(curve.width.saturating_sub(1));
        let values: Vec<u64> = self.points.iter().rev().take(shown).map(value).collect();
        let most = values.iter().copied().max().unwrap_or_default();
        let lines = vec![
            Line::from(format!(" {name:<12}{}", words(value(&newest)))),
            Line::from(format!(" {:<12}at most {}", "", words(most))),
        ];
        Paragraph::new(lines).render(names, buf);
        let empty = shown.saturating_sub(values.len());
        let data: Vec<u64> =
            std::iter::repeat_n(0, empty).chain(values.into_iter().rev()).collect();
        Sparkline::default().data(data).style(self.colour(colour)).render(curve, buf);
    }
}

/// The log's slots in `columns` columns: those not written back, the newest segment, and the rest.
fn position(live: &LiveStatus, columns: u16) -> Vec<char> {
    let slots = (live.log_bytes / to_u64(SEGMENT_BYTES)).max(1);
    let dirty = live.newest_segment.saturating_sub(live.written_back_segment).min(slots);
    let newest_slot = live.newest_segment.saturating_sub(1) % slots;
    let columns = u64::from(columns);
    let cell = |column: u64| {
        // The slots that this column stands for, at least one.
        let first = column * slots / columns.max(1);
        let last = ((column + 1) * slots / columns.max(1)).max(first + 1) - 1;
        let age = |slot: u64| (newest_slot + slots - slot) % slots;
        if live.newest_segment > 0 && (first..=last).contains(&newest_slot) {
            '▶'
        } else if age(first) < dirty || age(last) < dirty {
            '█'
        } else {
            '·'
        }
    };
    (0..columns).map(cell).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::anyhow;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    const MIB: u64 = 1 << 20;

    /// A volume that takes a MiB each second, after this number of seconds. Its log has 16 slots;
    /// `newest` is its newest segment.
    fn volume(seconds: u64, newest: u64) -> VolumeStatus {
        let taken = serde_json::json!({
            "requests": seconds, "total_seconds": 0.0, "p50_seconds": null, "p99_seconds": null,
            "p999_seconds": null, "buckets": [0, 0, seconds, 0],
        });
        let statistics = serde_json::json!({
            "seconds": seconds, "read_hit_ratio": null, "write_hit_ratio": 0.25,
            "write_amplification": 1.02, "writeback_bytes_per_second": 2.0 * MIB as f64,
            "writeback_seconds_left": 1.0, "accesses": [], "latencies": { "write": taken },
        });
        let live = serde_json::json!({
            "pid": 1, "sector_size": 512, "volume_bytes": 1 << 30, "log_bytes": 8 * MIB,
            "free_bytes": (16 - newest) * MIB / 2, "dirty_bytes": 2 * MIB,
            "oldest_dirty_seconds": 61.0,
            "used_bytes": 3 * MIB, "places": 2032, "next_place": 0, "current_segment": newest + 1,
            "newest_segment": newest, "written_segment": newest, "durable_segment": newest,
            "written_back_segment": 0, "failure": null, "paused": false, "writeback_error": null,
            "stuck": null,
            "recovery_seconds": 0.0, "recovery_bytes": 0, "tunables": {}, "statistics": statistics,
            "counters": { "writes": 10 * seconds, "write_bytes": seconds * MIB },
        });
        let json = serde_json::json!({
            "name": "data", "state": "attached", "device": "/dev/loop7", "cache": "/c",
            "backing": "/b", "live": live,
        });
        serde_json::from_value(json).expect("a volume's state")
    }

    fn drawn(view: &View, columns: u16, lines: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(columns, lines)).unwrap();
        terminal.draw(|frame| frame.render_widget(view, frame.area())).unwrap();
        let cells: Vec<String> = terminal
            .backend()
            .buffer()
            .content()
            .iter()
            .map(|cell| cell.symbol().to_string())
            .collect();
        let lines: Vec<String> = cells.chunks(columns.into()).map(|line| line.concat()).collect();
        lines.join("\n")
    }

    #[test]
    fn what_happened_between_two_looks_is_shown_with_units() {
        let mut view = View::new(true, Duration::from_secs(1));
        view.look(Ok(volume(10, 4)));
        view.look(Ok(volume(12, 4)));
        let text = drawn(&view, 80, 24);
        for part in [
            "data  /dev/loop7  attached",
            "q quits",
            "25.0 % in use, 6 MiB of 8 MiB free",
            "2 MiB only in the cache, the oldest for 1 min 1 s",
            "3 MiB in the cache, dirty or clean",
            "2.0 MiB/s while it works, 1.0 s left",
            "10 /s    1.0 MiB/s       4 µs       4 µs       4 µs",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
    }

    #[test]
    fn a_daemon_that_is_gone_is_told_of_plainly_above_how_things_stood() {
        let mut view = View::new(false, Duration::from_secs(1));
        view.look(Ok(volume(10, 4)));
        view.look(Err(anyhow!("volume 'data' is not attached; see wbctl list")));
        let text = drawn(&view, 80, 24);
        assert!(text.contains("gone") && text.contains("volume 'data' is not attached"), "{text}");
        assert!(text.contains("2 MiB only in the cache"), "{text}");
        view.look(Ok(volume(11, 4)));
        assert!(!drawn(&view, 80, 24).contains("not attached"));
    }

    #[test]
    fn what_a_daemon_of_another_version_leaves_out_is_told_and_all_else_is_shown() {
        let whole = serde_json::to_value(volume(10, 4)).unwrap();
        let left_out = |of: &str| -> Vec<String> {
            let members = whole.pointer(of).and_then(|value| value.as_object()).unwrap();
            members.keys().map(|key| format!("{of}/{key}")).collect()
        };
        for pointer in ["", "/live", "/live/statistics", "/live/statistics/latencies/write"]
            .map(left_out)
            .concat()
        {
            let mut json = whole.clone();
            let (of, key) = pointer.rsplit_once('/').unwrap();
            json.pointer_mut(of).unwrap().as_object_mut().unwrap().remove(key);
            let mut told: VolumeStatus = serde_json::from_value(json).unwrap();
            told.untold.push(pointer.clone());
            let mut view = View::new(true, Duration::from_secs(1));
            view.look(Ok(told));
            let text = drawn(&view, 100, 24);
            assert!(text.contains(&format!("does not report {key}")), "without {pointer}:\n{text}");
            assert!(
                pointer == "/device" || text.contains("/dev/loop7"),
                "without {pointer}:\n{text}"
            );
        }
    }

    #[test]
    fn any_terminal_is_large_enough_not_to_fail() {
        let mut view = View::new(true, Duration::from_secs(1));
        for seconds in 0..300 {
            view.look(Ok(volume(seconds, 15)));
        }
        for (columns, lines) in [(1, 1), (10, 3), (20, 50), (80, 10), (200, 60)] {
            drawn(&view, columns, lines);
        }
        assert!(drawn(&view, 80, 24).contains("nearly full: slowed down"));
        // Of 16 segments, writes are paced when less than a third is free.
        for (used, is_paced) in [(10, false), (11, true)] {
            view.look(Ok(volume(300, used)));
            assert_eq!(drawn(&view, 80, 24).contains("writes slowed down"), is_paced, "{used}");
        }
    }

    #[test]
    fn the_position_goes_round_the_log() {
        let shown = |newest: u64, written_back: u64, columns: u16| -> String {
            let mut live = volume(0, 0).live.unwrap();
            (live.newest_segment, live.written_back_segment) = (newest, written_back);
            position(&live, columns).into_iter().collect()
        };
        assert_eq!(shown(0, 0, 8), "········");
        assert_eq!(shown(4, 0, 16), "███▶············");
        assert_eq!(shown(18, 12, 16), "█▶··········████");
        assert_eq!(shown(18, 18, 4), "▶···");
        assert_eq!(shown(1, 0, 0), "");
    }
}
