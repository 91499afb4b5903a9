// SPDX-License-Identifier: GPL-2.0-only

//! What was measured, as a table and as JSON.

use super::stats::{Estimate, exponent};
use serde::Serialize;
use std::fmt::{self, Display};

/// All that was measured.
#[derive(Serialize)]
pub struct Report {
    /// `uname -r`
    pub kernel: String,
    pub rounds: usize,
    pub comparisons: Vec<Comparison>,
    pub growth: Vec<Growth>,
    pub memory: Vec<Footprint>,
}

impl Report {
    /// Goals that were missed.
    pub fn not_met(&self) -> usize {
        let ratios = self.comparisons.iter().filter_map(|row| row.goal.as_ref());
        let bytes = self.memory.iter().filter_map(|row| row.goal.as_ref());
        ratios.chain(bytes).filter(|goal| goal.verdict == Verdict::NotMet).count()
    }
}

/// What is aimed at, and whether it is there.
#[derive(Serialize)]
pub struct Goal {
    pub value: f64,
    pub verdict: Verdict,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    Met,
    /// The median misses the goal, by less than it is known.
    WithinNoise,
    NotMet,
}

impl Goal {
    pub fn at_least(value: f64, measured: Estimate) -> Self {
        let verdict = match () {
            () if measured.median >= value => Verdict::Met,
            () if measured.high >= value => Verdict::WithinNoise,
            () => Verdict::NotMet,
        };
        Self { value, verdict }
    }

    pub fn at_most(value: f64, measured: f64) -> Self {
        let verdict = if measured <= value { Verdict::Met } else { Verdict::NotMet };
        Self { value, verdict }
    }
}

impl Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Met => "met",
            Self::WithinNoise => "within noise",
            Self::NotMet => "NOT MET",
        })
    }
}

/// What is counted per second.
#[derive(Clone, Copy, Serialize)]
pub enum Unit {
    #[serde(rename = "bytes/s")]
    Bytes,
    #[serde(rename = "pages/s")]
    Pages,
    #[serde(rename = "accesses/s")]
    Accesses,
}

impl Unit {
    fn show(self, value: f64) -> String {
        match self {
            Self::Bytes => format!("{:.3} GB/s", value / 1e9),
            Self::Pages => format!("{:.1} kpages/s", value / 1e3),
            Self::Accesses => format!("{:.0} ns", 1e9 / value),
        }
    }
}

/// The driver beside something else that does the same.
#[derive(Serialize)]
pub struct Comparison {
    pub what: &'static str,
    pub unit: Unit,
    /// The driver's median.
    pub measured: f64,
    pub reference: &'static str,
    /// The median of the reference.
    pub reference_measured: f64,
    /// Of the rounds' ratios, in which both were measured one right after the other: more than 1 if
    /// the driver is faster.
    pub ratio: Estimate,
    pub goal: Option<Goal>,
}

/// What something costs, against how much there is.
#[derive(Serialize)]
pub struct Growth {
    pub operation: &'static str,
    pub cost: Cost,
    /// What grows, and what doesn't.
    pub axis: &'static str,
    /// How much there was, and the median of the cost.
    pub points: Vec<(f64, f64)>,
    /// `e`, where the cost grows as `axis^e`.
    pub exponent: f64,
}

#[derive(Clone, Copy, Serialize)]
pub enum Cost {
    #[serde(rename = "ns")]
    Nanoseconds,
    #[serde(rename = "bytes")]
    Bytes,
}

impl Cost {
    fn show(self, value: f64) -> String {
        match self {
            Self::Nanoseconds => format!("{:.1} us", value / 1e3),
            Self::Bytes => format!("{value:.0} bytes"),
        }
    }
}

impl Growth {
    pub fn new(
        operation: &'static str,
        cost: Cost,
        axis: &'static str,
        points: Vec<(f64, f64)>,
    ) -> Self {
        let exponent = exponent(&points);
        Self { operation, cost, axis, points, exponent }
    }
}

/// The kernel memory that a driver takes for its pins.
#[derive(Serialize)]
pub struct Footprint {
    pub driver: &'static str,
    /// How the pinned pages lie.
    pub pins: &'static str,
    pub bytes_per_page: f64,
    pub goal: Option<Goal>,
}

impl Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "kernel {}, medians of {} rounds", self.kernel, self.rounds)?;
        self.show_comparisons(f)?;
        self.show_growth(f)?;
        self.show_memory(f)
    }
}

impl Report {
    fn show_comparisons(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let header = ["", "rust_mdev_dma", "", "reference", "ratio", "95 %", "goal"];
        let mut rows = vec![header.map(str::to_owned)];
        for row in &self.comparisons {
            rows.push([
                row.what.to_owned(),
                row.unit.show(row.measured),
                row.reference.to_owned(),
                row.unit.show(row.reference_measured),
                format!("{:.3}", row.ratio.median),
                format!("{:.3} to {:.3}", row.ratio.low, row.ratio.high),
                row.goal
                    .as_ref()
                    .map_or(String::new(), |goal| format!("{:.2}: {}", goal.value, goal.verdict)),
            ]);
        }
        show_table(f, &rows)
    }

    fn show_growth(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rows = vec![["", "against", "from", "to", "exponent"].map(str::to_owned)];
        for row in &self.growth {
            let point = |point: Option<&(f64, f64)>| {
                point.map_or(String::new(), |&(x, y)| format!("{x:.0}: {}", row.cost.show(y)))
            };
            rows.push([
                row.operation.to_owned(),
                row.axis.to_owned(),
                point(row.points.first()),
                point(row.points.last()),
                format!("{:.2}", row.exponent),
            ]);
        }
        show_table(f, &rows)
    }

    fn show_memory(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rows = vec![["memory", "pinned pages", "bytes each", "goal"].map(str::to_owned)];
        for row in &self.memory {
            rows.push([
                row.driver.to_owned(),
                row.pins.to_owned(),
                format!("{:.1}", row.bytes_per_page),
                row.goal
                    .as_ref()
                    .map_or(String::new(), |goal| format!("{:.0}: {}", goal.value, goal.verdict)),
            ]);
        }
        show_table(f, &rows)
    }
}

/// Columns as wide as they must be, the first one to the left, the others too.
fn show_table<const N: usize>(f: &mut fmt::Formatter<'_>, rows: &[[String; N]]) -> fmt::Result {
    let width = |i: usize| rows.iter().map(|row| row[i].len()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    writeln!(f)?;
    for row in rows {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        writeln!(f, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts() {
        let measured = Estimate { median: 0.99, low: 0.97, high: 1.01 };
        let verdict = |goal| Goal::at_least(goal, measured).verdict;
        assert_eq!(verdict(0.95), Verdict::Met);
        assert_eq!(verdict(0.99), Verdict::Met);
        assert_eq!(verdict(1.0), Verdict::WithinNoise);
        assert_eq!(verdict(1.02), Verdict::NotMet);
        assert_eq!(Goal::at_most(16.0, 16.0).verdict, Verdict::Met);
        assert_eq!(Goal::at_most(16.0, 16.1).verdict, Verdict::NotMet);
    }
}
