// SPDX-License-Identifier: GPL-2.0-only

use std::{fmt, ops::Range};

/// Runs of pages shown of a difference.
const RUNS: usize = 16;

/// A difference between the kernel and what it must do.
#[derive(Debug, Default)]
pub struct Failure {
    /// What differs, where.
    pub what: String,
    /// Runs of IOVA: dirty, but not reported.
    pub lost: Vec<Range<u64>>,
    /// Runs of IOVA: reported, but not dirty.
    pub spurious: Vec<Range<u64>>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        show(f, "lost", &self.lost)?;
        show(f, "spurious", &self.spurious)
    }
}

impl std::error::Error for Failure {}

fn show(f: &mut fmt::Formatter<'_>, what: &str, runs: &[Range<u64>]) -> fmt::Result {
    if runs.is_empty() {
        return Ok(());
    }
    let bytes: u64 = runs.iter().map(|run| run.end - run.start).sum();
    write!(f, "\n{what}: {} pages of {bytes:#x} bytes in all:", bytes >> 12)?;
    for run in runs.iter().take(RUNS) {
        write!(f, " {:#x}-{:#x}", run.start, run.end - 1)?;
    }
    if runs.len() > RUNS {
        write!(f, " and {} more runs", runs.len() - RUNS)?;
    }
    Ok(())
}
