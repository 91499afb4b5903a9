// SPDX-License-Identifier: GPL-2.0-only

//! Promotion: a group with an IOMMU whose driver has pinned pages says that it writes no others.
//!
//! That a promotion reports nothing for what was written before it is by intent: the driver answers for
//! its own footprint.

use crate::{join, leave};
use anyhow::{Result, bail};
use dirty_model::Errno;
use harness::{Context, Scenario, Skip, scenario};
use mdev_dma::Opcode;
use std::ops::Range;
use testbed::{
    Op, PAGE, Testbed, at, command, pages,
    slots::{EDU, PINNING, can_promote},
};

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "type1/scope/promoted",
        "a pin promotes its group: from then on what is pinned or written is dirty, and nothing else",
        promoted,
    ),
    scenario(
        "type1/scope/promoted-dma",
        "what a promoted device writes by DMA to pages that it has pinned is in memory, and dirty",
        promoted_dma,
    ),
    scenario("type1/scope/failed-pin", "a pin that fails promotes nothing", failed_pin),
    scenario(
        "type1/scope/one-of-two-promoted",
        "with one of two groups promoted everything stays dirty, until the other one has left",
        one_of_two_promoted,
    ),
    scenario(
        "type1/scope/both-promoted",
        "two groups are promoted when both have pinned, in whatever order",
        both_promoted,
    ),
    scenario(
        "type1/scope/promoted-leaves",
        "a promoted group leaves nothing behind when it leaves, and joins as one that isn't promoted",
        promoted_leaves,
    ),
    scenario(
        "type1/scope/promoted-after-unpromoted-left",
        "a group is promoted as well after others have been there",
        promoted_after_unpromoted_left,
    ),
    scenario(
        "type1/scope/stays-promoted",
        "a group stays promoted when it unpins all, when its device is closed, and after STOP",
        stays_promoted,
    ),
    scenario(
        "type1/scope/promoted-alone",
        "so is one without mediated devices beside it, mapped and unmapped while it is",
        promoted_alone,
    ),
];

/// Pages of a container of these scenarios.
const ALL: Range<u64> = 0..70;

/// A container with a mediated device, tracking, in which these groups have joined.
fn tracking<'a>(context: &'a Context<'a>, slots: &[usize]) -> Result<Testbed<'a>> {
    needs_driver()?;
    let mut bed = Testbed::with_pages(context, ALL.end)?;
    for &slot in slots {
        bed.must(join(slot))?;
        if PINNING.contains(&slot) {
            bed.must(Op::Open { device: slot })?;
        }
    }
    bed.start()?;
    bed.reports(&[ALL])?;
    Ok(bed)
}

/// Skips the scenario without the driver of the slots that pin.
pub fn needs_driver() -> Result<()> {
    if !can_promote() {
        bail!(Skip(
            "needs a driver that pins for a device with an IOMMU: insmod rust_vfio_edu".into()
        ));
    }
    Ok(())
}

fn pin(slot: usize, range: Range<u64>) -> Op {
    command(slot, Opcode::Pin, pages(range))
}

fn unpin(slot: usize, range: Range<u64>) -> Op {
    command(slot, Opcode::Unpin, pages(range))
}

fn promoted(context: &Context<'_>) -> Result<()> {
    let [edu, _] = PINNING;
    let mut bed = tracking(context, &[edu])?;
    bed.count_locked_memory()?;
    bed.must(pin(edu, 5..7))?;
    bed.reports(&[5..7])?;
    bed.reports(&[5..7])?;
    bed.each_reports(&[5..7])?;
    bed.dma_write(at(30, 1)..at(31, 9))?;
    bed.pin(40..41)?;
    bed.reports(&[5..7, 30..32, 40..41])?;
    bed.must(unpin(edu, 5..6))?;
    bed.reports(&[5..7, 40..41])?;
    bed.reports(&[6..7, 40..41])?;
    bed.check()
}

fn promoted_dma(context: &Context<'_>) -> Result<()> {
    let [edu, _] = PINNING;
    let mut bed = tracking(context, &[edu])?;
    bed.must(pin(edu, 5..7))?;
    bed.must(command(edu, Opcode::Write, at(5, 8)..at(6, 16)))?;
    bed.must(command(edu, Opcode::Read, pages(5..6)))?;
    bed.reports(&[5..7])?;
    bed.check()?;
    bed.must(unpin(edu, 5..7))?;
    bed.refused(Errno::ENXIO, command(edu, Opcode::Write, pages(5..6)))?;
    bed.reports(&[5..7])?;
    bed.reports(&[])?;
    bed.check()
}

fn failed_pin(context: &Context<'_>) -> Result<()> {
    let [edu, _] = PINNING;
    let mut bed = tracking(context, &[edu])?;
    bed.refused(Errno::EINVAL, pin(edu, 100..101))?;
    bed.reports(&[ALL])?;
    bed.must(Op::Hide { iova: at(3, 0), size: PAGE })?;
    bed.refused(Errno::EFAULT, pin(edu, 3..4))?;
    bed.must(Op::Show { iova: at(3, 0), size: PAGE })?;
    bed.reports(&[ALL])?;
    // Of a mediated device, which has nothing to promote.
    bed.pin(10..11)?;
    bed.reports(&[ALL])?;
    bed.must(pin(edu, 3..4))?;
    bed.reports(&[3..4, 10..11])?;
    bed.check()
}

fn one_of_two_promoted(context: &Context<'_>) -> Result<()> {
    let [edu, _] = PINNING;
    let mut bed = tracking(context, &[edu, EDU[1]])?;
    for n in 0..3 {
        bed.must(pin(edu, n..n + 1))?;
        bed.reports(&[ALL])?;
    }
    bed.must(unpin(edu, 0..3))?;
    bed.reports(&[ALL])?;
    bed.must(leave(EDU[1]))?;
    bed.reports(&[ALL])?;
    bed.reports(&[])?;
    bed.must(join(EDU[1]))?;
    bed.reports(&[ALL])?;
    bed.check()
}

fn both_promoted(context: &Context<'_>) -> Result<()> {
    for (first, second) in [(PINNING[0], PINNING[1]), (PINNING[1], PINNING[0])] {
        let mut bed = tracking(context, &PINNING)?;
        bed.must(pin(first, 7..8))?;
        bed.reports(&[ALL])?;
        bed.must(pin(second, 7..9))?;
        bed.reports(&[7..9])?;
        bed.must(unpin(first, 7..8))?;
        bed.reports(&[7..9])?;
        bed.must(Op::Close { device: first })?;
        bed.must(leave(first))?;
        bed.reports(&[7..9])?;
        bed.check()?;
    }
    Ok(())
}

fn promoted_leaves(context: &Context<'_>) -> Result<()> {
    let [edu, _] = PINNING;
    let mut bed = tracking(context, &[edu])?;
    for _ in 0..2 {
        bed.must(pin(edu, 5..7))?;
        bed.reports(&[5..7])?;
        bed.must(Op::Close { device: edu })?;
        bed.must(leave(edu))?;
        bed.dma_write(pages(20..21))?;
        bed.reports(&[5..7, 20..21])?;
        bed.reports(&[])?;
        bed.must(join(edu))?;
        bed.must(Op::Open { device: edu })?;
        bed.reports(&[ALL])?;
    }
    // It leaves as it came.
    bed.must(Op::Close { device: edu })?;
    bed.must(leave(edu))?;
    bed.reports(&[ALL])?;
    bed.reports(&[])?;
    bed.check()
}

fn promoted_after_unpromoted_left(context: &Context<'_>) -> Result<()> {
    let [edu, _] = PINNING;
    let mut bed = tracking(context, &[EDU[1]])?;
    bed.must(leave(EDU[1]))?;
    bed.reports(&[ALL])?;
    bed.must(join(edu))?;
    bed.must(Op::Open { device: edu })?;
    bed.reports(&[ALL])?;
    bed.must(pin(edu, 1..2))?;
    bed.reports(&[1..2])?;
    bed.check()
}

fn stays_promoted(context: &Context<'_>) -> Result<()> {
    let [edu, _] = PINNING;
    let mut bed = tracking(context, &[edu])?;
    bed.must(pin(edu, 1..2))?;
    bed.must(unpin(edu, 1..2))?;
    bed.reports(&[1..2])?;
    bed.reports(&[])?;
    bed.must(Op::Close { device: edu })?;
    bed.reports(&[])?;
    bed.must(Op::Open { device: edu })?;
    bed.reports(&[])?;
    bed.stop()?;
    bed.must(pin(edu, 2..3))?;
    bed.start()?;
    bed.reports(&[2..3])?;
    bed.must(Op::Reset { device: edu })?;
    bed.reports(&[2..3])?;
    bed.reports(&[])?;
    bed.check()
}

fn promoted_alone(context: &Context<'_>) -> Result<()> {
    needs_driver()?;
    let [edu, _] = PINNING;
    let mut bed = Testbed::joined(context, edu)?;
    bed.must(Op::Open { device: edu })?;
    bed.map(ALL)?;
    bed.count_locked_memory()?;
    bed.start()?;
    bed.reports(&[ALL])?;
    bed.must(pin(edu, 60..62))?;
    bed.map(128..130)?;
    bed.reports(&[60..62])?;
    bed.must(pin(edu, 129..130))?;
    bed.unmap_reports(128..130, &[129..130])?;
    bed.reports(&[60..62])?;
    bed.unmap(ALL)?;
    bed.check()
}
