// SPDX-License-Identifier: GPL-2.0-only

//! What things cost, measured against how much there is of something.

use super::{
    Bench,
    measurements::{Cost, Expected, Growth},
    stats::median,
};
use anyhow::Result;
use std::time::{Duration, Instant};

/// What takes longer isn't repeated once more.
const ENOUGH: Duration = Duration::from_secs(1);

/// What is measured, and against what.
pub struct Axis<'a, const N: usize> {
    /// What grows, and what doesn't.
    pub what: &'static str,
    /// How much of it there is, ascending.
    pub amounts: &'a [u64],
    /// What is done then.
    pub operations: [&'static str; N],
}

impl<const N: usize> Axis<'_, N> {
    /// Measures each operation with each amount: `once` does it, and returns how long each has taken, or
    /// `None` for one that was left out. Those of which nothing is expected aren't of interest here.
    pub fn measure(
        &self,
        bench: &Bench<'_>,
        expected: [Option<Expected>; N],
        mut once: impl FnMut(u64) -> Result<[Option<Duration>; N]>,
    ) -> Result<Vec<Growth>> {
        if !bench.is_wanted(self.what) {
            return Ok(Vec::new());
        }
        let mut points = [const { Vec::new() }; N];
        for &amount in self.amounts {
            bench.progress(&format!("{}: {amount}", self.what));
            let mut samples = [const { Vec::new() }; N];
            let begin = Instant::now();
            for _ in 0..bench.repetitions {
                bench.check_stopped()?;
                for (samples, sample) in samples.iter_mut().zip(once(amount)?) {
                    samples.extend(sample.map(|sample| sample.as_nanos() as f64));
                }
                if begin.elapsed() > ENOUGH {
                    break;
                }
            }
            for (points, samples) in points.iter_mut().zip(&samples) {
                if !samples.is_empty() {
                    points.push((amount as f64, median(samples)));
                }
            }
        }
        let rows = self.operations.into_iter().zip(points).zip(expected);
        Ok(rows
            .filter_map(|((operation, points), expected)| {
                Some(Growth::new(operation, Cost::Nanoseconds, self.what, points, expected?))
            })
            .collect())
    }
}

/// How long something takes.
pub fn timed(f: impl FnOnce() -> vfio_client::Result<()>) -> Result<Duration> {
    let begin = Instant::now();
    f()?;
    Ok(begin.elapsed())
}
