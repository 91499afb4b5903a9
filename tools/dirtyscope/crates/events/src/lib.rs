// SPDX-License-Identifier: GPL-2.0-only

//! What a run says of itself: a stream of events, a JSON object on a line each.
//!
//! `Documentation/events.rst` is the format's reference; [`VERSION`] changes when a reader of the
//! former version would misunderstand. Addresses and sizes are in bytes of IOVA, times in seconds.
//! Runs of pages are half-open ranges.

#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod layout;

use serde::{Deserialize, Serialize};
use std::io;

/// The version of the format.
pub const VERSION: u32 = 1;

/// What takes events as they come, such as a printer of KTAP.
pub type Sink = Box<dyn FnMut(&Event) -> io::Result<()>>;

/// The exit status of a run that could run nothing, as kselftest has it.
pub const EXIT_SKIP: u8 = 4;

/// Half-open ranges of IOVA, ascending and disjoint.
pub type Runs = Vec<(u64, u64)>;

/// A line of the stream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A run begins: always the first event.
    Run(Run),
    /// A test begins: a scenario, a seed of the fuzzer, a migration.
    Begin(Begin),
    /// A sequence of the fuzzer begins, on a container of its own.
    Sequence,
    /// An operation begins.
    Call(Call),
    /// It has ended.
    Answer(Answer),
    /// Kernel and contract differ.
    Difference(Difference),
    /// A step that is no operation, or what is worth knowing of the test.
    Note {
        /// In words.
        text: String,
    },
    /// How far a test is that takes long.
    Progress {
        /// In words.
        text: String,
    },
    /// A pass of a migration's pre-copy, or its end.
    Pass(Pass),
    /// The kernel has logged a message.
    Kernel(Kernel),
    /// A sequence that fails, shrunk, to be replayed.
    Saved {
        /// The name of its file.
        file: String,
        /// What the file holds.
        text: String,
    },
    /// A test has ended.
    Result(TestResult),
    /// A run has ended: always the last event, unless the run was cut short.
    End {
        /// Whether it was stopped by a signal.
        stopped: bool,
    },
}

/// What is run, where.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// [`VERSION`]
    pub version: u32,
    /// `verify`, `fuzz` or `migrate`.
    pub engine: String,
    /// The command line.
    pub arguments: Vec<String>,
    /// `uname -r`
    pub kernel: String,
    /// Results to come.
    pub planned: usize,
    /// Why there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skip: Option<String>,
}

/// A test.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Begin {
    /// `suite/family/name`
    pub name: String,
    /// What it is about, in a line.
    pub about: String,
}

/// An operation, and who does it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Call {
    /// Counts the operations of a test, from 1.
    pub n: u64,
    /// Its text form, which a `.ops` file may hold.
    pub op: String,
    /// What it does to pages.
    pub kind: Kind,
    /// The range it is about, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range: Option<(u64, u64)>,
    /// The thread that does it.
    pub thread: i32,
    /// The slot of the device that does it, if a device does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<usize>,
    /// The number of its VFIO group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<u32>,
}

/// What an operation does to pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Maps the range.
    Map,
    /// Unmaps it, with or without its bitmap.
    Unmap,
    /// Reads its bitmap.
    Read,
    /// Begins tracking.
    Start,
    /// Ends it.
    Stop,
    /// A device pins it.
    Pin,
    /// A device unpins it.
    Unpin,
    /// A device writes to it, through pins or by `vfio_dma_rw()`.
    Write,
    /// A device is closed or reset, which unpins all that it has pinned.
    Release,
    /// The process makes it inaccessible to itself.
    Hide,
    /// The process makes it accessible again.
    Show,
    /// Anything else.
    Other,
}

/// How an operation ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// The call's number.
    pub n: u64,
    /// What the contract says.
    pub model: Reply,
    /// What the kernel did.
    pub kernel: Reply,
}

/// One side's answer to an operation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// In words.
    pub text: String,
    /// Whether it succeeded.
    pub ok: bool,
    /// Bytes transferred, from the begin of the range on, or unmapped.
    pub count: u64,
    /// The dirty pages it reports, if it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dirty: Option<Runs>,
}

/// A difference between kernel and contract.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// What differs, in words.
    pub what: String,
    /// Dirty pages that were not reported.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lost: Runs,
    /// Reported pages that are not dirty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub spurious: Runs,
    /// The address of what else is wrong, such as a byte of memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<u64>,
}

/// How a migration stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pass {
    /// Counts the passes, from 1.
    pub number: u64,
    /// Bytes of memory sent so far.
    pub sent: u64,
    /// Bytes that are dirty, and are still to be sent.
    pub remaining: u64,
}

/// A message of the kernel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Kernel {
    /// When it was logged, since boot.
    pub seconds: f64,
    /// The message.
    pub text: String,
    /// Whether it is a complaint: see [`is_complaint`].
    pub complaint: bool,
}

/// How a test ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TestResult {
    /// As in [`Begin`].
    pub name: String,
    /// What came of it.
    #[serde(flatten)]
    pub verdict: Verdict,
    /// How long it took.
    pub seconds: f64,
}

/// What came of a test.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
pub enum Verdict {
    /// It passed.
    Pass,
    /// It failed.
    Fail {
        /// How, in lines.
        why: String,
    },
    /// It showed a defect that this kernel, or QEMU, is known to have, and nothing else.
    Known {
        /// The defect's id: `D5`, of the kernel, or `Q1`, of QEMU.
        defect: String,
        /// How, in lines.
        why: String,
    },
    /// It can't be run here.
    Skip {
        /// What is missing.
        why: String,
    },
}

/// Whose defect this is, by its id.
pub fn owner_of(defect: &str) -> &'static str {
    if defect.starts_with('Q') { "QEMU" } else { "the kernel" }
}

impl Verdict {
    /// The same of a test in which the kernel has complained, which is a failure.
    pub fn with_complaints(self, complaints: &[String]) -> Self {
        let complaints = describe_complaints(complaints);
        let why = match self {
            Self::Fail { why } | Self::Known { why, .. } => format!("{why}\n{complaints}"),
            Self::Pass | Self::Skip { .. } => complaints,
        };
        Self::Fail { why }
    }
}

/// What is said of the kernel's complaints, in lines.
pub fn describe_complaints(complaints: &[String]) -> String {
    format!("the kernel complained:\n{}", complaints.join("\n"))
}

/// Messages in which the kernel complains of itself.
const COMPLAINTS: &[&str] = &[
    "Kernel panic",
    "WARNING:",
    "BUG:",
    "kernel BUG at",
    "Oops",
    "UBSAN",
    "KASAN",
    "KCSAN",
    "KFENCE",
    "general protection",
    "possible circular locking",
    "possible recursive locking",
    "suspicious RCU usage",
    "suspected memory leaks",
    "refcount_t:",
    "INFO: rcu",
    "usercopy:",
    "Bad page",
    "bad page",
    "list_add corruption",
    "list_del corruption",
    // With slab_debug: what was written beside what is allocated, or where nothing is any more.
    "BUG kmalloc-",
];

/// Whether a message says that something is wrong with the kernel. Lines that follow it, such as
/// stacks, don't count.
pub fn is_complaint(message: &str) -> bool {
    let hung = message.contains("INFO: task ") && message.contains(" blocked ");
    hung || COMPLAINTS.iter().any(|complaint| message.contains(complaint))
}

impl Event {
    /// The event as a line of the stream, without the newline.
    pub fn to_line(&self) -> String {
        // Strings, numbers and lists of them can't fail to be JSON.
        serde_json::to_string(self).expect("an event is JSON")
    }

    /// The event that a line holds.
    pub fn from_line(line: &str) -> serde_json::Result<Self> {
        serde_json::from_str(line)
    }
}

/// The operations of the last sequence among events, a line each as in a `.ops` file: the program that
/// was run, without what opens its first device, which whoever runs a program does.
pub fn last_sequence(events: &[Event]) -> String {
    let begin = events.iter().rposition(|event| *event == Event::Sequence).map_or(0, |i| i + 1);
    let ops = events[begin..].iter().filter_map(|event| match event {
        Event::Call(call) => Some(&*call.op),
        _ => None,
    });
    // Before it has closed that device, a program can do neither.
    let program = ops.skip_while(|op| ["device 0 JOIN", "device 0 OPEN"].contains(op));
    program.flat_map(|op| [op, "\n"]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_as_documented() {
        for line in [
            r#"{"event":"run","version":1,"engine":"verify","arguments":[],"kernel":"7.3","planned":2}"#,
            r#"{"event":"call","n":1,"op":"START","kind":"start","thread":7}"#,
            r#"{"event":"answer","n":3,"model":{"text":"ok","ok":true,"count":0,"dirty":[[4096,8192]]},"kernel":{"text":"EFAULT","ok":false,"count":0}}"#,
            r#"{"event":"difference","what":"it","lost":[[4096,8192]]}"#,
            r#"{"event":"result","name":"a/b","verdict":"known","defect":"D5","why":"so","seconds":0.5}"#,
            r#"{"event":"result","name":"a/b","verdict":"pass","seconds":0.5}"#,
            r#"{"event":"sequence"}"#,
            r#"{"event":"end","stopped":false}"#,
        ] {
            assert_eq!(Event::from_line(line).unwrap().to_line(), line);
        }
    }

    #[test]
    fn the_example_is_as_documented() {
        let text = include_str!("../../../../../Documentation/events.rst");
        let lines = text.lines().filter_map(|line| line.strip_prefix("    "));
        let lines: Vec<_> = lines.filter(|line| line.starts_with(r#"{"event""#)).collect();
        assert!(lines.len() > 5);
        for line in lines {
            assert_eq!(Event::from_line(line).unwrap().to_line(), line);
        }
    }

    #[test]
    fn the_last_sequence_is_a_program() {
        let call = |op: &str| {
            let op = op.to_owned();
            let (n, thread) = (0, 1);
            Event::Call(Call {
                n,
                op,
                kind: Kind::Other,
                range: None,
                thread,
                device: None,
                group: None,
            })
        };
        let opened = || [Event::Sequence, call("device 0 JOIN"), call("device 0 OPEN")];
        let mut events: Vec<_> = opened().into_iter().chain([call("STOP")]).collect();
        assert_eq!(last_sequence(&events), "STOP\n");
        events.extend(opened());
        assert_eq!(last_sequence(&events), "");
        let more = ["device 1 JOIN", "device 0 CLOSE", "device 0 OPEN", "START"];
        events.extend(more.map(call));
        assert_eq!(last_sequence(&events), more.map(|op| format!("{op}\n")).concat());
    }

    #[test]
    fn complaints_are_told_from_other_messages() {
        assert!(is_complaint("kernel BUG at mm/usercopy.c:102!"));
        assert!(is_complaint("INFO: task dirtyscope:77 blocked for more than 120 seconds."));
        assert!(is_complaint(
            "BUG kmalloc-64 (Tainted: G            E): Right Redzone overwritten"
        ));
        assert!(!is_complaint("vfio: module loaded"));
        assert!(!is_complaint("INFO: lockdep is turned off."));
        assert!(is_complaint(
            "kmemleak: 1 new suspected memory leaks (see /sys/kernel/debug/kmemleak)"
        ));
        assert!(!is_complaint("kmemleak: Kernel memory leak detector initialized"));
    }
}
