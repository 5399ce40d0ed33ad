//! Tables without borders: columns aligned, headings dim, cells toned by what they mean.

use comfy_table::{Attribute, Cell, CellAlignment, Color, ContentArrangement, presets};

/// What a cell means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tone {
    /// Nothing special.
    Plain,
    /// As it should be.
    Good,
    /// Works, but something is amiss.
    Doubtful,
    /// Not as it should be.
    Bad,
    /// Less important.
    Dim,
}

/// Rows under headings.
#[derive(Debug)]
pub(crate) struct Table {
    headings: Vec<&'static str>,
    /// Columns that hold numbers, aligned at their right.
    right: Vec<usize>,
    rows: Vec<Vec<(String, Tone)>>,
}

impl Table {
    /// An empty table. Without headings it is a list of names and values.
    pub(crate) fn new<const N: usize>(headings: [&'static str; N]) -> Self {
        Table {
            headings: headings.to_vec(),
            right: Vec::new(),
            rows: Vec::new(),
        }
    }

    /// Aligns these columns at their right.
    pub(crate) fn right<const N: usize>(mut self, columns: [usize; N]) -> Self {
        self.right = columns.to_vec();
        self
    }

    /// Adds a row.
    pub(crate) fn row<const N: usize>(&mut self, cells: [(String, Tone); N]) {
        self.rows.push(cells.to_vec());
    }

    /// Adds a row of plain cells.
    pub(crate) fn plain<const N: usize>(&mut self, cells: [String; N]) {
        self.rows
            .push(cells.map(|cell| (cell, Tone::Plain)).to_vec());
    }

    /// The table as text without a last line feed. `columns`: the terminal's width, where
    /// there is one; long cells are then wrapped inside their column.
    pub(crate) fn render(self, styled: bool, columns: Option<u16>) -> String {
        let mut table = comfy_table::Table::new();
        table.load_preset(presets::NOTHING);
        if styled {
            table.enforce_styling();
        } else {
            table.force_no_tty();
        }
        match columns {
            Some(columns) => {
                table
                    .set_content_arrangement(ContentArrangement::Dynamic)
                    .set_width(columns);
            }
            None => {
                table.set_content_arrangement(ContentArrangement::Disabled);
            }
        }
        if !self.headings.is_empty() {
            table.set_header(
                self.headings
                    .iter()
                    .map(|heading| Cell::new(heading).add_attribute(Attribute::Dim)),
            );
        }
        for row in self.rows {
            table.add_row(row.into_iter().map(|(text, tone)| {
                let cell = Cell::new(text);
                match tone {
                    Tone::Plain => cell,
                    Tone::Good => cell.fg(Color::DarkGreen),
                    Tone::Doubtful => cell.fg(Color::DarkYellow),
                    Tone::Bad => cell.fg(Color::DarkRed),
                    Tone::Dim => cell.add_attribute(Attribute::Dim),
                }
            }));
        }
        for (index, column) in table.column_iter_mut().enumerate() {
            column.set_padding((0, 2));
            if self.right.contains(&index) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        let text = table.to_string();
        // Padding behind the last column helps nobody and hurts who copies.
        let lines: Vec<_> = text.lines().map(str::trim_end).collect();
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align_and_nothing_trails() {
        let mut table = Table::new(["NAME", "SIZE"]).right([1]);
        table.plain(["a".into(), "1".into()]);
        table.row([("longer".into(), Tone::Good), ("1000".into(), Tone::Plain)]);
        let text = table.render(false, None);
        assert_eq!(text, "NAME    SIZE\na          1\nlonger  1000");
    }

    #[test]
    fn colours_only_where_they_are_wanted() {
        let make = || {
            let mut table = Table::new([]);
            table.row([("x".into(), Tone::Bad)]);
            table
        };
        assert_eq!(make().render(false, None), "x");
        assert!(make().render(true, None).contains("\u{1b}["));
    }
}
