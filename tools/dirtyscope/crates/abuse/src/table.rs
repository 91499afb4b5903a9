// SPDX-License-Identifier: GPL-2.0-only

//! What came of inputs: entry points against errnos.

use crate::input::Outcome;
use std::{collections::BTreeMap, fmt, fmt::Write as _};

#[derive(Default)]
pub struct Table {
    /// By entry point and errno.
    counts: BTreeMap<String, BTreeMap<i32, u64>>,
    pub inputs: u64,
    /// Those that passed what is checked first.
    pub passed: u64,
    /// Those that would have changed this process, or for which there is no such file.
    not_made: u64,
}

impl Table {
    pub fn add(&mut self, outcome: &Outcome) {
        let Some(errno) = outcome.errno else {
            self.not_made += 1;
            return;
        };
        self.inputs += 1;
        self.passed += u64::from(outcome.passes);
        *self.counts.entry(outcome.entry.clone()).or_default().entry(errno).or_default() += 1;
    }

    /// What came of a call that no first check refuses.
    pub fn count(&mut self, entry: &str, errno: i32) {
        self.add(&Outcome { entry: entry.into(), errno: Some(errno), passes: true });
    }

    pub fn append(&mut self, other: Self) {
        self.inputs += other.inputs;
        self.passed += other.passed;
        self.not_made += other.not_made;
        for (entry, errnos) in other.counts {
            let mine = self.counts.entry(entry).or_default();
            for (errno, count) in errnos {
                *mine.entry(errno).or_default() += count;
            }
        }
    }

    /// A line for each entry point.
    pub fn lines(&self) -> Vec<String> {
        let line = |(entry, errnos): (&String, &BTreeMap<i32, u64>)| {
            let mut line = format!("{entry:<22}");
            for (errno, count) in errnos {
                let _ = write!(line, " {} {count}", name(*errno));
            }
            line
        };
        self.counts.iter().map(line).collect()
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { inputs, passed, not_made, .. } = self;
        let percent = 100 * passed / inputs.max(&1);
        write!(f, "{inputs} bad inputs, {percent} % pass what is checked first")?;
        if *not_made > 0 { write!(f, ", {not_made} not made") } else { Ok(()) }
    }
}

/// The name of an errno, as far as they come here.
fn name(errno: i32) -> String {
    const NAMES: [(i32, &str); 28] = [
        (0, "ok"),
        (1, "EPERM"),
        (2, "ENOENT"),
        (4, "EINTR"),
        (5, "EIO"),
        (6, "ENXIO"),
        (7, "E2BIG"),
        (9, "EBADF"),
        (11, "EAGAIN"),
        (12, "ENOMEM"),
        (13, "EACCES"),
        (14, "EFAULT"),
        (16, "EBUSY"),
        (17, "EEXIST"),
        (19, "ENODEV"),
        (22, "EINVAL"),
        (24, "EMFILE"),
        (25, "ENOTTY"),
        (27, "EFBIG"),
        (28, "ENOSPC"),
        (29, "ESPIPE"),
        (34, "ERANGE"),
        (38, "ENOSYS"),
        (42, "ENOMSG"),
        (75, "EOVERFLOW"),
        (95, "EOPNOTSUPP"),
        (115, "EINPROGRESS"),
        (512, "ERESTARTSYS"),
    ];
    let known = NAMES.iter().find(|(number, _)| *number == errno);
    known.map_or_else(|| format!("errno {errno}"), |(_, name)| (*name).into())
}
