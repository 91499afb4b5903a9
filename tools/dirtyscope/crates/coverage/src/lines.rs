// SPDX-License-Identifier: GPL-2.0-only

//! How often lines were run.

use serde::Serialize;
use std::{collections::BTreeMap, fmt, iter::Sum};

/// How often a line was run, and each branch that begins there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Count {
    pub times: u64,
    pub branches: Vec<u64>,
}

/// Of each file, the lines with code.
#[derive(Default)]
pub struct Lines(BTreeMap<String, BTreeMap<u32, Count>>);

impl Lines {
    pub fn add(&mut self, file: &str, line: u32, count: Count) {
        let sum = self.0.entry(file.to_owned()).or_default().entry(line).or_default();
        sum.times += count.times;
        if sum.branches.len() < count.branches.len() {
            sum.branches.resize(count.branches.len(), 0);
        }
        for (sum, count) in sum.branches.iter_mut().zip(count.branches) {
            *sum += count;
        }
    }

    /// The lines of the file whose path, which may be longer, ends like this.
    pub fn of(&self, path: &str) -> BTreeMap<u32, Count> {
        let mut of = Self::default();
        for (file, lines) in &self.0 {
            if file.strip_suffix(path).is_some_and(|front| front.is_empty() || front.ends_with('/'))
            {
                lines.iter().for_each(|(&line, count)| of.add(path, line, count.clone()));
            }
        }
        of.0.remove(path).unwrap_or_default()
    }
}

/// A function, and its lines with code.
#[derive(Clone, Debug)]
pub struct Function {
    pub file: String,
    pub name: String,
    pub lines: BTreeMap<u32, Count>,
}

impl Function {
    /// How many lines were run, of how many.
    pub fn run(&self) -> Share {
        Share(self.lines.values().filter(|line| line.times > 0).count(), self.lines.len())
    }

    /// The same of branches.
    pub fn branches(&self) -> Share {
        let branches = || self.lines.values().flat_map(|line| &line.branches);
        Share(branches().filter(|&&times| times > 0).count(), branches().count())
    }
}

/// So many of so many.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Share(pub usize, pub usize);

impl Share {
    pub fn percent(self) -> f64 {
        if self.1 == 0 { 100.0 } else { self.0 as f64 * 100.0 / self.1 as f64 }
    }
}

impl Sum for Share {
    fn sum<I: Iterator<Item = Self>>(shares: I) -> Self {
        shares.fold(Self::default(), |a, b| Self(a.0 + b.0, a.1 + b.1))
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>4}/{:<4} {:>5.1} %", self.0, self.1, self.percent())
    }
}
