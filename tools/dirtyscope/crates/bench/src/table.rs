// SPDX-License-Identifier: GPL-2.0-only

//! Tables to be read by people.

use std::fmt::{self, Display};

/// A table: columns as wide as they must be, after an empty line.
pub struct Table<const N: usize>(Vec<[String; N]>);

impl<const N: usize> Table<N> {
    pub fn new(header: [&str; N]) -> Self {
        Self(vec![header.map(str::to_owned)])
    }

    pub fn row(&mut self, cells: [String; N]) {
        self.0.push(cells);
    }
}

impl<const N: usize> Display for Table<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = |i: usize| self.0.iter().map(|row| row[i].len()).max().unwrap_or(0);
        let widths: [usize; N] = std::array::from_fn(width);
        writeln!(f)?;
        for row in &self.0 {
            let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
            writeln!(f, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
        }
        Ok(())
    }
}
