// SPDX-License-Identifier: GPL-2.0-only

//! Rounds that do the same few things again and again, so that two of them meet in a moment that is
//! short: each aims at what a lock of type1 keeps apart. Its answers aren't held against the model; a
//! kernel that goes wrong there says so, hangs, or has something left at the end.

use crate::{
    generate::{Avoid, Rng, map, told_last},
    plan::{Act, CRUMBS, PLACES, Round, SMALL, Step, place, whole},
};
use dirty_model::Protection;
use mdev_dma::{Opcode, PAGE};
use testbed::{Op, at};
use vfio_client::Leave;

/// What two threads do at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Aim {
    /// Pin and unpin pages of one mapping.
    Pins,
    /// Begin or end tracking, and use the bitmap, map, or pin.
    Tracking,
    /// Unmap what is pinned, with the bitmap, and end tracking.
    Stops,
    /// Write, read the bitmap, and pin and unpin.
    Writes,
    /// Have a group leave and join, and pin.
    Groups,
    /// Have a group with an IOMMU join, or fail to, and leave, and map, pin, or track.
    Iommu,
    /// Open and close devices, and unmap.
    Opens,
    /// Unmap, and map, what a third one pins.
    Unmaps,
    /// Pin what is being unmapped.
    Repin,
}

impl Aim {
    /// Those that are possible here, and meet nothing that is to be avoided.
    fn all(avoid: Avoid, iommu: bool, threads: usize) -> Vec<Self> {
        // Those twice that overlap most, or need most to be met.
        let mut all = vec![Self::Pins, Self::Groups];
        all.extend([Self::Tracking, Self::Writes].repeat(2));
        all.extend(iommu.then_some(Self::Iommu));
        all.extend((!avoid.d10).then_some(Self::Stops));
        all.extend((!avoid.d2).then_some(Self::Opens));
        all.extend((!avoid.d2 && !avoid.d24).then_some(Self::Unmaps));
        all.extend((!avoid.d24 && threads > 2).then_some(Self::Repin));
        all
    }
}

/// Fills a round that has threads with nothing to do yet.
pub fn hammer(rng: &mut Rng, avoid: Avoid, iommu: bool, threads: usize, round: &mut Round) {
    let all = Aim::all(avoid, iommu, threads);
    let aim = all[rng.below(all.len() as u64) as usize];
    if aim == Aim::Repin {
        // The more there are, the likelier one has a page pinned.
        round.lanes.resize(threads, Vec::new());
    }
    let make = match aim {
        Aim::Pins => pins,
        Aim::Tracking => tracking,
        Aim::Stops => stops,
        Aim::Writes => writes,
        Aim::Groups => groups,
        Aim::Iommu => with_iommu,
        Aim::Opens => opens,
        Aim::Unmaps => unmaps,
        Aim::Repin => repin,
    };
    round.times = 5 + rng.below(20) as u32;
    make(rng, round);
    // Where there are fewer CPUs than threads, those that wait keep others from what they wait for.
    if rng.one_of(2) {
        round.lanes.iter_mut().flatten().for_each(|step| step.meets = false);
    }
}

fn pins(rng: &mut Rng, round: &mut Round) {
    let i = 1 + rng.below(2) as usize;
    let (start, size) = place(i);
    round.setup.push(map(i));
    round.setup.extend((!rng.one_of(3)).then_some(Op::Start));
    let (apart, lanes) = (rng.one_of(2), round.lanes.len() as u64);
    for (lane, steps) in round.lanes.iter_mut().enumerate() {
        // All the same pages, or each its own.
        let own = size / PAGE / lanes * PAGE;
        let (iova, length) = if apart { (start + lane as u64 * own, own) } else { (start, size) };
        let act = |opcode| command(lane, opcode, iova, length);
        steps.extend([meets(act(Opcode::Pin)), meets(act(Opcode::Unpin))]);
    }
}

fn tracking(rng: &mut Rng, round: &mut Round) {
    round.setup.extend(crumbs());
    let pause = rng.below(100_000) as u32;
    let stop = Step { pause, ..meets(Op::Stop) };
    round.lanes[0].extend([meets(Op::Start), stop]);
    let first = rng.below(3);
    for lane in 1..round.lanes.len() {
        round.lanes[lane] = match (first + lane as u64) % 3 {
            0 => reads(),
            1 => pins_crumbs(lane),
            // Only one unmaps.
            _ => maps(lane),
        };
    }
}

fn stops(rng: &mut Rng, round: &mut Round) {
    let (iova, size) = place(2);
    let pin = once(command(0, Opcode::Pin, iova, size));
    let pause = rng.below(50_000) as u32;
    let unmap = Step { pause, ..meets(Op::unmap_bitmap(iova, size)) };
    round.lanes[0].extend([meets(map(2)), pin, unmap]);
    for lane in 1..round.lanes.len() {
        round.lanes[lane] = match lane % 3 {
            1 => vec![meets(Op::Start), meets(Op::Stop)],
            2 => vec![meets(command(lane, Opcode::DmaWrite, iova, size))],
            _ => reads(),
        };
    }
}

/// A write through pins takes no lock of type1: it goes on while the others take turns.
fn writes(rng: &mut Rng, round: &mut Round) {
    let (iova, size) = place(2);
    round.setup.extend([map(2), Op::Start]);
    let first = rng.below(4) as usize;
    for (lane, steps) in round.lanes.iter_mut().enumerate() {
        let command = |opcode| command(lane, opcode, iova, size);
        steps.extend(match (first + lane) % 4 {
            0 => {
                round.setup.push(command(Opcode::Pin));
                vec![meets(command(Opcode::Write)); 2]
            }
            1 => vec![meets(command(Opcode::DmaWrite)); 2],
            2 => vec![meets(Op::get_bitmap(iova, size)); 2],
            _ => vec![meets(command(Opcode::Pin)), meets(command(Opcode::Unpin))],
        });
    }
}

fn groups(_: &mut Rng, round: &mut Round) {
    let device = 0;
    round.setup.push(map(0));
    round.lanes[0].push(meets(Op::Close { device }));
    for _ in 0..8 {
        round.lanes[0].push(once(Op::Leave { device, by: Leave::Unset }));
        round.lanes[0].push(once(Op::Join { device }));
    }
    round.lanes[0].push(once(Op::Open { device }));
    for (lane, steps) in round.lanes.iter_mut().enumerate().skip(1) {
        let act = |opcode| command(lane, opcode, place(0).0, PAGE);
        steps.push(meets(act(Opcode::Pin)));
        for _ in 0..12 {
            steps.extend([once(act(Opcode::Unpin)), once(act(Opcode::Pin))]);
        }
        steps.push(once(act(Opcode::Unpin)));
    }
}

fn with_iommu(rng: &mut Rng, round: &mut Round) {
    round.times = 2 + rng.below(9) as u32;
    round.setup.push(map(2));
    if rng.one_of(2) {
        round.setup.extend(crumbs());
        // A join fails at the last of them, and has the others to unwind.
        round.setup.extend(rng.one_of(2).then(hide_last_crumb));
    }
    let pause = rng.below(100_000) as u32;
    let [join, leave] =
        [Act::JoinIommu, Act::LeaveIommu].map(|act| Step { meets: true, ..Step::new(act) });
    round.lanes[0].extend([join, Step { pause, ..leave }]);
    let first = rng.below(3);
    for lane in 1..round.lanes.len() {
        round.lanes[lane] = match (first + lane as u64) % 3 {
            // Either may be first, to wait for the other's lock.
            0 => {
                vec![meets(Op::Start), Step { pause: rng.below(200_000) as u32, ..meets(Op::Stop) }]
            }
            1 => {
                let (iova, size) = place(2);
                let act = |opcode| meets(command(lane, opcode, iova, size));
                vec![act(Opcode::Pin), act(Opcode::Unpin)]
            }
            _ => maps(lane),
        };
    }
}

fn opens(rng: &mut Rng, round: &mut Round) {
    round.setup.push(map(1));
    // What one of the others unmaps has them told to unpin.
    let unmaps = rng.one_of(2);
    if !unmaps {
        // Two that add to their list at once meet in a few instructions.
        round.times *= 10;
    }
    for (device, steps) in round.lanes.iter_mut().enumerate() {
        if device == 0 && unmaps {
            let (iova, size) = place(2);
            let pin = once(command(device, Opcode::Pin, iova, size));
            steps.extend([meets(map(2)), pin, meets(Op::unmap(iova, size))]);
            continue;
        }
        if unmaps {
            let (iova, size) = place(1);
            steps.push(meets(command(device, Opcode::Pin, iova, size)));
        }
        let pause = if unmaps { rng.below(50_000) as u32 } else { 0 };
        let close = Step { pause, ..meets(Op::Close { device }) };
        steps.extend([close, meets(Op::Open { device })]);
    }
}

fn unmaps(rng: &mut Rng, round: &mut Round) {
    let i = 1 + rng.below(2) as usize;
    let (iova, size) = place(i);
    for (lane, steps) in round.lanes.iter_mut().enumerate() {
        if lane < 2 {
            steps.extend([meets(map(i)), meets(Op::unmap(iova, size))]);
        } else {
            steps.extend(vec![once(command(lane, Opcode::Pin, iova, size)); 4]);
        }
    }
}

/// One device takes long to unpin, others pin a page meanwhile: as long as the unmap takes, whatever that is.
fn repin(rng: &mut Rng, round: &mut Round) {
    let i = if rng.one_of(3) { 2 } else { SMALL };
    let (iova, size) = place(i);
    (round.times, round.lanes[0]) = (2 + rng.below(3) as u32, vec![once(map(i))]);
    let pause = if i == SMALL { 3_000_000 } else { 100_000 };
    round.lanes[0].push(Step { pause, ..once(Op::unmap(iova, size)) });
    let slow = 1;
    round.setup.extend(told_last(slow, round.lanes.len()));
    for (lane, steps) in round.lanes.iter_mut().enumerate().skip(1) {
        let length = if lane == slow { size } else { PAGE };
        let pause = if lane != slow && i == SMALL { 500_000 } else { 0 };
        steps.push(Step { pause, ..once(command(lane, Opcode::Pin, iova, length)) });
    }
}

/// Maps, writes and unmaps.
fn maps(lane: usize) -> Vec<Step> {
    let (iova, size) = place(0);
    vec![
        meets(map(0)),
        once(command(lane, Opcode::DmaWrite, iova, size)),
        once(Op::get_bitmap(iova, size)),
        meets(Op::unmap(iova, size)),
    ]
}

/// Reads the bitmap of everything.
fn reads() -> Vec<Step> {
    let (iova, size) = whole();
    vec![meets(Op::get_bitmap(iova, size)); 2]
}

fn pins_crumbs(lane: usize) -> Vec<Step> {
    let (iova, size) = place(CRUMBS);
    let act = |opcode| meets(command(lane, opcode, iova, size));
    vec![act(Opcode::Pin), act(Opcode::Unpin)]
}

/// Many mappings, of a page each.
fn crumbs() -> impl Iterator<Item = Op> {
    PLACES[CRUMBS].clone().map(|page| Op::map(at(page, 0), PAGE, Protection::READ_WRITE))
}

/// Has the last of them without memory.
fn hide_last_crumb() -> Op {
    let (iova, size) = place(CRUMBS);
    Op::Hide { iova: iova + size - PAGE, size: PAGE }
}

/// Done when the others have come as far.
fn meets(op: Op) -> Step {
    Step { meets: true, ..once(op) }
}

/// Done at once.
fn once(op: Op) -> Step {
    Step::new(Act::Op(op))
}

fn command(device: usize, opcode: Opcode, iova: u64, length: u64) -> Op {
    let seed = matches!(opcode, Opcode::Write | Opcode::DmaWrite).into();
    Op::Command { device, op: opcode as u32, iova, length, seed }
}
