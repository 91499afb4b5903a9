// SPDX-License-Identifier: GPL-2.0-only

//! What was done when, by a clock that orders all threads, and which of it was in progress when no
//! more came: in memory that whoever watches can read.

use crate::plan::{Act, LANES_MAX, PLACES, place};
use anyhow::{Context as _, Result};
use std::{
    fmt::{self, Display, Formatter},
    fs::File,
    ops::Range,
    path::Path,
    sync::atomic::{AtomicU64, Ordering::SeqCst},
};
use testbed::{Answer, Op};
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

/// When an act was in progress, and what it was about.
#[derive(Clone, Debug)]
pub struct Span {
    pub lane: usize,
    pub time: Range<u64>,
    /// One bit for each of the places, see [`places`].
    pub places: u8,
}

/// The places that an act is about, one bit each. It is about all if it changes the bitmaps, or the IOMMU's
/// tables, of all mappings, else about none if it names no IOVA.
pub fn places(act: &Act) -> u8 {
    let range = match act {
        Act::Op(Op::Start | Op::Stop) | Act::JoinIommu | Act::LeaveIommu => return u8::MAX,
        Act::Op(op) => op.range(),
        Act::Generate(config) => Some((config.iova, config.length)),
        Act::Halt => None,
    };
    let Some((start, size)) = range else { return 0 };
    (0..PLACES.len()).fold(0, |all, i| {
        let (at, len) = place(i);
        if start < at + len && at < start + size { all | (1 << i) } else { all }
    })
}

/// How many of these were in progress while one of another thread's was that is about a mapping
/// that they are about, too.
pub fn count_overlapping(spans: &mut [Span]) -> usize {
    spans.sort_unstable_by_key(|span| span.time.start);
    let mut overlaps = vec![false; spans.len()];
    for (i, one) in spans.iter().enumerate() {
        let later = spans[i + 1..].iter().take_while(|other| other.time.start < one.time.end);
        for (j, other) in later.enumerate() {
            if one.lane != other.lane && one.places & other.places != 0 {
                (overlaps[i], overlaps[i + 1 + j]) = (true, true);
            }
        }
    }
    overlaps.into_iter().filter(|&overlaps| overlaps).count()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlap_is_of_time_and_mapping() {
        let (iova, size) = place(1);
        let places = places(&Act::Op(Op::get_bitmap(iova, size)));
        let span = |lane, time, places| Span { lane, time, places };
        let elsewhere = span(2, 3..4, places << 1);
        let mut spans = [span(0, 1..5, places), span(1, 2..3, places), elsewhere.clone()];
        assert_eq!(count_overlapping(&mut spans), 2);
        let after = span(1, 5..6, places);
        assert_eq!(count_overlapping(&mut [span(0, 1..5, places), after.clone(), elsewhere]), 0);
        assert_eq!(count_overlapping(&mut [span(1, 1..9, places), after]), 0);
        assert_eq!(super::places(&Act::Halt), 0);
    }
}
