// SPDX-License-Identifier: GPL-2.0-only

//! How much was done.

use crate::plan::Kind;
use std::{fmt, time::Duration};

/// What was done.
#[derive(Default)]
pub struct Done {
    /// What threads did in histories, in storms, and hammered.
    ops: [u64; 3],
    /// Of these, such as overlap with another on the same mapping.
    overlapping: [u64; 3],
    rounds: u64,
    pub histories: u64,
    pub undecided: u64,
    /// How long the threads were at work.
    pub at_work: Duration,
    /// How long it took to check what they did.
    pub checks: Duration,
}

impl Done {
    /// All that threads did.
    pub fn ops(&self) -> u64 {
        self.ops.iter().sum()
    }

    /// Threads did so many operations in a round, and so many of these overlapped.
    pub fn count(&mut self, kind: Kind, ops: usize, overlapping: usize) {
        self.ops[kind as usize] += ops as u64;
        self.overlapping[kind as usize] += overlapping as u64;
        self.rounds += 1;
    }
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let &Self { rounds, histories, undecided, at_work, checks, .. } = self;
        let percent = |overlapping: u64, ops: u64| 100 * overlapping / ops.max(1);
        let overlapping = self.overlapping.iter().sum();
        write!(
            f,
            "{} operations, {overlapping} ({} %) overlap with another on the same mapping: ",
            self.ops(),
            percent(overlapping, self.ops()),
        )?;
        for (i, kind) in ["in histories", "in storms", "hammered"].iter().enumerate() {
            let (ops, percent) = (self.ops[i], percent(self.overlapping[i], self.ops[i]));
            write!(f, "{ops} {kind} ({percent} %), ")?;
        }
        write!(
            f,
            "{rounds} rounds; {histories} histories against the model, {undecided} of them undecided; \
             threads at work {} s, checks {} s",
            at_work.as_secs(),
            checks.as_secs(),
        )
    }
}
