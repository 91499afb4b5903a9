// SPDX-License-Identifier: GPL-2.0-only

//! Rounds by chance.

use crate::{
    hammer::hammer,
    plan::{Act, Cpus, Round, SMALL, Step, place, whole},
};
use dirty_model::Protection;
use mdev_dma::{
    GeneratorConfig, Opcode, PAGE,
    uapi::{RUST_MDEV_DMA_DMA_CHUNK, RUST_MDEV_DMA_GEN_DMA_RW, RUST_MDEV_DMA_GEN_PIN},
};
use testbed::Op;
use vfio_client::Leave;

/// Numbers that follow from a seed: splitmix64.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One of 0 to `n` - 1.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// Whether one of `n` cases is the one.
    pub fn one_of(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// Known defects that rounds steer around.
#[derive(Clone, Copy, Debug, Default)]
pub struct Avoid {
    /// D2: only one thread unmaps, opens, or closes.
    pub d2: bool,
    /// D10: nobody stops tracking while another thread unmaps with the bitmap.
    pub d10: bool,
    /// D24: nobody unmaps while devices pin again and again.
    pub d24: bool,
    /// D25: nobody unmaps several mappings with the bitmap.
    pub d25: bool,
}

/// Makes rounds of so many threads.
pub struct Generator {
    pub rng: Rng,
    pub threads: usize,
    pub avoid: Avoid,
    /// Whether there is a group with an IOMMU.
    pub iommu: bool,
    /// Operations of a thread at most, where all that was answered is held against the model.
    pub length: u64,
}

impl Generator {
    /// The next round.
    pub fn round(&mut self) -> Round {
        let lanes = 2 + self.rng.below(self.threads as u64 - 1) as usize;
        let cpus = match self.rng.below(16) {
            0 => Cpus::One,
            1..=3 => Cpus::Any,
            _ => Cpus::Each,
        };
        let mut round = Round { cpus, times: 1, setup: Vec::new(), lanes: vec![Vec::new(); lanes] };
        match self.rng.below(16) {
            0 if !self.avoid.d24 => {
                round.lanes.resize(self.threads, Vec::new());
                self.storm(&mut round)
            }
            1..=5 => hammer(&mut self.rng, self.avoid, self.iommu, self.threads, &mut round),
            6 | 7 if !self.avoid.d25 => self.again(&mut round),
            _ => self.mixed(&mut round),
        }
        round
    }

    /// Anything, of a few operations each.
    fn mixed(&mut self, round: &mut Round) {
        // What is unlikely for any two threads is likely in some rounds.
        let focus = (!self.rng.one_of(4)).then(|| self.rng.below(SMALL as u64) as usize);
        let meets = self.rng.one_of(3);
        let lanes = round.lanes.len() as u64;
        let (unmaps, stops) = (self.rng.below(lanes) as usize, self.rng.one_of(2));
        for i in 0..SMALL {
            if !self.rng.one_of(4) {
                round.setup.push(map(i));
            }
        }
        if !self.rng.one_of(4) {
            round.setup.push(Op::Start);
        }
        // What is pinned can be written through pins, which takes none of type1's locks.
        let pinned = focus.filter(|_| self.rng.one_of(2));
        for device in 0..round.lanes.len() {
            if let Some((iova, length)) = pinned.map(place) {
                let op = Opcode::Pin as u32;
                round.setup.push(Op::Command { device, op, iova, length, seed: 0 });
            }
            for _ in 0..self.rng.below(3) {
                round.setup.push(self.pin(device, focus, Opcode::Pin));
            }
        }
        for lane in 0..round.lanes.len() {
            let may_unmap = !self.avoid.d2 || lane == unmaps;
            let (mut open, mut joined) = (true, true);
            for _ in 0..self.length / 2 + self.rng.below(self.length / 2 + 1) {
                let op = self.op(lane, focus, may_unmap, stops, &mut open, &mut joined);
                let pause = self.pause();
                round.lanes[lane].push(Step { meets, pause, act: Act::Op(op) });
            }
        }
    }

    /// One thread unmaps several mappings, and waits for devices before the second: others map meanwhile what
    /// it has unmapped, write and read.
    fn again(&mut self, round: &mut Round) {
        let (first, _) = place(0);
        round.setup.extend([map(0), map(2), Op::Start, self.write(0, first)]);
        // What is pinned several times takes longer to unpin.
        for device in [0, 1].repeat(16) {
            let ((iova, length), op) = (place(2), Opcode::Pin as u32);
            round.setup.push(Op::Command { device, op, iova, length, seed: 0 });
        }
        let (iova, size) = whole();
        let unmap = Act::Op(Op::unmap_bitmap(iova, size));
        round.lanes[0].push(Step { meets: true, ..Step::new(unmap) });
        for lane in 1..round.lanes.len() {
            for n in 0..12 {
                let op = match self.rng.below(if lane == 1 { 2 } else { 3 }) {
                    0 => map(0),
                    // Pages that nobody has written before.
                    1 => {
                        let page = 1 + self.rng.below(3);
                        self.write(lane, first + page * PAGE)
                    }
                    _ => Op::get_bitmap(place(0).0, place(0).1),
                };
                let pause = self.rng.below(100_000) as u32;
                round.lanes[lane].push(Step { meets: n == 0, pause, act: Act::Op(op) });
            }
        }
    }

    /// Writes a page.
    fn write(&mut self, device: usize, iova: u64) -> Op {
        let length = PAGE;
        let (op, seed) = (Opcode::DmaWrite as u32, (self.rng.next() >> 32) | 1);
        Op::Command { device, op, iova, length, seed }
    }

    fn op(
        &mut self,
        device: usize,
        focus: Option<usize>,
        may_unmap: bool,
        stops: bool,
        open: &mut bool,
        joined: &mut bool,
    ) -> Op {
        loop {
            let i = self.place(focus);
            let (iova, size) = place(i);
            return match self.rng.below(32) {
                0..=5 if *open => self.pin(device, focus, Opcode::Pin),
                6..=8 if *open => self.pin(device, focus, Opcode::Unpin),
                9..=11 if *open => self.pin(device, focus, Opcode::Write),
                12..=15 if *open => self.pin(device, focus, Opcode::DmaWrite),
                16..=18 => Op::get_bitmap(iova, size),
                19 => {
                    let (iova, size) = whole();
                    Op::get_bitmap(iova, size)
                }
                20 | 21 => map(i),
                22 if may_unmap => Op::unmap(iova, size),
                // Where STOP may be, this one isn't.
                23 | 24 if may_unmap && !(self.avoid.d10 && stops) => Op::unmap_bitmap(iova, size),
                25 if may_unmap => {
                    let (iova, size) = whole();
                    if self.rng.one_of(2) || self.avoid.d25 || (self.avoid.d10 && stops) {
                        Op::unmap(iova, size)
                    } else {
                        Op::unmap_bitmap(iova, size)
                    }
                }
                26 | 27 => Op::Start,
                28 if stops => Op::Stop,
                29 if *open && may_unmap => {
                    *open = false;
                    Op::Close { device }
                }
                30 if !*open && *joined => {
                    *joined = false;
                    let by = if self.rng.one_of(2) { Leave::Unset } else { Leave::Close };
                    Op::Leave { device, by }
                }
                29..=31 if !*open && !*joined => {
                    *joined = true;
                    Op::Join { device }
                }
                31 if !*open && *joined && may_unmap => {
                    *open = true;
                    Op::Open { device }
                }
                _ => continue,
            };
        }
    }

    /// One thread maps, reads and unmaps, while devices pin again whatever they have been told to unpin.
    fn storm(&mut self, round: &mut Round) {
        let i = if self.rng.one_of(4) { 2 } else { SMALL };
        let (iova, length) = place(i);
        round.setup.extend([map(i), Op::Start]);
        let (dirty, long) = (self.rng.one_of(2), i == SMALL);
        for n in 0..if long { 2 } else { 8 } {
            let unmap =
                if dirty { Op::unmap_bitmap(iova, length) } else { Op::unmap(iova, length) };
            let mut push =
                |pause, op| round.lanes[0].push(Step { meets: false, pause, act: Act::Op(op) });
            if n > 0 {
                push(0, map(i));
            }
            push(10_000, Op::get_bitmap(iova, length));
            push(if long { 3_000_000 } else { 10_000 }, unmap);
        }
        // One that pins all takes long to be told to unpin it; others pin a page meanwhile.
        let slow = 1 + self.rng.below(round.lanes.len() as u64 - 1) as usize;
        round.setup.extend(told_last(slow, round.lanes.len()));
        for (device, steps) in round.lanes.iter_mut().enumerate().skip(1) {
            let seed = self.rng.next() >> 32;
            if !long && self.rng.one_of(3) {
                let rw = if self.rng.one_of(3) { RUST_MDEV_DMA_GEN_DMA_RW } else { 0 };
                let (mode, limit, rate) = (RUST_MDEV_DMA_GEN_PIN | rw, 0, 0);
                let config = GeneratorConfig { iova, length, seed, limit, rate, mode };
                steps.extend(vec![Step { pause: 30_000, ..Step::new(Act::Generate(config)) }; 12]);
                steps.push(Step { pause: 30_000, ..Step::new(Act::Halt) });
                continue;
            }
            let all = !long || device == slow;
            let op = Opcode::Pin as u32;
            let length = if all { length } else { PAGE };
            let pin = Act::Op(Op::Command { device, op, iova, length, seed: 0 });
            let (pause, times) = match (long, all) {
                (true, true) => (0, 15),
                (true, false) => (1_500_000, 250),
                _ => (0, 60),
            };
            steps.extend(vec![Step { pause, ..Step::new(pin) }; times]);
        }
    }

    /// A command for some pages of a place.
    fn pin(&mut self, device: usize, focus: Option<usize>, opcode: Opcode) -> Op {
        let i = self.place(focus);
        let (start, size) = place(i);
        let pages = size / PAGE;
        let first = self.rng.below(pages);
        // What is written is in one piece for vfio_dma_rw().
        let most = match opcode {
            Opcode::DmaWrite => {
                let chunk = u64::from(RUST_MDEV_DMA_DMA_CHUNK) / PAGE;
                (chunk - first % chunk).min(pages - first)
            }
            _ => pages - first,
        };
        let count = if self.rng.one_of(2) { most } else { 1 + self.rng.below(most.min(4)) };
        let seed = match opcode {
            Opcode::Write | Opcode::DmaWrite => (self.rng.next() >> 32) | 1,
            _ => 0,
        };
        let (iova, length) = (start + first * PAGE, count * PAGE);
        Op::Command { device, op: opcode as u32, iova, length, seed }
    }

    fn place(&mut self, focus: Option<usize>) -> usize {
        match focus {
            Some(i) if !self.rng.one_of(8) => i,
            _ => self.rng.below(SMALL as u64) as usize,
        }
    }

    fn pause(&mut self) -> u32 {
        match self.rng.below(4) {
            0..=2 => 0,
            _ => self.rng.below(20_000) as u32,
        }
    }
}

/// What has the device of a thread told of unmaps after all others: type1 goes from the one that was opened last
/// to the one that was opened first.
pub fn told_last(first: usize, devices: usize) -> impl Iterator<Item = Op> {
    let open = [first].into_iter().chain((0..devices).filter(move |&device| device != first));
    let open = open.map(|device| Op::Open { device });
    (0..devices).map(|device| Op::Close { device }).chain(open)
}

/// Maps all of a place.
pub fn map(i: usize) -> Op {
    let (iova, size) = place(i);
    Op::map(iova, size, Protection::READ_WRITE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Kind;

    #[test]
    fn rounds_are_possible_and_can_be_read_back() {
        let avoid = Avoid::default();
        let mut generator =
            Generator { rng: Rng::new(1), threads: 4, avoid, iommu: true, length: 8 };
        for _ in 0..2000 {
            let round = generator.round();
            assert_eq!(round.to_string().parse::<Round>().unwrap(), round);
            assert!(round.lanes.iter().all(|steps| steps.len() < crate::record::STEPS_MAX));
        }
    }

    #[test]
    fn what_is_avoided_is_not_there() {
        let avoid = Avoid { d2: true, d10: true, d24: true, d25: true };
        let mut generator =
            Generator { rng: Rng::new(2), threads: 4, avoid, iommu: true, length: 8 };
        for _ in 0..2000 {
            let round = generator.round();
            let does = |one: fn(&Op) -> bool| {
                let does = move |step: &Step| matches!(&step.act, Act::Op(op) if one(op));
                round.lanes.iter().filter(|steps| steps.iter().any(does)).count()
            };
            let unmaps = |op: &Op| matches!(op, Op::Unmap { .. } | Op::UnmapBitmap { .. });
            assert!(does(unmaps) <= 1);
            let bitmap = does(|op| matches!(op, Op::UnmapBitmap { .. }));
            assert!(bitmap == 0 || does(|op| *op == Op::Stop) == 0);
            assert_ne!(round.kind(), Kind::Storm);
        }
    }
}
