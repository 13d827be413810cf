//! The picture in characters.

use super::layout::{Kind, Map};
use anstyle::{AnsiColor, Style};
use anyhow::Result;
use libwb::cli::{Output, count, human_size};
use libwb::format::{BLOCK_BYTES, SEGMENT_BYTES, to_u64};
use std::io::Write;

/// The width if there is no terminal.
const COLUMNS: u16 = 80;
/// The number of lines for the log.
const LINES: usize = 16;
const POINT: char = '▶';

pub(super) fn print(map: &Map, out: &mut Output) -> Result<()> {
    let columns = usize::from(out.columns().unwrap_or(COLUMNS)).max(10);
    let picture = Picture { map, columns, is_coloured: out.is_coloured() };
    out.write_all(picture.log().as_bytes())?;
    out.write_all(picture.backing().as_bytes())?;
    Ok(())
}

struct Picture<'a> {
    map: &'a Map,
    columns: usize,
    is_coloured: bool,
}

fn glyph(kind: Kind) -> (char, Style) {
    let (glyph, colour) = match kind {
        Kind::Empty => ('·', AnsiColor::BrightBlack),
        Kind::Clean => ('▒', AnsiColor::Blue),
        Kind::Dirty => ('█', AnsiColor::Yellow),
        Kind::Open => ('▓', AnsiColor::Green),
        Kind::Dropped => ('?', AnsiColor::Magenta),
        Kind::Damaged => ('X', AnsiColor::Red),
    };
    (glyph, colour.on_default())
}

impl Picture<'_> {
    fn paint(&self, text: impl std::fmt::Display, style: Style) -> String {
        if self.is_coloured { format!("{style}{text}{style:#}") } else { text.to_string() }
    }

    fn log(&self) -> String {
        let map = self.map;
        let cells = map.cells(self.columns * LINES);
        let each = human_size(to_u64(cells.slots * SEGMENT_BYTES));
        let slots = count(to_u64(map.slots.len()), "segment");
        let mut text = format!("log, {slots}, oldest first; each character is {each}\n");
        let cell = |(at, kind): (usize, &Kind)| match glyph(*kind) {
            (_, style) if cells.point == Some(at) => self.paint(POINT, style.bold()),
            (glyph, style) => self.paint(glyph, style),
        };
        let painted: Vec<String> = cells.kinds.iter().enumerate().map(cell).collect();
        for line in painted.chunks(self.columns) {
            text += &(line.concat() + "\n");
        }
        for kind in Kind::ALL {
            let (n, (sign, style)) = (map.count(kind), glyph(kind));
            if n > 0 {
                let size = human_size(to_u64(n * SEGMENT_BYTES));
                let since = map.oldest_dirty.as_ref().filter(|_| kind == Kind::Dirty);
                let since = since.map_or(String::new(), |time| format!(", since {time}"));
                text += &format!(
                    "  {} {:<15}{}, {size}{since}\n",
                    self.paint(sign, style),
                    kind.name(),
                    count(to_u64(n), "segment")
                );
            }
        }
        if let Some((_, id)) = map.point {
            let time = map.point_time.as_ref().map_or(String::new(), |time| format!(", of {time}"));
            text += &format!("  {POINT} {:<15}segment {id}{time}\n", "recovery point");
        }
        text
    }

    fn backing(&self) -> String {
        let map = self.map;
        let blocks = to_u64(map.blocks.len());
        if blocks == 0 {
            return "\nno dirty blocks in the log\n".into();
        }
        let size = |blocks: u64| human_size(blocks.saturating_mul(to_u64(BLOCK_BYTES)));
        let extent = map.extent();
        let what = if map.backing_blocks.is_some() {
            "backing device"
        } else {
            "up to the last dirty block"
        };
        let each = extent.div_ceil(to_u64(self.columns)).max(1);
        let density = map.density(self.columns);
        let most = density.iter().copied().max().unwrap_or_default().max(1);
        let bar: String = density
            .iter()
            .map(|&n| match n {
                0 => '·',
                n => ['░', '▒', '▓', '█'][(n * 4).div_ceil(most) - 1],
            })
            .collect();
        let beyond = match map.beyond() {
            0 => String::new(),
            n => format!("; {} beyond its end", count(to_u64(n), "block")),
        };
        format!(
            "\n{what}, {}; each character is about {}\n{}\n  {} dirty, {}; █ is {} or nearly \
             so{beyond}\n",
            size(extent),
            size(each),
            self.paint(bar, glyph(Kind::Dirty).1),
            count(blocks, "block"),
            size(blocks),
            count(to_u64(most), "block"),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_and_the_backing_device_are_drawn() {
        let map = crate::map::layout::tests::map();
        let picture = Picture { map: &map, columns: 10, is_coloured: false };
        let log = picture.log();
        assert_eq!(log.lines().nth(1), Some("▒▒▒█X▶··"), "{log}");
        assert!(log.contains("  █ dirty          2 segments, 1 MiB\n"), "{log}");
        assert!(log.contains("  ▶ recovery point segment 6\n"), "{log}");
        let backing = picture.backing();
        assert_eq!(backing.lines().nth(2), Some("█········▒"), "{backing}");
        assert!(
            backing.contains("5 blocks dirty, 20 KiB") && backing.contains("1 block beyond"),
            "{backing}"
        );
    }

    #[test]
    fn colours_come_only_where_they_are_wanted() {
        let map = crate::map::layout::tests::map();
        let shown =
            |is_coloured| Picture { map: &map, columns: 10, is_coloured }.log().contains('\x1b');
        assert!(shown(true) && !shown(false));
    }
}
