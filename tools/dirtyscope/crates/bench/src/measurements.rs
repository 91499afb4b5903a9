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
    /// What a nanosecond is, and what thousand and a million of them are.
    fn units(self) -> [&'static str; 3] {
        match self {
            Self::Wall => ["ns", "us", "ms"],
            Self::Instructions => ["instr", "k", "M"],
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
    /// Goals that were missed, and exponents that aren't as expected. What has grown by the wall clock may
    /// have for reasons of the host's.
    pub fn not_met(&self) -> usize {
        let ratios = self.comparisons.iter().map(|row| &row.goal);
        let bytes = self.memory.iter().filter_map(|row| row.goal.as_ref());
        let missed = ratios.chain(bytes).filter(|goal| goal.judgement == Judgement::NotMet).count();
        let unexpected =
            self.growth.iter().filter(|row| row.verdict == Verdict::Unexpected).count();
        missed + if self.clock == Clock::Instructions { unexpected } else { 0 }
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
        let [nanoseconds, ..] = clock.units();
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
    /// `e`, where the cost grows as `axis^e`: that of all points, and of the last two.
    pub exponent: f64,
    pub last: f64,
    /// Where `last` should be.
    pub expected: Expected,
    pub verdict: Verdict,
}

/// Where an exponent should be.
#[derive(Clone, Copy, Serialize)]
pub struct Expected {
    pub range: (f64, f64),
    /// A known defect, and where it is with that.
    pub defect: Option<(&'static str, (f64, f64))>,
}

impl Expected {
    /// What more there is costs nothing.
    pub const CONSTANT: Self = Self::around(0.0);
    /// Twice as much costs twice as much.
    pub const LINEAR: Self = Self::around(1.0);
    /// Or less: what is there once, however much there is, may still be most of it.
    pub const UP_TO_LINEAR: Self = Self { range: (-0.2, 1.2), defect: None };
    /// Four times.
    pub const QUADRATIC: Self = Self::around(2.0);

    const fn around(exponent: f64) -> Self {
        Self { range: (exponent - 0.2, exponent + 0.2), defect: None }
    }

    /// But for a kernel with a defect, which is there.
    pub const fn but_for(self, defect: &'static str, there: Self) -> Self {
        Self { defect: Some((defect, there.range)), ..self }
    }

    fn judge(&self, exponent: f64) -> Verdict {
        let inside = |(low, high): (f64, f64)| (low..=high).contains(&exponent);
        match self.defect {
            _ if inside(self.range) => Verdict::Expected,
            Some((defect, range)) if inside(range) => Verdict::Known(defect),
            _ => Verdict::Unexpected,
        }
    }
}

/// Whether an exponent is where it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(into = "String")]
pub enum Verdict {
    Expected,
    /// It isn't, as with this known defect.
    Known(&'static str),
    Unexpected,
}

impl Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Expected => f.write_str("ok"),
            Self::Known(defect) => write!(f, "known: {defect}"),
            Self::Unexpected => f.write_str("UNEXPECTED"),
        }
    }
}

impl From<Verdict> for String {
    fn from(verdict: Verdict) -> Self {
        verdict.to_string()
    }
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
        let [_, microseconds, milliseconds] = clock.units();
        match self {
            Self::Nanoseconds if value >= 1e7 => format!("{:.1} {milliseconds}", value / 1e6),
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
        expected: Expected,
    ) -> Self {
        let last = exponent(&points[points.len().saturating_sub(2)..]);
        let (exponent, verdict) = (exponent(&points), expected.judge(last));
        Self { operation, cost, axis, points, exponent, last, expected, verdict }
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
        if !self.comparisons.is_empty() {
            self.show_comparisons(f)?;
        }
        if !self.growth.is_empty() {
            self.show_growth(f)?;
        }
        if !self.memory.is_empty() {
            self.show_memory(f)?;
        }
        Ok(())
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
        let header = ["", "against", "from", "to", "exponent", "at the end", ""];
        let mut table = Table::new(header);
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
                format!("{:.2}", row.last),
                row.verdict.to_string(),
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

    #[test]
    fn verdicts() {
        let expected = Expected::LINEAR.but_for("D3", Expected::QUADRATIC);
        assert_eq!(expected.judge(1.1), Verdict::Expected);
        assert_eq!(expected.judge(1.9), Verdict::Known("D3"));
        for exponent in [0.7, 1.5, 2.3, f64::NAN] {
            assert_eq!(expected.judge(exponent), Verdict::Unexpected, "{exponent}");
        }
        assert_eq!(Expected::LINEAR.judge(1.9), Verdict::Unexpected);
    }
}
