// SPDX-License-Identifier: GPL-2.0-only

//! Results as the kernel's tests print them: `Documentation/dev-tools/ktap.rst`, version 1.

use crate::totals::Totals;
use events::{Call, Difference, Event, Run, TestResult, Verdict};
use std::{
    collections::VecDeque,
    io::{self, Write},
};

/// Steps shown of what led to a failure.
const STEPS: usize = 40;

/// Prints events as KTAP, each as soon as it is there.
pub struct Printer<W: Write> {
    out: W,
    /// Whether somebody watches: what is going on is shown on a line that is overwritten.
    watched: bool,
    planned: usize,
    totals: Totals,
    test: Test,
}

/// What is known of the test in progress.
#[derive(Default)]
struct Test {
    steps: VecDeque<Step>,
    /// Steps that are forgotten.
    skipped: usize,
    difference: Option<Difference>,
}

struct Step {
    call: Option<Call>,
    text: String,
}

impl<W: Write> Printer<W> {
    /// A printer of a run that is about to begin.
    pub fn new(out: W, watched: bool) -> Self {
        Self { out, watched, planned: 0, totals: Totals::default(), test: Test::default() }
    }

    /// What it has printed.
    pub fn totals(&self) -> &Totals {
        &self.totals
    }

    /// Tests that were announced.
    pub fn planned(&self) -> usize {
        self.planned
    }

    /// Prints what is to be said of an event.
    pub fn event(&mut self, event: &Event) -> io::Result<()> {
        match event {
            Event::Run(run) => self.begin(run)?,
            Event::Begin(begin) => {
                self.test = Test::default();
                if self.watched {
                    write!(self.out, "\r\x1b[K# {} ...\r", begin.name)?;
                } else if begin.name.starts_with("fuzz/") {
                    // Whoever ends it early wants to know the seed.
                    writeln!(self.out, "# {}: {}", begin.name, begin.about)?;
                }
            }
            Event::Sequence => self.test = Test::default(),
            Event::Difference(difference) => self.test.difference = Some(difference.clone()),
            Event::Call(_) | Event::Answer(_) | Event::Note { .. } => self.test.event(event),
            Event::Progress { text } => self.comment(text)?,
            Event::Saved { file, text } => {
                self.comment(&format!("saved as {file}, to be replayed:\n{text}"))?;
            }
            Event::Pass(_) | Event::Kernel(_) => {}
            Event::Result(result) => self.result(result)?,
            Event::End { .. } => self.end()?,
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
                self.explain(why)?;
                writeln!(self.out, "not ok {number} {name}")
            }
            Verdict::Known { defect, why } => {
                self.explain(why)?;
                writeln!(self.out, "ok {number} {name} # XFAIL known defect {defect} of the kernel")
            }
            Verdict::Skip { why } => writeln!(self.line()?, "ok {number} {name} # SKIP {why}"),
        }
    }

    /// Prints why a test ended as it did, and the steps that led there. Those that deal with the first
    /// page that is wrong are marked.
    fn explain(&mut self, why: &str) -> io::Result<()> {
        self.comment(why)?;
        let Test { steps, skipped, difference } = std::mem::take(&mut self.test);
        let first = difference.as_ref().and_then(first_wrong);
        if let Some(first) = first {
            self.comment(&format!(
                "first wrong: {first:#x}; steps that deal with it are marked *"
            ))?;
        }
        if skipped > 0 {
            self.comment(&format!("       ({skipped} steps before)"))?;
        }
        for (number, step) in (skipped + 1..).zip(&steps) {
            let deals = first.is_some_and(|first| step.deals_with(first));
            let mark = if deals { '*' } else { ' ' };
            self.comment(&format!("{mark} {number:4}  {}", step.text))?;
        }
        Ok(())
    }

    /// Prints who failed, is known and was skipped, and how many ended how. Tests that were planned and
    /// did not run are errors.
    fn end(&mut self) -> io::Result<()> {
        self.line()?;
        let totals = self.totals.clone();
        for (what, names) in totals.names() {
            for name in names {
                writeln!(self.out, "# {what}: {name}")?;
            }
        }
        let Totals { pass, failed, known, skipped } = &totals;
        let (fail, xfail, skip) = (failed.len(), known.len(), skipped.len());
        let error = self.planned.saturating_sub(totals.count());
        writeln!(
            self.out,
            "# Totals: pass:{pass} fail:{fail} xfail:{xfail} xpass:0 skip:{skip} error:{error}"
        )
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

impl Test {
    fn event(&mut self, event: &Event) {
        match event {
            Event::Call(call) => {
                let text = format!("{} ...", call.op);
                self.push(Step { call: Some(call.clone()), text });
            }
            Event::Answer(answer) => {
                let of = |step: &&mut Step| step.call.as_ref().is_some_and(|c| c.n == answer.n);
                if let Some(step) = self.steps.iter_mut().rev().find(of) {
                    let op = step.call.as_ref().map_or("", |call| &call.op);
                    step.text = format!("{op} -> {}", answer.kernel.text);
                }
            }
            Event::Note { text } => self.push(Step { call: None, text: text.clone() }),
            _ => {}
        }
    }

    fn push(&mut self, step: Step) {
        self.steps.push_back(step);
        if self.steps.len() > STEPS {
            self.steps.pop_front();
            self.skipped += 1;
        }
    }
}

impl Step {
    fn deals_with(&self, iova: u64) -> bool {
        let range = self.call.as_ref().and_then(|call| call.range);
        range.is_some_and(|(start, end)| start <= iova && iova < end)
    }
}

/// The lowest IOVA that is wrong.
fn first_wrong(difference: &Difference) -> Option<u64> {
    let runs = difference.lost.iter().chain(&difference.spurious);
    runs.map(|run| run.0).chain(difference.at).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn print(lines: &[&str]) -> String {
        let mut printer = Printer::new(Vec::new(), false);
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
