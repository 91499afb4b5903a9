// SPDX-License-Identifier: GPL-2.0-only

//! What was done when, by a clock that orders all threads, and which of it was in progress when no
//! more came: in memory that whoever watches can read.

use crate::plan::{Act, LANES_MAX};
use anyhow::{Context as _, Result};
use std::{
    fmt::{self, Display, Formatter},
    fs::File,
    ops::Range,
    path::Path,
    sync::atomic::{AtomicU64, Ordering::SeqCst},
};
use testbed::Answer;
use vfio_client::Memory;

/// Acts of a thread at most.
pub const STEPS_MAX: usize = 256;

const SIZE: usize = LANES_MAX * STEPS_MAX * 16;

/// An act, who did it, when it began and ended, and what came of it.
#[derive(Clone, Debug)]
pub struct Record {
    /// The thread; none did what was done before and after.
    pub lane: Option<usize>,
    pub act: Act,
    pub time: Range<u64>,
    pub answer: Answer,
    /// Writes that a generator has made when it was stopped.
    pub written: u64,
}

impl Record {
    /// Whether it was in progress while another was.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.time.start < other.time.end && other.time.start < self.time.end
    }
}

impl Display for Record {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Range { start, end } = self.time;
        match self.lane {
            Some(lane) => write!(f, "{start:4}-{end:<4} thread {lane}: ")?,
            None => write!(f, "{start:4}-{end:<4}           ")?,
        }
        write!(f, "{} -> {}", self.act, self.answer)
    }
}

/// The clock, and the begin and the end of each act of a round.
pub struct Marks {
    clock: AtomicU64,
    memory: Memory,
}

impl Marks {
    /// In a file.
    pub fn open(path: &Path) -> Result<Self> {
        let what = || path.display().to_string();
        let file = File::options().read(true).write(true).open(path).with_context(what)?;
        file.set_len(SIZE as u64).with_context(what)?;
        Ok(Self { clock: AtomicU64::new(1), memory: Memory::of_file(&file, SIZE)? })
    }

    /// A round begins.
    pub fn clear(&self) {
        self.memory.write(0, &[0; SIZE]);
        self.clock.store(1, SeqCst);
    }

    /// What the clock says now; nothing else gets the same answer.
    pub fn now(&self) -> u64 {
        self.clock.fetch_add(1, SeqCst)
    }

    /// Act number `i` of a thread begins.
    pub fn begin(&self, lane: usize, i: usize) -> u64 {
        self.mark(at(lane, i))
    }

    /// It has ended.
    pub fn end(&self, lane: usize, i: usize) -> u64 {
        self.mark(at(lane, i) + 8)
    }

    fn mark(&self, at: usize) -> u64 {
        let now = self.now();
        self.memory.write(at, &now.to_ne_bytes());
        now
    }

    /// When act number `i` of a thread began and ended, if it did.
    pub fn get(&self, lane: usize, i: usize) -> (Option<u64>, Option<u64>) {
        let number = |at| {
            let mut bytes = [0; 8];
            self.memory.read(at, &mut bytes);
            Some(u64::from_ne_bytes(bytes)).filter(|&time| time != 0)
        };
        (number(at(lane, i)), number(at(lane, i) + 8))
    }
}

fn at(lane: usize, i: usize) -> usize {
    (lane * STEPS_MAX + i) * 16
}
