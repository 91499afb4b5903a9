// SPDX-License-Identifier: GPL-2.0-only

use events::{TestResult, Verdict};

/// How many tests passed, and which ones ended otherwise.
#[derive(Clone, Debug, Default)]
pub struct Totals {
    pub pass: usize,
    pub failed: Vec<String>,
    /// With the defect's id.
    pub known: Vec<String>,
    /// With the reason.
    pub skipped: Vec<String>,
}

impl Totals {
    /// Counts a result.
    pub fn add(&mut self, result: &TestResult) {
        let name = &result.name;
        match &result.verdict {
            Verdict::Pass => self.pass += 1,
            Verdict::Fail { .. } => self.failed.push(name.clone()),
            Verdict::Known { defect, .. } => self.known.push(format!("{name} ({defect})")),
            Verdict::Skip { why } => self.skipped.push(format!("{name} ({why})")),
        }
    }

    /// All tests that ended.
    pub fn count(&self) -> usize {
        self.pass + self.failed.len() + self.known.len() + self.skipped.len()
    }

    /// Those that did not pass, by how they ended.
    pub fn names(&self) -> [(&'static str, &[String]); 3] {
        [("failed", &self.failed), ("known", &self.known), ("skipped", &self.skipped)]
    }
}
