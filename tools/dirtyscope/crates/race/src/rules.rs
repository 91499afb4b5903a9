// SPDX-License-Identifier: GPL-2.0-only

//! What must, and what may, be in each read of each page, whatever came first of what was in progress
//! at the same time. Here a page is in a read that an unmap with bitmap makes, too.
//!
//! - must: what was written while pages were being tracked is in one of the reads that ended after the
//!   write began, up to the first that began after it ended, and those that overlap with that one.
//! - may: what is in a read was written, or pinned, after the read before it began.
//! - memory has what one of the last writes put there.

use crate::{plan::Act, record::Record};
use mdev_dma::{Opcode, PAGE, pattern, uapi::RUST_MDEV_DMA_PIN_BATCH};
use std::ops::Range;
use testbed::{Op, operation};

/// Bytes at most that are pinned at once.
pub const BATCH: u64 = RUST_MDEV_DMA_PIN_BATCH as u64 * PAGE;

/// What happens to a page, each at some time in an interval.
#[derive(Default)]
struct Page<'a> {
    reads: Vec<(Range<u64>, bool, &'a Record)>,
    /// Writes that were made, each with its seed.
    writes: Vec<(Range<u64>, Option<u64>, &'a Record)>,
    /// While it may be written, or is pinned.
    active: Vec<Range<u64>>,
    /// While its mapping is made or unmapped, or tracking begins or ends.
    breaks: Vec<Range<u64>>,
    /// Whether a generator has written it, nobody knows what last.
    generated: bool,
}

/// What is wrong with a page, of an answer. `now` is what is in memory, if nobody uses it any more.
pub fn check(records: &[Record], iova: u64, now: Option<&[u8]>) -> Option<String> {
    let page = Page::new(records, iova);
    page.lost(iova).or_else(|| page.spurious(iova)).or_else(|| page.wrong(iova, now?))
}

impl<'a> Page<'a> {
    fn new(records: &'a [Record], iova: u64) -> Self {
        let mut page = Self::default();
        for record in records {
            page.add(records, record, iova);
        }
        page
    }

    fn add(&mut self, records: &'a [Record], record: &'a Record, iova: u64) {
        let (time, good) = (record.time.clone(), record.answer.status.is_ok());
        let op = match &record.act {
            Act::Generate(config) => {
                let Some(at) = iova.checked_sub(config.iova).filter(|&at| at < config.length)
                else {
                    return;
                };
                let next =
                    after(records, record, |act| matches!(act, Act::Generate(_) | Act::Halt));
                let until = next.map_or(u64::MAX, |next| next.time.end);
                self.active.push(time.start..until);
                self.generated = true;
                let halted = next.filter(|next| matches!(next.act, Act::Halt));
                let written = halted.map_or(0, |next| next.written);
                let on_page = |n| config.page(n) == config.iova + at;
                if (0..written.min(config.pages())).any(on_page) {
                    self.writes.push((time.start..until, None, record));
                }
                return;
            }
            Act::Halt | Act::JoinIommu | Act::LeaveIommu => return,
            Act::Op(op) => op,
        };
        let touches = op.range().is_some_and(|(start, size)| {
            iova.checked_sub(start).is_some_and(|offset| offset < size)
        });
        match op {
            Op::Start | Op::Stop => self.breaks.push(time),
            Op::Map { .. } if touches => self.breaks.push(time),
            Op::Unmap { .. } if touches => self.breaks.push(time),
            Op::GetBitmap { .. } | Op::UnmapBitmap { .. } if touches && good => {
                if matches!(op, Op::UnmapBitmap { .. }) {
                    self.breaks.push(time.clone());
                }
                let start = op.range().map_or(0, |(start, _)| start);
                let bitmap = record.answer.bitmap.as_ref();
                let dirty = bitmap.is_some_and(|bitmap| bitmap.get((iova - start) / PAGE));
                self.reads.push((time, dirty, record));
            }
            Op::UnmapBitmap { .. } if touches => self.breaks.push(time),
            Op::Command { op, seed, length, .. } if touches => match operation(*op) {
                Some(Opcode::Write | Opcode::DmaWrite) => {
                    self.active.push(time.clone());
                    if good {
                        self.writes.push((time, Some(*seed), record));
                    }
                }
                // For as long as it may be pinned: how long it is the model knows.
                Some(Opcode::Pin) if good => self.active.push(time.start..u64::MAX),
                // Batches before the one that failed were pinned, and unpinned.
                Some(Opcode::Pin) if *length > BATCH => self.active.push(time),
                _ => {}
            },
            _ => {}
        }
    }

    fn lost(&self, iova: u64) -> Option<String> {
        for (written, _, write) in &self.writes {
            let after = self.reads.iter().filter(|(read, ..)| read.start > written.end);
            let Some((last, _, read)) = after.min_by_key(|(read, ..)| read.start) else { continue };
            let broken = |other: &Range<u64>| {
                let unmapped = read.time == *other;
                !unmapped && other.start < last.end && written.start < other.end
            };
            // An unmap that is the read is no break.
            if self.breaks.iter().any(broken) || !self.tracked_before(written.start) {
                continue;
            }
            let mut could = self
                .reads
                .iter()
                .filter(|(read, ..)| read.end > written.start && read.start < last.end);
            if !could.any(|&(_, dirty, _)| dirty) {
                return Some(format!(
                    "lost page {iova:#x}: of\n  {write}\nnothing is in\n  {read}"
                ));
            }
        }
        None
    }

    /// Whether tracking has begun, and the page was mapped: something was read of it, or both were done.
    fn tracked_before(&self, time: u64) -> bool {
        self.reads.iter().any(|(read, ..)| {
            read.end < time && {
                !self.breaks.iter().any(|other| other.start < time && read.start < other.end)
            }
        })
    }

    fn spurious(&self, iova: u64) -> Option<String> {
        for (read, _, record) in self.reads.iter().filter(|(_, dirty, _)| *dirty) {
            let before = self.reads.iter().filter(|(other, ..)| other.end < read.start);
            let since = before.map(|(other, ..)| other.start).max().unwrap_or(0);
            let active = |time: &Range<u64>| time.start < read.end && since < time.end;
            if !self.active.iter().any(active) {
                return Some(format!(
                    "spurious page {iova:#x}: neither written nor pinned, but in\n  {record}"
                ));
            }
        }
        None
    }

    /// Whether memory has something else than what one of the last writes put there, word by word.
    fn wrong(&self, iova: u64, now: &[u8]) -> Option<String> {
        if self.generated {
            return None;
        }
        let whole = |record: &Record| match record.act {
            Act::Op(Op::Command { iova: start, length, .. }) => {
                start <= iova && iova + PAGE <= start + length
            }
            _ => false,
        };
        let later = |time: &Range<u64>| {
            self.writes.iter().any(|(other, _, by)| other.start > time.end && whole(by))
        };
        let last: Vec<_> = self.writes.iter().filter(|(time, ..)| !later(time)).collect();
        let initial = !self.writes.iter().any(|(_, _, by)| whole(by));
        let words = now.chunks_exact(8).zip((iova..).step_by(8));
        for (found, at) in words {
            let found = found.try_into().map_or(0, u64::from_le_bytes);
            let of = |one: &&(_, Option<u64>, _)| {
                one.1.is_some_and(|seed| pattern::word(seed, at) == found)
            };
            let is_initial = initial && found == 0;
            if !is_initial && !last.iter().any(of) {
                let last: Vec<_> = last.iter().map(|(_, _, by)| format!("\n  {by}")).collect();
                return Some(format!(
                    "memory at {at:#x} is {found:#x}, which none of the last writes put there:{}",
                    last.concat()
                ));
            }
        }
        None
    }
}

/// The next record of the same thread whose act is one of some.
fn after<'a>(
    records: &'a [Record],
    record: &Record,
    one: impl Fn(&Act) -> bool,
) -> Option<&'a Record> {
    let later = records.iter().filter(|other| {
        other.lane == record.lane && other.time.start > record.time.end && one(&other.act)
    });
    later.min_by_key(|other| other.time.start)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::place;
    use dirty_model::Bitmap;
    use testbed::Answer;

    fn record(lane: usize, time: Range<u64>, op: Op, bits: Option<u64>) -> Record {
        let bitmap = bits.map(|bits| Bitmap::from_words(vec![bits], 4));
        let answer = Answer { bitmap, ..Answer::of(Ok(())) };
        Record { lane: Some(lane), act: Act::Op(op), time, answer, written: 0 }
    }

    fn read(time: Range<u64>, bits: u64) -> Record {
        let (iova, size) = place(0);
        record(0, time, Op::get_bitmap(iova, size), Some(bits))
    }

    fn write(time: Range<u64>) -> Record {
        let (iova, length) = (place(0).0, PAGE);
        let op = Op::Command { device: 1, op: Opcode::DmaWrite as u32, iova, length, seed: 7 };
        record(1, time, op, None)
    }

    fn wrong(records: &[Record]) -> Option<String> {
        check(records, place(0).0, None)
    }

    #[test]
    fn must_and_may() {
        // Between two reads: in the second.
        assert_eq!(wrong(&[read(1..2, 0), write(3..4), read(5..6, 1)]), None);
        assert!(wrong(&[read(1..2, 0), write(3..4), read(5..6, 0)]).unwrap().starts_with("lost"));
        // During a read: in it, or in the next.
        let during = |first, second| {
            wrong(&[read(1..2, 0), write(3..6), read(4..5, first), read(7..8, second)])
        };
        assert_eq!(during(1, 0), None);
        assert_eq!(during(0, 1), None);
        assert!(during(0, 0).unwrap().starts_with("lost"));
        // Twice is no rule's business: the model knows.
        assert_eq!(during(1, 1), None);
        assert!(wrong(&[read(1..2, 1)]).unwrap().starts_with("spurious"));
        let stop = record(0, 3..4, Op::Stop, None);
        assert_eq!(wrong(&[read(1..2, 0), write(5..6), stop, read(7..8, 0)]), None);
    }

    #[test]
    fn memory_has_one_of_the_last_writes() {
        let iova = place(0).0;
        let mut bytes = vec![0; PAGE as usize];
        assert!(check(&[write(1..2)], iova, Some(&bytes)).unwrap().starts_with("memory"));
        pattern::fill(&mut bytes, 7, iova);
        assert_eq!(check(&[write(1..2)], iova, Some(&bytes)), None);
        assert!(check(&[], iova, Some(&bytes)).is_some());
    }
}
