//! Tables without lines.

use comfy_table::{CellAlignment, ColumnConstraint, ContentArrangement, Width, presets};
use std::fmt;

/// A table to fill with rows and display. Its lines have no trailing blanks.
pub struct Table(comfy_table::Table);

/// A table with a header. The columns in `words` hold text; all others hold numbers, which are
/// right-aligned and never wrapped. A narrow terminal wraps long text. Elsewhere a row is one line,
/// so that other programs can read it.
pub fn table<const N: usize>(header: [&str; N], words: &[&str]) -> Table {
    let mut table = comfy_table::Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    fit(&mut table);
    for (name, column) in header.iter().zip(table.column_iter_mut()) {
        if !words.contains(name) {
            column.set_cell_alignment(CellAlignment::Right);
            column.set_constraint(ColumnConstraint::ContentWidth);
        }
    }
    Table(table)
}

/// A table of names and values, which wraps long values on a narrow terminal.
pub fn properties() -> Table {
    let mut table = comfy_table::Table::new();
    table.load_style(presets::NOTHING);
    fit(&mut table);
    Table(table)
}

fn fit(table: &mut comfy_table::Table) {
    if let Some(columns) = columns() {
        table.set_content_arrangement(ContentArrangement::Dynamic).set_width(columns);
    }
}

/// The number of columns of the terminal on standard output; `None` if it is not a terminal.
pub(super) fn columns() -> Option<u16> {
    let size = rustix::termios::tcgetwinsize(std::io::stdout()).ok()?;
    (size.ws_col > 0).then_some(size.ws_col)
}

impl Table {
    /// Adds a row.
    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.0.add_row(cells);
        if N == 2 && self.0.header().is_none() {
            // The names of properties stay whole.
            if let Some(names) = self.0.column_mut(0) {
                names.set_constraint(ColumnConstraint::LowerBoundary(Width::Fixed(22)));
            }
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.0.to_string();
        let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
        f.write_str(&lines.join("\n"))
    }
}
