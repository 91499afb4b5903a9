// SPDX-License-Identifier: GPL-2.0-only

//! A machine's memory: filled, and held against what it must contain.

use crate::machine::{Machine, RAM, Role};
use anyhow::{Context as _, Result};
use events::Difference;
use mdev_dma::{Contents, PAGE, contents::WrongPages, pattern};
use std::{fmt, os::unix::fs::FileExt};

/// Bytes that are read or written at once.
const CHUNK: u64 = 256 * PAGE;

/// Fills all of a machine's memory with a pattern.
pub fn fill(machine: &Machine, seed: u64) -> Result<Contents> {
    let mut chunk = vec![0; CHUNK as usize];
    for at in (0..RAM).step_by(chunk.len()) {
        pattern::fill(&mut chunk, seed, at);
        machine.ram().write_all_at(&chunk, at).context("fill the machine's memory")?;
    }
    Ok(Contents::filled(0, RAM, seed))
}

/// Compares all of a machine's memory. The error is [`WrongMemory`] if it differs.
pub fn check(contents: &Contents, machine: &Machine) -> Result<()> {
    let mut chunk = vec![0; CHUNK as usize];
    let mut wrong = WrongPages::default();
    for at in (0..RAM).step_by(chunk.len()) {
        machine.ram().read_exact_at(&mut chunk, at).context("read the machine's memory")?;
        wrong.append(contents.wrong_pages(at, &chunk));
    }
    if wrong.is_empty() {
        return Ok(());
    }
    Err(WrongMemory { whose: machine.name.clone(), role: machine.role, wrong }.into())
}

/// Memory that doesn't contain what was written to it last.
#[derive(Debug)]
pub struct WrongMemory {
    whose: String,
    /// Whether that is the machine that was left, or the one that was migrated to.
    pub role: Role,
    wrong: WrongPages,
}

impl WrongMemory {
    /// As an event: what a migration has lost.
    pub fn difference(&self) -> Difference {
        let lost = self.wrong.runs().into_iter().map(|run| (run.start, run.end));
        let what = format!("the memory of {} isn't what was written to it", self.whose);
        Difference { what, lost: lost.collect(), ..Default::default() }
    }
}

impl fmt::Display for WrongMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the memory of {} isn't what was written to it\n{}", self.whose, self.wrong)
    }
}

impl std::error::Error for WrongMemory {}
