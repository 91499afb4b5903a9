// SPDX-License-Identifier: GPL-2.0-only

//! Test results as the kernel's tests print them: `Documentation/dev-tools/ktap.rst`, version 1.

use serde::{Deserialize, Serialize};
use std::io::{self, Write};

/// How a test ended.
#[derive(Serialize, Deserialize)]
pub enum Verdict {
    Pass,
    /// With lines that say why.
    Fail(String),
    /// Failed as is known: with the reason, and lines that say why.
    Known(String, String),
    /// With the reason.
    Skip(String),
}

/// How many tests ended how.
#[derive(Clone, Copy, Default)]
pub struct Totals {
    pub pass: usize,
    pub fail: usize,
    pub known: usize,
    pub skip: usize,
}

impl Totals {
    fn count(&self) -> usize {
        self.pass + self.fail + self.known + self.skip
    }
}

/// Prints results, each as soon as it is there.
pub struct Report<W: Write> {
    out: W,
    planned: usize,
    totals: Totals,
}

impl<W: Write> Report<W> {
    /// Begins a report of so many tests.
    pub fn begin(mut out: W, planned: usize) -> io::Result<Self> {
        writeln!(out, "KTAP version 1\n1..{planned}")?;
        out.flush()?;
        Ok(Self { out, planned, totals: Totals::default() })
    }

    /// A report of no tests at all, because of `reason`.
    pub fn skip_all(mut out: W, reason: &str) -> io::Result<()> {
        writeln!(out, "KTAP version 1\n1..0 # SKIP {reason}")?;
        out.flush()
    }

    /// Prints what is worth to be said meanwhile.
    pub fn comment(&mut self, text: &str) -> io::Result<()> {
        self.explain(text)?;
        self.out.flush()
    }

    /// Prints the result of the next test.
    pub fn result(&mut self, name: &str, verdict: &Verdict) -> io::Result<()> {
        let number = self.totals.count() + 1;
        match verdict {
            Verdict::Pass => {
                self.totals.pass += 1;
                writeln!(self.out, "ok {number} {name}")?;
            }
            Verdict::Fail(why) => {
                self.totals.fail += 1;
                self.explain(why)?;
                writeln!(self.out, "not ok {number} {name}")?;
            }
            Verdict::Known(reason, why) => {
                self.totals.known += 1;
                self.explain(why)?;
                writeln!(self.out, "not ok {number} {name} # TODO {reason}")?;
            }
            Verdict::Skip(why) => {
                self.totals.skip += 1;
                writeln!(self.out, "ok {number} {name} # SKIP {why}")?;
            }
        }
        self.out.flush()
    }

    fn explain(&mut self, why: &str) -> io::Result<()> {
        why.lines().try_for_each(|line| writeln!(self.out, "# {line}"))
    }

    /// Prints the totals. Tests that were planned and did not run are errors.
    pub fn end(mut self) -> io::Result<Totals> {
        let Totals { pass, fail, known, skip } = self.totals;
        let error = self.planned - self.totals.count();
        writeln!(
            self.out,
            "# Totals: pass:{pass} fail:{fail} xfail:{known} xpass:0 skip:{skip} error:{error}"
        )?;
        self.out.flush()?;
        Ok(self.totals)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report() {
        let mut out = Vec::new();
        let mut report = Report::begin(&mut out, 5).unwrap();
        report.result("a/b", &Verdict::Pass).unwrap();
        report.result("c", &Verdict::Fail("one\ntwo".into())).unwrap();
        report.result("d", &Verdict::Skip("because".into())).unwrap();
        report.result("e", &Verdict::Known("D0".into(), "three".into())).unwrap();
        report.end().unwrap();
        let expected = "KTAP version 1\n1..5\nok 1 a/b\n# one\n# two\nnot ok 2 c\n\
                        ok 3 d # SKIP because\n# three\nnot ok 4 e # TODO D0\n\
                        # Totals: pass:1 fail:1 xfail:1 xpass:0 skip:1 error:1\n";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }
}
