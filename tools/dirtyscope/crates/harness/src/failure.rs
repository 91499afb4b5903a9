// SPDX-License-Identifier: GPL-2.0-only

//! Why a scenario did not pass.

use events::{Difference, Runs};
use mdev_dma::PAGE;
use std::fmt;

/// Runs of pages shown of a difference.
const RUNS: usize = 16;

/// The kernel doesn't do what it must.
#[derive(Debug)]
pub struct Failure(pub Difference);

impl Failure {
    /// A difference that isn't about pages.
    pub fn new(what: String) -> Self {
        Self(Difference { what, ..Default::default() })
    }

    /// Fails with `what` there is, if any.
    pub fn unless_none(what: Option<String>) -> anyhow::Result<()> {
        what.map_or(Ok(()), |what| Err(Self::new(what).into()))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Difference { what, lost, spurious, .. } = &self.0;
        f.write_str(what)?;
        show(f, "lost", lost)?;
        show(f, "spurious", spurious)
    }
}

impl std::error::Error for Failure {}

fn show(f: &mut fmt::Formatter<'_>, name: &str, runs: &Runs) -> fmt::Result {
    if runs.is_empty() {
        return Ok(());
    }
    let count: u64 = runs.iter().map(|(start, end)| (end - start) / PAGE).sum();
    write!(f, "\n{name} pages: {count}, at")?;
    for (start, end) in runs.iter().take(RUNS) {
        write!(f, " {start:#x}-{:#x}", end - 1)?;
    }
    if runs.len() > RUNS {
        write!(f, " and {} more runs", runs.len() - RUNS)?;
    }
    Ok(())
}

/// A reason why a scenario can't be run; an error that isn't a failure.
#[derive(Debug)]
pub struct Skip(pub String);

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}

/// A difference to the contract that left tasks of this process blocked for good, and devices in use.
#[derive(Debug)]
pub struct Stuck(pub String);

impl fmt::Display for Stuck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Stuck {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_shown_in_short() {
        let failure = Failure(Difference {
            what: "what".into(),
            lost: vec![(0x4000, 0x6000)],
            spurious: (0..20).map(|i| (2 * i * PAGE, (2 * i + 1) * PAGE)).collect(),
            at: None,
        });
        let text = failure.to_string();
        assert!(
            text.starts_with("what\nlost pages: 2, at 0x4000-0x5fff\nspurious pages: 20, at 0x0-")
        );
        assert!(text.ends_with("0x1e000-0x1efff and 4 more runs"), "{text}");
    }
}
