// SPDX-License-Identifier: GPL-2.0-only

use super::PAGE;
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
    /// The IOVA of what else is wrong, where there is one.
    pub at: Option<u64>,
}

impl Failure {
    /// A difference that isn't about pages.
    pub fn new(what: String) -> Self {
        Self { what, ..Default::default() }
    }

    /// Where it is: the lowest IOVA that is wrong.
    pub fn first(&self) -> Option<u64> {
        let runs = self.lost.iter().chain(&self.spurious);
        runs.map(|run| run.start).chain(self.at).min()
    }
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
    let count: u64 = runs.iter().map(|run| (run.end - run.start) / PAGE).sum();
    write!(f, "\n{what} pages: {count}, at")?;
    for run in runs.iter().take(RUNS) {
        write!(f, " {:#x}-{:#x}", run.start, run.end - 1)?;
    }
    if runs.len() > RUNS {
        write!(f, " and {} more runs", runs.len() - RUNS)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_shown_in_short() {
        let run = |page: u64| page * PAGE..(page + 1) * PAGE;
        let failure = Failure {
            what: "what".into(),
            lost: vec![0x4000..0x6000],
            spurious: (0..20).map(|i| run(2 * i)).collect(),
            at: None,
        };
        assert_eq!(failure.first(), Some(0));
        let text = failure.to_string();
        assert!(
            text.starts_with("what\nlost pages: 2, at 0x4000-0x5fff\nspurious pages: 20, at 0x0-")
        );
        assert!(text.ends_with("0x1e000-0x1efff and 4 more runs"), "{text}");
    }
}
