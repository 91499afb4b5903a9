// SPDX-License-Identifier: GPL-2.0-only

//! Results as the kernel's tests print them: `Documentation/dev-tools/ktap.rst`, version 1.

use crate::{explain::Test, totals::Totals};
use events::{Event, Run, TestResult, Verdict, owner_of};
use std::{
    io::{self, Write},
    path::PathBuf,
};

/// Prints events as KTAP, each as soon as it is there.
pub struct Printer<W: Write> {
    out: W,
    /// Whether somebody watches: what is going on is shown on a line that is overwritten.
    watched: bool,
    /// Where saved sequences are, if somebody saves them.
    saved_in: Option<PathBuf>,
    planned: usize,
    ended: bool,
    totals: Totals,
    test: Test,
}

impl<W: Write> Printer<W> {
    /// A printer of a run that is about to begin.
    pub fn new(out: W, watched: bool, saved_in: Option<PathBuf>) -> Self {
        let (totals, test) = (Totals::default(), Test::default());
        Self { out, watched, saved_in, planned: 0, ended: false, totals, test }
    }

    /// What it has printed.
    pub fn totals(&self) -> &Totals {
        &self.totals
    }

    /// Tests that were announced and have no result.
    pub fn missing(&self) -> usize {
        self.planned.saturating_sub(self.totals.count())
    }

    /// Prints what is to be said of an event.
    pub fn event(&mut self, event: &Event) -> io::Result<()> {
        self.test.event(event);
        match event {
            Event::Run(run) => self.begin(run)?,
            Event::Begin(begin) => {
                if self.watched {
                    write!(self.out, "\r\x1b[K# {} ...\r", begin.name)?;
                } else if begin.name.starts_with("fuzz/") {
                    // Whoever ends it early wants to know the seed.
                    writeln!(self.out, "# {}: {}", begin.name, begin.about)?;
                }
            }
            Event::Progress { text } => self.comment(text)?,
            Event::Saved { file, text } => self.saved(file, text)?,
            Event::Result(result) => self.result(result)?,
            Event::End { .. } => self.end()?,
            _ => {}
        }
        self.out.flush()
    }

    fn begin(&mut self, run: &Run) -> io::Result<()> {
        self.planned = run.planned;
        writeln!(self.out, "KTAP version 1")?;
        match &run.skip {
            Some(why) => writeln!(self.out, "1..0 # SKIP {why}"),
            None => writeln!(self.out, "1..{}", run.planned),
        }
    }

    fn result(&mut self, result: &TestResult) -> io::Result<()> {
        let TestResult { name, verdict, .. } = result;
        self.totals.add(result);
        let number = self.totals.count();
        match verdict {
            Verdict::Pass => writeln!(self.line()?, "ok {number} {name}"),
            Verdict::Fail { why } => {
                self.comment(&self.test.explain(why))?;
                writeln!(self.out, "not ok {number} {name}")
            }
            Verdict::Known { defect, why } => {
                self.comment(&self.test.explain(why))?;
                let owner = owner_of(defect);
                writeln!(self.out, "ok {number} {name} # XFAIL known defect {defect} of {owner}")
            }
            Verdict::Skip { why } => writeln!(self.line()?, "ok {number} {name} # SKIP {why}"),
        }
    }

    fn saved(&mut self, file: &str, text: &str) -> io::Result<()> {
        match &self.saved_in {
            Some(directory) => {
                let path = directory.join(file);
                let path = path.display();
                let engine = match file.split_once('-') {
                    Some((engine @ ("abuse" | "race"), _)) => engine,
                    _ => "fuzz",
                };
                self.comment(&format!(
                    "saved as {path}, to be replayed: make {engine} REPLAY={path}"
                ))
            }
            None => self.comment(&format!("saved as {file}, to be replayed:\n{text}")),
        }
    }

    /// Prints who failed, is known and was skipped, and how many ended how, unless it was done. Tests
    /// that were planned and did not run are errors.
    pub fn end(&mut self) -> io::Result<()> {
        if std::mem::replace(&mut self.ended, true) {
            return Ok(());
        }
        self.line()?;
        for (what, names) in self.totals.names() {
            for name in names {
                writeln!(self.out, "# {what}: {name}")?;
            }
        }
        let Totals { pass, failed, known, skipped } = &self.totals;
        let (fail, xfail, skip) = (failed.len(), known.len(), skipped.len());
        let error = self.missing();
        writeln!(
            self.out,
            "# Totals: pass:{pass} fail:{fail} xfail:{xfail} xpass:0 skip:{skip} error:{error}"
        )?;
        self.out.flush()
    }

    /// The last line, which says how many tests passed and failed: those that have no result, and
    /// `more`, are among the latter. Returns how many failed.
    pub fn close(mut self, more: usize) -> io::Result<(W, usize)> {
        let Totals { pass, failed, known, skipped } = &self.totals;
        let failed = failed.len() + self.missing() + more;
        if !known.is_empty() {
            writeln!(self.out, "{} known", known.len())?;
        }
        write!(self.out, "{pass} passed, {failed} failed")?;
        if !skipped.is_empty() {
            write!(self.out, ", {} skipped", skipped.len())?;
        }
        writeln!(self.out)?;
        Ok((self.out, failed))
    }

    fn comment(&mut self, text: &str) -> io::Result<()> {
        let out = self.line()?;
        text.lines().try_for_each(|line| writeln!(out, "# {line}"))
    }

    /// The output, at the begin of an empty line.
    fn line(&mut self) -> io::Result<&mut W> {
        if self.watched {
            write!(self.out, "\x1b[K")?;
        }
        Ok(&mut self.out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn print(lines: &[&str]) -> String {
        let mut printer = Printer::new(Vec::new(), false, None);
        for line in lines {
            printer.event(&Event::from_line(line).unwrap()).unwrap();
        }
        String::from_utf8(printer.out).unwrap()
    }

    #[test]
    fn a_report() {
        let text = print(&[
            r#"{"event":"run","version":1,"engine":"verify","arguments":[],"kernel":"7","planned":5}"#,
            r#"{"event":"result","name":"a/b","verdict":"pass","seconds":0}"#,
            r#"{"event":"begin","name":"c","about":""}"#,
            r#"{"event":"call","n":1,"op":"MAP 0x0+0x2000 rw","kind":"map","range":[0,8192],"thread":1}"#,
            r#"{"event":"answer","n":1,"model":{"text":"ok","ok":true,"count":0},"kernel":{"text":"ok","ok":true,"count":0}}"#,
            r#"{"event":"call","n":2,"op":"START","kind":"start","thread":1}"#,
            r#"{"event":"difference","what":"one","lost":[[4096,8192]]}"#,
            r#"{"event":"result","name":"c","verdict":"fail","why":"one\ntwo","seconds":0}"#,
            r#"{"event":"result","name":"d","verdict":"skip","why":"because","seconds":0}"#,
            r#"{"event":"begin","name":"e","about":""}"#,
            r#"{"event":"result","name":"e","verdict":"known","defect":"D0","why":"three","seconds":0}"#,
            r#"{"event":"end","stopped":false}"#,
        ]);
        let expected = "KTAP version 1\n1..5\nok 1 a/b\n# one\n# two\n\
             # first wrong: 0x1000; steps that deal with it are marked *\n\
             # *    1  MAP 0x0+0x2000 rw -> ok\n#      2  START ...\n\
             not ok 2 c\nok 3 d # SKIP because\n# three\n\
             ok 4 e # XFAIL known defect D0 of the kernel\n\
             # failed: c\n# known: e (D0)\n# skipped: d (because)\n\
             # Totals: pass:1 fail:1 xfail:1 xpass:0 skip:1 error:1\n";
        assert_eq!(text, expected);
    }
}
