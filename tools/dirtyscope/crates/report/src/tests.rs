// SPDX-License-Identifier: GPL-2.0-only

//! Whole runs, as a VM leaves them.

use crate::{conclude::conclude, console::Console, follow::follow, results::Results};
use events::{
    Event,
    layout::{ALL, MAGIC, STAYS, STREAM},
};
use std::{fs, path::Path, sync::atomic::AtomicBool};
use tempfile::TempDir;

const RUN: &str =
    r#"{"event":"run","version":1,"engine":"verify","arguments":[],"kernel":"7.3","planned":2}"#;
const BEGIN_A: &str = r#"{"event":"begin","name":"a/a","about":"it"}"#;
const PASS_A: &str = r#"{"event":"result","name":"a/a","verdict":"pass","seconds":0.5}"#;
const BEGIN_B: &str = r#"{"event":"begin","name":"b/b","about":"it"}"#;
const PASS_B: &str = r#"{"event":"result","name":"b/b","verdict":"pass","seconds":0.5}"#;
const START: &str = r#"{"event":"call","n":1,"op":"START","kind":"start","thread":7}"#;
const UBSAN: &str = r#"{"event":"kernel","seconds":1.5,"text":"UBSAN: shift","complaint":true}"#;
const END: &str = r#"{"event":"end","stopped":false}"#;

/// What came of a run.
struct Outcome {
    printed: String,
    code: u8,
    directory: TempDir,
}

impl Outcome {
    /// Of a VM that has written events, and more of them that may be taken back.
    fn of(stays: &[&str], rest: &[&str], ended: &str, console: &str) -> Self {
        let directory = TempDir::new().unwrap();
        let path = |name: &str| directory.path().join(name);
        let lines = |lines: &[&str]| lines.iter().flat_map(|line| [line, "\n"]).collect::<String>();
        let (stays, rest) = (lines(stays), lines(rest));
        let mut memory = vec![0; 1 << 16];
        if !stays.is_empty() {
            memory[..MAGIC.len()].copy_from_slice(&MAGIC);
        }
        for (at, number) in [(STAYS, stays.len()), (ALL, stays.len() + rest.len())] {
            memory[at..at + 8].copy_from_slice(&(number as u64).to_ne_bytes());
        }
        let all = stays + &rest;
        memory[STREAM..STREAM + all.len()].copy_from_slice(all.as_bytes());
        fs::write(path("log"), &memory).unwrap();
        fs::write(path("ended"), ended).unwrap();

        let mut results =
            Results::new(Vec::new(), false, Some(directory.path()), Some(Path::new("build")), None)
                .unwrap();
        let each = |event| results.event(event);
        let stop = AtomicBool::new(false);
        let followed = follow(&path("log"), &path("ended"), &stop, each).unwrap();
        conclude(&mut results, followed, Some(&Console::new(console.as_bytes())), false).unwrap();
        let (printed, code) = results.end().unwrap();
        Self { printed: String::from_utf8(printed).unwrap(), code, directory }
    }

    fn file(&self, name: &str) -> String {
        fs::read_to_string(self.directory.path().join(name)).unwrap()
    }

    /// Fails unless it printed all of this.
    fn says(&self, parts: &[&str]) {
        for part in parts {
            assert!(self.printed.contains(part), "{part:?} is not in\n{}", self.printed);
        }
    }

    fn last_lines(&self, count: usize) -> Vec<&str> {
        let lines: Vec<_> = self.printed.lines().collect();
        lines[lines.len() - count..].to_vec()
    }
}

#[test]
fn a_run_that_passes() {
    let events = [RUN, BEGIN_A, PASS_A, BEGIN_B, UBSAN, PASS_B, END];
    let outcome = Outcome::of(&events, &[], "exit 0\n", "[    1.500000] UBSAN: shift\r\n");
    assert_eq!(
        outcome.printed,
        "KTAP version 1\n1..3\nok 1 a/a\nok 2 b/b\nok 3 vm/console\n\
         # Totals: pass:3 fail:0 xfail:0 xpass:0 skip:0 error:0\n3 passed, 0 failed\n"
    );
    assert_eq!(outcome.code, 0);
    assert_eq!(outcome.printed, outcome.file("results.ktap") + "3 passed, 0 failed\n");
    let recorded = outcome.file("events.jsonl");
    let recorded: Vec<_> = recorded.lines().map(|line| Event::from_line(line).unwrap()).collect();
    assert_eq!(recorded.len(), events.len() + 2);
    assert_eq!(recorded.last(), Some(&Event::End { stopped: false }));
    let junit = outcome.file("junit.xml");
    assert!(junit.contains(r#"tests="3" skipped="0" errors="0" failures="0""#), "{junit}");
}

#[test]
fn what_is_known_and_what_is_skipped() {
    let known =
        r#"{"event":"result","name":"a/a","verdict":"known","defect":"D5","why":"so","seconds":1}"#;
    let skip = r#"{"event":"result","name":"b/b","verdict":"skip","why":"not here","seconds":0}"#;
    let outcome = Outcome::of(&[RUN, BEGIN_A, known, BEGIN_B, skip, END], &[], "exit 0", "");
    assert_eq!(outcome.last_lines(2), ["1 known", "1 passed, 0 failed, 1 skipped"]);
    outcome.says(&["# known: a/a (D5)\n# skipped: b/b (not here)\n"]);
    assert_eq!(outcome.code, 0);
}

#[test]
fn a_panic_is_the_failure_of_the_test_in_progress() {
    let console = "[ 1.0] fine\r\n[ 2.0] Kernel panic - not syncing: x\r\n[ 2.0] Call Trace:\r\n";
    let outcome = Outcome::of(&[RUN, BEGIN_A], &[START], "died 0", console);
    outcome.says(&[
        "# the kernel died: ",
        "# the kernel complained:\n#   Kernel panic - not syncing: x\n#   Call Trace:\n",
        "#      1  START ...\nnot ok 1 a/a\nok 2 vm/console\n# failed: a/a\n",
        "error:1\n",
    ]);
    assert_eq!(outcome.last_lines(1), ["1 passed, 2 failed"]);
    assert_eq!(outcome.code, 1);
    let junit = outcome.file("junit.xml");
    assert!(junit.contains(r#"tests="3" skipped="0" errors="1" failures="1""#), "{junit}");
}

#[test]
fn a_sequence_that_kills_the_kernel_is_saved() {
    let run = RUN.replace("verify", "fuzz").replace(":2}", ":1}");
    let begin = r#"{"event":"begin","name":"fuzz/seed-7","about":"it"}"#;
    let open = r#"{"event":"call","n":1,"op":"device 0 OPEN","kind":"other","thread":7}"#;
    let rest = [r#"{"event":"sequence"}"#, open, START, r#"{"event":"sequence"}"#, open, START];
    let outcome = Outcome::of(&[&run, begin], &rest, "died 0", "[ 2.0] Oops: 1\n");
    outcome.says(&["make fuzz REPLAY=build/fuzz-7.ops\n", "not ok 1 fuzz/seed-7\n"]);
    let text = outcome.file("fuzz-7.ops");
    assert!(text.starts_with("# the kernel died: ") && text.ends_with(")\nSTART\n"), "{text}");
    assert_eq!(outcome.last_lines(1), ["1 passed, 1 failed"]);
}

#[test]
fn time_runs_out() {
    let outcome = Outcome::of(&[RUN, BEGIN_A, PASS_A, BEGIN_B], &[START], "timeout 300", "last\n");
    outcome.says(&[
        "# the VM was stopped after 300 s\n# the end of its console:\n#   last\n",
        "not ok 2 b/b\nok 3 vm/console\n",
    ]);
    assert_eq!(outcome.last_lines(1), ["2 passed, 1 failed"]);
}

#[test]
fn a_complaint_that_nobody_recorded() {
    let events = [RUN, BEGIN_A, UBSAN, PASS_A, BEGIN_B, PASS_B, END];
    let console = "[1.5] UBSAN: shift\n[1.5] UBSAN: shift\n[1.6] stack\n";
    let outcome = Outcome::of(&events, &[], "exit 0", console);
    outcome.says(&["# the kernel complained:\n#   UBSAN: shift\n#   stack\nnot ok 3 vm/console\n"]);
    assert_eq!((outcome.code, outcome.last_lines(1)), (1, vec!["2 passed, 1 failed"]));
}

#[test]
fn results_are_missing() {
    let outcome = Outcome::of(&[RUN, BEGIN_A, PASS_A, END], &[], "exit 0", "");
    assert_eq!((outcome.code, outcome.last_lines(1)), (1, vec!["2 passed, 1 failed"]));
    // The user has stopped it: the test in progress has no result.
    let stopped = r#"{"event":"end","stopped":true}"#;
    let outcome = Outcome::of(&[RUN, BEGIN_A, PASS_A, BEGIN_B, stopped], &[], "exit 1", "");
    outcome.says(&["ok 1 a/a\n", "not ok 2 vm/console\n"]);
    assert_eq!((outcome.code, outcome.last_lines(1)), (1, vec!["1 passed, 2 failed"]));
}

#[test]
fn a_status_that_no_test_explains() {
    let events = [RUN, BEGIN_A, PASS_A, BEGIN_B, PASS_B, END];
    let outcome = Outcome::of(&events, &[], "exit 40", "insmod: no\n");
    outcome.says(&["# dirtyscope in the VM, or", "says why\n", "#   insmod: no\nnot ok 3 vm/con"]);
    assert_eq!((outcome.code, outcome.last_lines(1)), (1, vec!["2 passed, 1 failed"]));
    let fail = PASS_B.replace("pass\"", "fail\",\"why\":\"so\"");
    let outcome = Outcome::of(&[RUN, BEGIN_A, PASS_A, BEGIN_B, &fail, END], &[], "exit 1", "");
    outcome.says(&["not ok 2 b/b\nok 3 vm/console\n"]);
    // It gave up in the middle of a test.
    let outcome = Outcome::of(&[RUN, BEGIN_A, &fail, BEGIN_B], &[START], "exit 1", "");
    outcome.says(&["ended with status 1, and no failed test says why\n", "not ok 2 b/b\n"]);
}

#[test]
fn nothing_was_run() {
    let outcome = Outcome::of(&[], &[], "died 0", "");
    outcome.says(&["KTAP version 1\n1..1\n# the kernel died: ", "not ok 1 vm/console\n"]);
    assert_eq!((outcome.code, outcome.last_lines(1)), (1, vec!["0 passed, 1 failed"]));
    let outcome = Outcome::of(&[], &[], "exit 0", "");
    assert_eq!((outcome.code, outcome.last_lines(1)), (1, vec!["0 passed, 1 failed"]));

    let run = RUN.replace(":2}", r#":0,"skip":"no mdev"}"#);
    let outcome = Outcome::of(&[&run, END], &[], "exit 4", "");
    outcome.says(&["KTAP version 1\n1..0 # SKIP no mdev\n"]);
    assert_eq!((outcome.code, outcome.last_lines(1)), (4, vec!["0 passed, 1 failed"]));
    let outcome = Outcome::of(&[&run, END], &[], "exit 4", "Oops: 1\n");
    assert_eq!(outcome.code, 1);
}

#[test]
fn a_damaged_stream() {
    let outcome = Outcome::of(&[RUN, "nonsense"], &[], "exit 0", "");
    outcome.says(&["# read events from ", "not ok 1 vm/console\n"]);
    assert_eq!(outcome.code, 1);
}
