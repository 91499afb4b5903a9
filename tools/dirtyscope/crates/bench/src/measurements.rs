// SPDX-License-Identifier: GPL-2.0-only

//! What was measured, as a table and as JSON.

use super::{
    C_DRIVER, DRIVER,
    stats::{Estimate, exponent},
    table::Table,
};
use serde::{Deserialize, Serialize};
use std::fmt::{self, Display};

/// What times are measured by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Clock {
    /// Time as it passes
    Wall,
    /// Instructions: in a machine of QEMU whose clock counts one as a nanosecond, with -icount
    /// shift=0,sleep=off
    Instructions,
}

impl Clock {
    /// What a nanosecond is, and what thousand of them are.
    fn units(self) -> [&'static str; 2] {
        match self {
            Self::Wall => ["ns", "us"],
            Self::Instructions => ["instr", "kinstr"],
        }
    }
}

/// All that was measured.
#[derive(Serialize)]
pub struct Measurements {
    /// `uname -r`
    pub kernel: String,
    pub clock: Clock,
    pub rounds: usize,
    pub comparisons: Vec<Comparison>,
    pub growth: Vec<Growth>,
    pub memory: Vec<Footprint>,
}

impl Measurements {
    /// Goals that were missed.
    pub fn not_met(&self) -> usize {
        let ratios = self.comparisons.iter().map(|row| &row.goal);
        let bytes = self.memory.iter().filter_map(|row| row.goal.as_ref());
        ratios.chain(bytes).filter(|goal| goal.judgement == Judgement::NotMet).count()
    }
}

/// What is aimed at, and whether it is there.
#[derive(Serialize)]
pub struct Goal {
    pub value: f64,
    pub judgement: Judgement,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Judgement {
    Met,
    /// The median misses the goal, by less than it is known.
    WithinNoise,
    NotMet,
}

impl Goal {
    pub fn at_least(value: f64, measured: Estimate) -> Self {
        let judgement = match () {
            () if measured.median >= value => Judgement::Met,
            () if measured.high >= value => Judgement::WithinNoise,
            () => Judgement::NotMet,
        };
        Self { value, judgement }
    }

    pub fn at_most(value: f64, measured: f64) -> Self {
        let judgement = if measured <= value { Judgement::Met } else { Judgement::NotMet };
        Self { value, judgement }
    }
}

impl Display for Judgement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Met => "met",
            Self::WithinNoise => "within noise",
            Self::NotMet => "NOT MET",
        })
    }
}

/// What is counted per second.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Unit {
    #[serde(rename = "bytes/s")]
    Bytes,
    #[serde(rename = "pages/s")]
    Pages,
    #[serde(rename = "accesses/s")]
    Accesses,
}

impl Unit {
    /// Shows a speed.
    pub fn show(self, clock: Clock, speed: f64) -> String {
        let [nanoseconds, _] = clock.units();
        match (self, clock) {
            (Self::Bytes, Clock::Wall) => format!("{:.3} GB/s", speed / 1e9),
            (Self::Pages, Clock::Wall) => format!("{:.1} kpages/s", speed / 1e3),
            (Self::Bytes, Clock::Instructions) => format!("{:.1} instr/KiB", 1024e9 / speed),
            (Self::Pages, Clock::Instructions) => format!("{:.1} instr/page", 1e9 / speed),
            (Self::Accesses, _) => format!("{:.1} {nanoseconds}", 1e9 / speed),
        }
    }
}

/// The driver beside the one in C, in what both do.
#[derive(Serialize)]
pub struct Comparison {
    pub path: &'static str,
    pub unit: Unit,
    /// The median speed of the driver.
    pub rust: f64,
    /// And of the one in C.
    pub c: f64,
    /// Of the rounds' ratios, in which both were measured one right after the other: more than 1 if
    /// the driver is faster.
    pub ratio: Estimate,
    pub goal: Goal,
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
    fn show(self, clock: Clock, value: f64) -> String {
        let [_, microseconds] = clock.units();
        match self {
            Self::Nanoseconds => format!("{:.1} {microseconds}", value / 1e3),
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

impl Display for Measurements {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let clock = match self.clock {
            Clock::Wall => "wall clock",
            Clock::Instructions => "instructions counted",
        };
        writeln!(f, "kernel {}, {clock}, medians of {} rounds", self.kernel, self.rounds)?;
        self.show_comparisons(f)?;
        if self.growth.is_empty() {
            return Ok(());
        }
        self.show_growth(f)?;
        self.show_memory(f)
    }
}

impl Measurements {
    fn show_comparisons(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let header = ["", DRIVER, C_DRIVER, "ratio", "95 %", "goal"];
        let mut table = Table::new(header);
        for row in &self.comparisons {
            table.row([
                row.path.to_owned(),
                row.unit.show(self.clock, row.rust),
                row.unit.show(self.clock, row.c),
                format!("{:.3}", row.ratio.median),
                format!("{:.3} to {:.3}", row.ratio.low, row.ratio.high),
                format!("{:.2}: {}", row.goal.value, row.goal.judgement),
            ]);
        }
        table.fmt(f)
    }

    fn show_growth(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::new(["", "against", "from", "to", "exponent"]);
        for row in &self.growth {
            let point = |point: Option<&(f64, f64)>| {
                point.map_or(String::new(), |&(x, y)| {
                    format!("{x:.0}: {}", row.cost.show(self.clock, y))
                })
            };
            table.row([
                row.operation.to_owned(),
                row.axis.to_owned(),
                point(row.points.first()),
                point(row.points.last()),
                format!("{:.2}", row.exponent),
            ]);
        }
        table.fmt(f)
    }

    fn show_memory(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::new(["memory", "pinned pages", "bytes each", "goal"]);
        for row in &self.memory {
            table.row([
                row.driver.to_owned(),
                row.pins.to_owned(),
                format!("{:.1}", row.bytes_per_page),
                row.goal
                    .as_ref()
                    .map_or(String::new(), |goal| format!("{:.0}: {}", goal.value, goal.judgement)),
            ]);
        }
        table.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn judgements() {
        let measured = Estimate { median: 0.99, low: 0.97, high: 1.01 };
        let judgement = |goal| Goal::at_least(goal, measured).judgement;
        assert_eq!(judgement(0.95), Judgement::Met);
        assert_eq!(judgement(0.99), Judgement::Met);
        assert_eq!(judgement(1.0), Judgement::WithinNoise);
        assert_eq!(judgement(1.02), Judgement::NotMet);
        assert_eq!(Goal::at_most(16.0, 16.0).judgement, Judgement::Met);
        assert_eq!(Goal::at_most(16.0, 16.1).judgement, Judgement::NotMet);
    }
}
