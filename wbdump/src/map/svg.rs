//! The picture as a file.

use super::layout::{Kind, Map};
use libwb::cli::{count, human_size};
use libwb::format::{BLOCK_BYTES, SEGMENT_BYTES, to_u64};
use std::path::Path;
use svg::Document;
use svg::node::element::{Rectangle, Text};

/// The number of cells in a row, and the maximum number of rows.
const COLUMNS: usize = 64;
const ROWS: usize = 40;
/// In pixels: a cell with the gap to the next, and the margin around everything.
const CELL: usize = 14;
const MARGIN: usize = 24;
/// The bars of the backing device.
const PARTS: usize = 128;
const BAR_HEIGHT: usize = 60;
const INK: &str = "#1f2937";

fn colour(kind: Kind) -> &'static str {
    match kind {
        Kind::Empty => "#e5e7eb",
        Kind::Clean => "#93c5fd",
        Kind::Dirty => "#f59e0b",
        Kind::Open => "#34d399",
        Kind::Dropped => "#a78bfa",
        Kind::Damaged => "#dc2626",
    }
}

pub(super) fn save(map: &Map, path: &Path) -> std::io::Result<()> {
    svg::save(path, &draw(map))
}

fn text(words: impl Into<String>, x: usize, y: usize, size: usize) -> Text {
    Text::new(words.into()).set("x", x).set("y", y).set("font-size", size).set("fill", INK)
}

fn square(x: usize, y: usize, kind: Kind) -> Rectangle {
    let side = CELL - 2;
    Rectangle::new()
        .set("x", x)
        .set("y", y)
        .set("width", side)
        .set("height", side)
        .set("rx", 2)
        .set("fill", colour(kind))
}

fn draw(map: &Map) -> Document {
    let cells = map.cells(COLUMNS * ROWS);
    let rows = cells.kinds.len().div_ceil(COLUMNS);
    let width = 2 * MARGIN + COLUMNS * CELL;
    let grid = MARGIN + 44;
    let legend = grid + rows * CELL + 16;
    let bars = legend + 64;
    let height = bars + BAR_HEIGHT + 16 + MARGIN;
    let mut document = Document::new()
        .set("viewBox", (0, 0, width, height))
        .set("font-family", "system-ui, sans-serif")
        .add(
            Rectangle::new()
                .set("width", width)
                .set("height", height)
                .set("rx", 8)
                .set("fill", "#ffffff"),
        )
        .add(text(format!("The log on {}", map.device), MARGIN, MARGIN + 12, 18))
        .add(text(
            format!(
                "{}, oldest first; a square is {}",
                count(to_u64(map.slots.len()), "segment"),
                human_size(to_u64(cells.slots * SEGMENT_BYTES))
            ),
            MARGIN,
            MARGIN + 32,
            12,
        ));
    for (at, &kind) in cells.kinds.iter().enumerate() {
        let mut cell = square(MARGIN + at % COLUMNS * CELL, grid + at / COLUMNS * CELL, kind);
        if cells.point == Some(at) {
            cell = cell.set("stroke", INK).set("stroke-width", 2);
        }
        document = document.add(cell);
    }
    document = add_legend(document, map, legend);
    add_bars(document, map, bars)
}

fn add_legend(mut document: Document, map: &Map, y: usize) -> Document {
    let mut x = MARGIN;
    for (kind, n) in
        Kind::ALL.map(|kind| (kind, map.count(kind))).into_iter().filter(|(_, n)| *n > 0)
    {
        let words = format!("{}: {n}, {}", kind.name(), human_size(to_u64(n * SEGMENT_BYTES)));
        let next = x + 34 + 7 * words.len();
        document = document.add(square(x, y, kind)).add(text(words, x + CELL + 4, y + 11, 12));
        x = next;
    }
    let Some((_, id)) = map.point else { return document };
    // On a line of its own, because there are many kinds.
    let y = y + CELL + 6;
    let point = square(MARGIN, y, Kind::Dirty)
        .set("fill", "none")
        .set("stroke", INK)
        .set("stroke-width", 2);
    document.add(point).add(text(
        format!("recovery point: segment {id}"),
        MARGIN + CELL + 4,
        y + 11,
        12,
    ))
}

fn add_bars(mut document: Document, map: &Map, y: usize) -> Document {
    let size = |blocks: u64| human_size(blocks.saturating_mul(to_u64(BLOCK_BYTES)));
    let blocks = to_u64(map.blocks.len());
    let what =
        if map.backing_blocks.is_some() { "backing device" } else { "up to the last dirty block" };
    let words = format!(
        "Where its {} ({}) lie: {what}, {}",
        count(blocks, "dirty block"),
        size(blocks),
        size(map.extent())
    );
    document = document.add(text(words, MARGIN, y - 10, 12));
    let width = COLUMNS * CELL / PARTS;
    let density = map.density(PARTS);
    let most = density.iter().copied().max().unwrap_or_default().max(1);
    for (part, n) in density.into_iter().enumerate() {
        let height = (n * BAR_HEIGHT).div_ceil(most);
        let bar = Rectangle::new().set("x", MARGIN + part * width).set("width", width - 1);
        let bar = match height {
            0 => bar.set("y", y + BAR_HEIGHT - 1).set("height", 1).set("fill", colour(Kind::Empty)),
            height => bar
                .set("y", y + BAR_HEIGHT - height)
                .set("height", height)
                .set("fill", colour(Kind::Dirty)),
        };
        document = document.add(bar);
    }
    document
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cell_is_drawn_and_names_are_escaped() {
        let map = crate::map::layout::tests::map();
        let text = draw(&map).to_string();
        assert!(text.starts_with("<svg ") && text.trim_end().ends_with("</svg>"), "{text}");
        // The ground, 8 cells, 5 squares of the legend, the bars.
        assert_eq!(text.matches("<rect").count(), 1 + 8 + 5 + PARTS);
        assert!(text.contains("a&lt;b") && !text.contains("a<b"), "{text}");
        assert!(
            text.contains("dirty: 2, 1 MiB") && text.contains("recovery point: segment 6"),
            "{text}"
        );
    }
}
