// SPDX-License-Identifier: GPL-2.0-only

//! Test results as the kernel's tests print them: `Documentation/dev-tools/ktap.rst`, version 1.

use std::io::{self, Write};

/// How a test ended.
pub enum Verdict {
    Pass,
    /// With lines that say why.
    Fail(String),
    /// With the reason.
    Skip(String),
}

/// How many tests ended how.
#[derive(Clone, Copy, Default)]
pub struct Totals {
    pub pass: usize,
    pub fail: usize,
    pub skip: usize,
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

    /// Prints the result of the next test.
    pub fn result(&mut self, name: &str, verdict: &Verdict) -> io::Result<()> {
        let Totals { pass, fail, skip } = self.totals;
        let number = pass + fail + skip + 1;
        match verdict {
            Verdict::Pass => {
                self.totals.pass += 1;
                writeln!(self.out, "ok {number} {name}")?;
            }
            Verdict::Fail(why) => {
                self.totals.fail += 1;
                for line in why.lines() {
                    writeln!(self.out, "# {line}")?;
                }
                writeln!(self.out, "not ok {number} {name}")?;
            }
            Verdict::Skip(why) => {
                self.totals.skip += 1;
                writeln!(self.out, "ok {number} {name} # SKIP {why}")?;
            }
        }
        self.out.flush()
    }

    /// Prints the totals. Tests that were planned and did not run are errors.
    pub fn end(mut self) -> io::Result<Totals> {
        let Totals { pass, fail, skip } = self.totals;
        let error = self.planned - pass - fail - skip;
        writeln!(
            self.out,
            "# Totals: pass:{pass} fail:{fail} xfail:0 xpass:0 skip:{skip} error:{error}"
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
        let mut report = Report::begin(&mut out, 4).unwrap();
        report.result("a/b", &Verdict::Pass).unwrap();
        report.result("c", &Verdict::Fail("one\ntwo".into())).unwrap();
        report.result("d", &Verdict::Skip("because".into())).unwrap();
        report.end().unwrap();
        let expected = "KTAP version 1\n1..4\nok 1 a/b\n# one\n# two\nnot ok 2 c\n\
                        ok 3 d # SKIP because\n\
                        # Totals: pass:1 fail:1 xfail:0 xpass:0 skip:1 error:1\n";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }
}
