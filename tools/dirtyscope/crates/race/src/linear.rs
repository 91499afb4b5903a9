// SPDX-License-Identifier: GPL-2.0-only

//! Whether what was answered is what some order of the operations would answer that were in progress
//! at the same time: linearizability, over the model.
//!
//! Three things aren't done at once, and nobody promises that they are. An unmap has devices unpin, one
//! after the other, page by page, before it unmaps, and it unmaps one mapping after the other; closing a
//! device unpins its pages, too. What others see meanwhile is searched for as well. And while a mapping
//! is being unmapped, it may be refused to pin pages of it.

use crate::{
    live::Counters,
    plan::{Act, PLACES},
    record::Record,
    rules::BATCH,
    state::State,
};
use dirty_model::{Bitmap, Command, CommandKind, DeviceId, Errno, Errnos};
use mdev_dma::{Opcode, PAGE};
use std::{
    collections::{BTreeMap, HashSet, hash_map::DefaultHasher},
    hash::{Hash, Hasher},
    ops::Range,
};
use testbed::{Answer, Op, operation};

/// Bytes of the largest mapping: more than that is unmapped one mapping after the other.
const PLACE_MAX: u64 = (PLACES[2].end - PLACES[2].start) * PAGE;

/// Steps of a search at most.
const STEPS_MAX: usize = 30_000;

/// What a search says.
#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    /// There is such an order.
    Order,
    /// There is none. Says how far the longest one came: these are what could be no next one.
    None { stuck: Vec<String> },
    /// It took too long.
    Undecided,
}

/// What counters said after so many records, and what the process has locked for itself.
#[derive(Clone)]
pub struct Counted {
    pub after: usize,
    pub counters: Counters,
    pub besides: u64,
    /// Whether the kernel has D25: an unmap that unmaps twice where a mapping was made meanwhile writes
    /// its bitmap twice there, and what the first had to say is lost.
    pub overwrites: bool,
}

/// Searches for an order of `records`, which begins in `state`.
pub fn search(state: &State, records: &[Record], counted: &Counted) -> Found {
    assert!(records.len() < 128, "{} records are too many", records.len());
    let search =
        Search { records, counted, seen: HashSet::new(), steps: 0, best: 0, stuck: vec![] };
    search.run(state)
}

/// A state, and what unmaps have done that aren't done.
#[derive(Clone)]
struct Node {
    state: State,
    /// By record: bytes that were unmapped, and what was dirty of them.
    partial: BTreeMap<usize, (u64, Option<Bitmap>)>,
    done: u128,
}

struct Search<'a> {
    records: &'a [Record],
    counted: &'a Counted,
    seen: HashSet<(u128, u64)>,
    steps: usize,
    best: u32,
    stuck: Vec<String>,
}

impl Search<'_> {
    fn run(mut self, state: &State) -> Found {
        let node = Node { state: state.clone(), partial: BTreeMap::new(), done: 0 };
        match self.goes_on(node) {
            true => Found::Order,
            false if self.steps > STEPS_MAX => Found::Undecided,
            false => Found::None { stuck: self.stuck },
        }
    }

    /// Whether there is an order for the rest.
    fn goes_on(&mut self, node: Node) -> bool {
        self.steps += 1;
        if self.steps > STEPS_MAX {
            return false;
        }
        let count = node.done.count_ones();
        if count as usize == self.counted.after {
            let Counted { counters, besides, .. } = self.counted;
            if let Some(why) = node.state.differs(counters, *besides) {
                self.is_stuck(count, || why);
                return false;
            }
        }
        if count as usize == self.records.len() {
            return true;
        }
        let next = self.next(node.done);
        if next.len() > 1 {
            let mut hasher = DefaultHasher::new();
            (&node.state, &node.partial).hash(&mut hasher);
            if !self.seen.insert((node.done, hasher.finish())) {
                return false;
            }
        }
        for &i in &next {
            for after in self.done(&node, i, &next) {
                if self.goes_on(after) {
                    return true;
                }
            }
        }
        next.iter()
            .any(|&i| self.half_done(&node, i, &next).into_iter().any(|after| self.goes_on(after)))
    }

    /// Those that can be next: none that isn't done ended before they began. First who ended first.
    fn next(&self, done: u128) -> Vec<usize> {
        let rest = || (0..self.records.len()).filter(|i| done & (1 << i) == 0);
        let end = rest().map(|i| self.records[i].time.end).min().unwrap_or(0);
        let mut next: Vec<_> = rest().filter(|&i| self.records[i].time.start < end).collect();
        next.sort_by_key(|&i| self.records[i].time.end);
        next
    }

    /// What is after record `i`, if that can be next.
    fn done(&mut self, node: &Node, i: usize, next: &[usize]) -> Vec<Node> {
        let record = &self.records[i];
        let Act::Op(op) = &record.act else { return Vec::new() };
        let mut nodes = Vec::new();
        if record.answer.status == Err(Errno::EINVAL) && self.may_be_refused(op, next) {
            nodes.push(Node { done: node.done | (1 << i), ..node.clone() });
        }
        let mut after = node.clone();
        after.done |= 1 << i;
        let mut partial = after.partial.remove(&i);
        if let (true, Some((_, Some(dirty))), Some(range)) =
            (self.counted.overwrites, &mut partial, self.unmapped_by(i))
        {
            for mapping in node.state.model.mappings().filter(|one| range.contains(&one.iova)) {
                forget(dirty, mapping.iova - range.start, mapping.size);
            }
        }
        let mut owed = after.state.apply(op);
        if let (Ok(()), Some((count, dirty))) = (&owed.status, partial) {
            owed.count += count;
            if let (Some(bitmap), Some(dirty)) = (&mut owed.bitmap, dirty) {
                bitmap.merge(&dirty, 0);
            }
        }
        if owed.allows(&Answer { digest: 0, ..record.answer.clone() }) {
            nodes.insert(0, after);
        } else if nodes.is_empty() {
            self.is_stuck(node.done.count_ones(), || format!("{record}, but must be: {owed}"));
        }
        nodes
    }

    fn is_stuck(&mut self, count: u32, why: impl FnOnce() -> String) {
        if count > self.best {
            self.best = count;
            self.stuck.clear();
        }
        if count == self.best && self.stuck.len() < 8 {
            let why = why();
            if !self.stuck.contains(&why) {
                self.stuck.push(why);
            }
        }
    }

    /// Whether it is to pin pages that are being unmapped.
    fn may_be_refused(&self, op: &Op, next: &[usize]) -> bool {
        let Op::Command { op, iova, length, .. } = *op else { return false };
        let pin = operation(op) == Some(Opcode::Pin);
        let overlaps = |range: Range<u64>| iova < range.end && range.start < iova + length;
        pin && next.iter().any(|&i| self.unmapped_by(i).is_some_and(overlaps))
    }

    /// The range that record `i` unmaps.
    fn unmapped_by(&self, i: usize) -> Option<Range<u64>> {
        match self.records[i].act {
            Act::Op(Op::Unmap { iova, size, .. } | Op::UnmapBitmap { iova, size, .. }) => {
                Some(iova..iova + size)
            }
            _ => None,
        }
    }

    /// Whether one of those that can be next, but `i`, tells by its answer which of these pins there are.
    fn are_seen(&self, pins: &[(DeviceId, u64)], i: usize, next: &[usize]) -> bool {
        let sees = |op: &Op| match *op {
            Op::Map { .. } | Op::Stop | Op::Join { .. } | Op::Leave { .. } | Op::Open { .. } => {
                false
            }
            Op::Command { op, .. }
                if matches!(operation(op), Some(Opcode::DmaWrite | Opcode::DmaRead)) =>
            {
                false
            }
            _ => op.range().is_none_or(|(iova, size)| {
                pins.iter().any(|&(_, page)| page < iova + size && iova < page + PAGE)
            }),
        };
        let others = next.iter().filter(|&&other| other != i);
        others.map(|&other| &self.records[other].act).any(|act| match act {
            Act::Op(op) => sees(op),
            _ => true,
        })
    }

    /// What is after a part of record `i`.
    fn half_done(&self, node: &Node, i: usize, next: &[usize]) -> Vec<Node> {
        // Who sees nothing of them doesn't care which pins there still are; but an unmap that fails leaves them so.
        let fails = self.records[i].answer.status.is_err();
        let closes = matches!(self.records[i].act, Act::Op(Op::Close { .. }));
        let revoked = |pins: &[(DeviceId, u64)]| match fails || self.are_seen(pins, i, next) {
            true => revoked(node, pins, closes),
            false => Vec::new(),
        };
        if let Act::Op(Op::Close { device }) = self.records[i].act {
            let mut pins = node.state.pins_in(&(0..u64::MAX));
            let own = node.state.devices().find(|&(lane, _)| lane == device);
            pins.retain(|&(id, _)| own.is_some_and(|(_, own)| own == id));
            return revoked(&pins);
        }
        let Some(range) = self.unmapped_by(i) else { return Vec::new() };
        let mut nodes = revoked(&node.state.pins_in(&range));
        let mut mappings = node.state.model.mappings().filter(|one| range.contains(&one.iova));
        // The first of several, or one that may be mapped again.
        let again = range.end - range.start > PLACE_MAX;
        if let Some(first) = mappings.next().filter(|_| again) {
            let mut after = node.clone();
            let dirty = matches!(self.records[i].act, Act::Op(Op::UnmapBitmap { .. }));
            let op = match dirty {
                true => Op::unmap_bitmap(first.iova, first.size),
                false => Op::unmap(first.iova, first.size),
            };
            let Answer { status, bitmap, .. } = after.state.apply(&op);
            if status == Ok::<(), Errnos>(()) {
                let pages = (range.end - range.start) / PAGE;
                let (count, all) = after
                    .partial
                    .entry(i)
                    .or_insert_with(|| (0, dirty.then(|| Bitmap::new(pages))));
                *count += first.size;
                if let (Some(all), Some(bitmap)) = (all, bitmap) {
                    if self.counted.overwrites {
                        forget(all, first.iova - range.start, first.size);
                    }
                    all.merge(&bitmap, (first.iova - range.start) / PAGE);
                }
                nodes.insert(0, after);
            }
        }
        nodes
    }
}

/// Clears the bits of a mapping.
fn forget(bitmap: &mut Bitmap, offset: u64, size: u64) {
    for page in offset / PAGE..(offset + size) / PAGE {
        if bitmap.get(page) {
            bitmap.flip(page);
        }
    }
}

/// What is after some of these pins were taken back: all of a device at once, or as our driver does it, one pin of each
/// page of the first run: a page that is pinned twice stays so while others have gone. A device that is closed begins
/// with `any` of its batches, which are in a tree.
fn revoked(node: &Node, pins: &[(DeviceId, u64)], any: bool) -> Vec<Node> {
    let mut nodes = Vec::new();
    for of_device in pins.chunk_by(|a, b| a.0 == b.0) {
        let mut all = node.clone();
        for &(id, page) in of_device {
            all.state.model.revoke(id, page..page + PAGE);
        }
        nodes.insert(0, all);
        let batches = of_device.chunk_by(|a, b| a.1 / BATCH == b.1 / BATCH);
        for batch in batches.take(if any { usize::MAX } else { 1 }) {
            let run = batch.chunk_by(|a, b| a.1 + PAGE == b.1).next().unwrap_or_default();
            let &[(id, iova), ..] = run else { continue };
            let (kind, length) = (Some(CommandKind::Unpin), run.len() as u64 * PAGE);
            let mut one = node.clone();
            one.state.model.command(id, &Command { kind, iova, length });
            nodes.push(one);
        }
    }
    nodes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{generate::map, plan::place};
    use testbed::limits_of;

    fn record(lane: usize, time: Range<u64>, op: Op, answer: Answer) -> Record {
        Record { lane: Some(lane), act: Act::Op(op), time, answer, written: 0 }
    }

    fn good() -> Answer {
        Answer::of(Ok(()))
    }

    fn command(device: usize, op: Opcode) -> Op {
        let (iova, _) = place(0);
        Op::Command { device, op: op as u32, iova, length: 4096, seed: 1 }
    }

    fn done(count: u64) -> Answer {
        Answer { count, ..good() }
    }

    fn dirty(bits: u64) -> Answer {
        Answer { bitmap: Some(Bitmap::from_words(vec![bits], 4)), ..good() }
    }

    fn found(records: &[Record]) -> Found {
        found_if(records, false)
    }

    fn found_if(records: &[Record], overwrites: bool) -> Found {
        let state = State::new(2, 100, limits_of(1000, 1 << 20));
        let counters = Counters { pins: vec![], dma_avail: 0, locked: 0 };
        search(&state, records, &Counted { after: usize::MAX, counters, besides: 0, overwrites })
    }

    fn begin() -> Vec<Record> {
        let (iova, size) = place(0);
        let map = Op::map(iova, size, dirty_model::Protection::READ_WRITE);
        vec![record(0, 1..2, map, good()), record(0, 3..4, Op::Start, good())]
    }

    fn read(time: Range<u64>, bits: u64) -> Record {
        let (iova, size) = place(0);
        record(0, time, Op::get_bitmap(iova, size), dirty(bits))
    }

    #[test]
    fn a_write_during_a_read_is_in_it_or_in_the_next() {
        for (first, second, allowed) in [(1, 0, true), (0, 1, true), (0, 0, false), (1, 1, false)] {
            let mut records = begin();
            records.push(record(1, 5..8, command(1, Opcode::DmaWrite), done(4096)));
            records.push(read(6..7, first));
            records.push(read(9..10, second));
            assert_eq!(found(&records) == Found::Order, allowed, "{first} {second}");
        }
    }

    #[test]
    fn a_write_before_a_read_is_in_it() {
        let mut records = begin();
        records.push(record(1, 5..6, command(1, Opcode::DmaWrite), done(4096)));
        records.push(read(7..8, 0));
        assert!(matches!(found(&records), Found::None { .. }));
    }

    #[test]
    fn an_unmap_takes_pins_first_and_may_refuse_others() {
        let (iova, size) = place(0);
        let mut records = begin();
        records.push(record(1, 5..6, command(1, Opcode::Pin), done(4096)));
        records.push(record(0, 7..20, Op::unmap(iova, size), done(size)));
        let refused = |errno| Answer::of(Err(errno));
        records.push(record(1, 8..9, command(1, Opcode::Write), refused(Errno::ENXIO)));
        records.push(record(1, 10..11, command(1, Opcode::DmaWrite), done(4096)));
        records.push(record(1, 12..13, command(1, Opcode::Pin), refused(Errno::EINVAL)));
        records.push(record(1, 14..15, command(1, Opcode::DmaWrite), done(4096)));
        assert_eq!(found(&records), Found::Order);
        records.last_mut().unwrap().time = 21..22;
        assert!(matches!(found(&records), Found::None { .. }));
    }

    #[test]
    fn what_an_unmap_forgets_of_many_pins_is_decided() {
        let [(iova, size), (other, length)] = [place(0), place(2)];
        let map = |at, size| Op::map(at, size, dirty_model::Protection::READ_WRITE);
        let mut records = begin();
        records.push(record(0, 5..6, map(other, length), good()));
        records.push(record(0, 7..8, command(0, Opcode::DmaWrite), done(4096)));
        for device in [0, 1] {
            let op = Op::Command { device, op: Opcode::Pin as u32, iova: other, length, seed: 0 };
            records.push(record(0, 9..10, op, done(length)));
        }
        // The second of these is mapped while the unmap waits for devices, and unmapped, too.
        for (n, answer) in [Err(Errno::EEXIST), Ok(()), Err(Errno::EEXIST)].into_iter().enumerate()
        {
            let time = 12 + 2 * n as u64;
            records.push(record(1, time..time + 1, map(iova, size), Answer::of(answer)));
        }
        let (all, pages) = (other + length - iova, (other + length - iova) / PAGE);
        let mut bitmap = Bitmap::new(pages);
        bitmap.set((other - iova) / PAGE..pages);
        let count = 2 * size + length;
        let mut unmapped = |lost: bool| {
            if !lost {
                bitmap.set(0..1);
            }
            let answer = Answer { count, bitmap: Some(bitmap.clone()), ..good() };
            record(0, 11..30, Op::unmap_bitmap(iova, all), answer)
        };
        records.push(unmapped(true));
        assert!(matches!(found(&records), Found::None { .. }));
        assert_eq!(found_if(&records, true), Found::Order);
        *records.last_mut().unwrap() = unmapped(false);
        assert_eq!(found(&records), Found::Order);
    }

    #[test]
    fn what_is_pinned_twice_is_unpinned_later() {
        let (iova, size) = place(0);
        let pin = |iova, length, time| {
            let op = Op::Command { device: 1, op: Opcode::Pin as u32, iova, length, seed: 0 };
            record(1, time, op, done(length))
        };
        for (left, allowed) in [(0b1100, true), (0b0100, true), (0b1111, true), (0b0011, false)] {
            let mut records = begin();
            records.push(pin(iova, size, 5..6));
            records.push(pin(iova + 2 * PAGE, 2 * PAGE, 7..8));
            records.push(pin(iova + 2 * PAGE, PAGE, 9..10));
            // What is pinned when this one has read is in the bitmap of the unmap.
            records.push(read(12..13, 0b1111));
            let answer = Answer { count: size, ..dirty(left) };
            records.push(record(0, 11..20, Op::unmap_bitmap(iova, size), answer));
            assert_eq!(found(&records) == Found::Order, allowed, "{left:b}");
        }
    }

    #[test]
    fn a_close_unpins_batches_in_any_order() {
        for (gone, pinned) in [(0, 2), (2, 0)] {
            let pin = |i| {
                let (iova, op) = (place(i).0, Opcode::Pin as u32);
                Op::Command { device: 1, op, iova, length: PAGE, seed: 0 }
            };
            let read = |time, i, bits| {
                let (iova, size) = place(i);
                let bitmap = Some(Bitmap::from_words(vec![bits], size / PAGE));
                record(0, time, Op::get_bitmap(iova, size), Answer { bitmap, ..good() })
            };
            let records = [
                record(0, 0..1, map(0), good()),
                record(0, 2..3, map(2), good()),
                record(1, 4..5, pin(0), done(PAGE)),
                record(1, 6..7, pin(2), done(PAGE)),
                record(0, 8..9, Op::Start, good()),
                record(1, 10..30, Op::Close { device: 1 }, good()),
                read(11..12, gone, 1),
                read(13..14, gone, 0),
                read(15..16, pinned, 1),
                read(17..18, pinned, 1),
            ];
            assert_eq!(found(&records), Found::Order);
        }
    }

    #[test]
    fn an_unmap_that_fails_may_have_taken_pins() {
        let (iova, size) = place(0);
        let mut records = begin();
        records.push(record(1, 5..6, command(1, Opcode::Pin), done(4096)));
        records.push(record(
            0,
            7..10,
            Op::unmap_bitmap(iova, size),
            Answer::of(Err(Errno::EINVAL)),
        ));
        records.push(record(1, 8..9, Op::Stop, good()));
        records.push(record(1, 11..12, command(1, Opcode::Unpin), Answer::of(Err(Errno::ENXIO))));
        assert_eq!(found(&records), Found::Order);
    }
}
