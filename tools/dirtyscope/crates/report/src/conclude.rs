// SPDX-License-Identifier: GPL-2.0-only

//! What only the host can say of a run in a VM: how the VM ended, and what its console says.

use crate::{console::Console, ending::Ending, follow::Followed, results::Results};
use anyhow::Result;
use events::{Begin, Event, Run, TestResult, VERSION, Verdict, last_sequence};
use std::io::Write;

/// The result for what goes wrong while no test is in progress.
const OUTSIDE: &str = "vm/console";
const ABOUT: &str = "outside of tests, the VM ends as it should, and its kernel doesn't complain";

/// What tests are called that save what kills, and the begin of its file's name.
const SAVING: [(&str, &str); 2] = [("fuzz/seed-", "fuzz-"), ("abuse/", "abuse-")];

/// Adds to the results what was still to be read, and what follows from how the VM ended. What went
/// wrong is the failure of the test in progress, if there is one.
pub fn conclude<W: Write>(
    results: &mut Results<W>,
    followed: Followed,
    console: Option<&Console>,
    without_tests: bool,
) -> Result<()> {
    let Followed { ending, rest, damage } = followed;
    for event in &rest {
        results.event(event.clone())?;
    }
    let wrong = wrong(results, &ending, damage, console, without_tests);
    let stopped = ending == Ending::Stopped || results.stopped();
    let wrong = match (wrong, results.test().cloned()) {
        (wrong, Some(test)) if !stopped => {
            let wrong = wrong.unwrap_or(format!("{ending}, and there is no result"));
            let sequence = matches!(ending, Ending::Died(_)).then(|| last_sequence(&rest));
            fail(results, &test, wrong, sequence)?;
            None
        }
        (wrong, _) => wrong,
    };
    if results.run().is_none() {
        results.event(Event::Run(Run {
            version: VERSION,
            engine: "none".into(),
            arguments: Vec::new(),
            kernel: String::new(),
            planned: 0,
            skip: None,
        }))?;
    }
    if wrong.is_none() && results.run().is_some_and(|run| run.skip.is_some()) {
        return Ok(());
    }
    results.event(Event::Begin(Begin { name: OUTSIDE.into(), about: ABOUT.into() }))?;
    let verdict = wrong.map_or(Verdict::Pass, |why| Verdict::Fail { why });
    results.event(result(OUTSIDE, verdict))
}

/// What is wrong besides what tests say, in lines.
fn wrong<W: Write>(
    results: &Results<W>,
    ending: &Ending,
    damage: Option<String>,
    console: Option<&Console>,
    without_tests: bool,
) -> Option<String> {
    let complaint = console.and_then(|console| console.unrecorded(results.complaints()));
    let skipped = results.run().is_some_and(|run| run.skip.is_some());
    let failed = !results.totals().failed.is_empty();
    let ended = match ending {
        Ending::Exit(0) if results.run().is_none() && !without_tests => {
            Some(format!("{ending} without any test"))
        }
        Ending::Exit(0) => None,
        // One that says why is not in need of another reason.
        // All that was selected can't be run on this kernel.
        Ending::Exit(4) if !failed && !results.totals().skipped.is_empty() => None,
        Ending::Exit(_) if skipped || failed && results.test().is_none() => None,
        Ending::Exit(_) => Some(format!("{ending}, and no failed test says why")),
        _ => Some(ending.to_string()),
    };
    let mut lines: Vec<_> = ended.into_iter().chain(damage).collect();
    match (complaint, console) {
        (Some(complaint), _) => lines.push(format!("the kernel complained:\n{complaint}")),
        (None, Some(console)) if !lines.is_empty() && *ending != Ending::Stopped => {
            lines.push(format!("the end of its console:\n{}", console.tail()));
        }
        _ => {}
    }
    (!lines.is_empty()).then(|| lines.join("\n"))
}

/// The test in progress has failed. The sequence of the fuzzer that killed the kernel is saved.
fn fail<W: Write>(
    results: &mut Results<W>,
    test: &Begin,
    why: String,
    killer: Option<String>,
) -> Result<()> {
    let file = SAVING.iter().find_map(|(prefix, begin)| {
        Some(format!("{begin}{}.ops", test.name.strip_prefix(prefix)?))
    });
    if let Some((file, program)) = file.zip(killer).filter(|(_, program)| !program.is_empty()) {
        let text = format!("# {}\n{program}", why.lines().next().unwrap_or_default());
        results.event(Event::Saved { file, text })?;
    }
    results.event(result(&test.name, Verdict::Fail { why }))
}

fn result(name: &str, verdict: Verdict) -> Event {
    Event::Result(TestResult { name: name.into(), verdict, seconds: 0.0 })
}
