// SPDX-License-Identifier: GPL-2.0-only

//! Demotion: while a device does DMA that nobody accounts for, everything is dirty, and once more when
//! it has left.

use crate::{join, leave};
use anyhow::{Result, ensure};
use dirty_model::{Errno, Protection};
use harness::{Context, Scenario, scenario};
use mdev_dma::Opcode;
use std::ops::Range;
use testbed::{
    Op, PAGE, Testbed, at, command, map, pages,
    slots::{EDU, PAIR},
    status,
};
use vfio_client::{Fork, Leave};

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "type1/scope/joins-while-tracking",
        "with a device that does DMA by itself, all pages are dirty in every read, and once after it left",
        joins_while_tracking,
    ),
    scenario(
        "type1/scope/joins-before-start",
        "so are they if it was there before START",
        joins_before_start,
    ),
    scenario(
        "type1/scope/left-before-start",
        "nothing is left of it if it left before START",
        left_before_start,
    ),
    scenario(
        "type1/scope/between-reads",
        "if it joined and left between two reads, everything is dirty once",
        between_reads,
    ),
    scenario(
        "type1/scope/stop-while-joined",
        "STOP forgets what it may have written; START begins with everything if it is still there",
        stop_while_joined,
    ),
    scenario(
        "type1/scope/two-groups",
        "of two such groups the last one to leave ends it",
        two_groups,
    ),
    scenario(
        "type1/scope/shared-group",
        "a group of two devices does it, opened or not, and stays while one is open",
        shared_group,
    ),
    scenario(
        "type1/scope/maps-and-unmaps",
        "what is mapped meanwhile is all dirty, and so is what is unmapped with its bitmap",
        maps_and_unmaps,
    ),
    scenario(
        "type1/scope/pins-and-writes",
        "pins and writes of mediated devices go on beside it, and are all that is dirty afterwards",
        pins_and_writes,
    ),
    scenario(
        "type1/scope/emulated-leaves",
        "the last mediated device may leave, and another join, with everything tracked on",
        emulated_leaves,
    ),
    scenario(
        "type1/scope/leaves-by-close",
        "a group leaves when its file is closed, as it does by UNSET_CONTAINER",
        leaves_by_close,
    ),
    scenario(
        "type1/scope/leaves-by-death",
        "a group leaves when the last process dies that has its file",
        leaves_by_death,
    ),
    scenario(
        "type1/scope/dma",
        "what a device writes by DMA through the IOMMU is in memory, and dirty",
        dma,
    ),
    scenario(
        "type1/scope/last-group",
        "with the last group go all mappings, tracking, and locked memory",
        last_group,
    ),
];

/// Pages of a container of these scenarios.
const PAGES: u64 = 70;

/// All of them.
const ALL: Range<u64> = 0..PAGES;

/// The one of them that is pinned.
const PINNED: Range<u64> = 10..11;

/// A container with a pin.
fn with_pin<'a>(context: &'a Context<'a>) -> Result<Testbed<'a>> {
    let mut bed = Testbed::with_pages(context, PAGES)?;
    bed.pin(PINNED)?;
    Ok(bed)
}

/// Everything is dirty, again and again, as a whole and each mapping by itself.
fn all_is_dirty(bed: &mut Testbed<'_>) -> Result<()> {
    for _ in 0..2 {
        bed.reports(&[ALL])?;
        bed.each_reports(&[ALL])?;
    }
    bed.check()
}

/// Everything is dirty once, and then what is pinned.
fn all_was_dirty(bed: &mut Testbed<'_>) -> Result<()> {
    bed.reports(&[ALL])?;
    only_pin_is_dirty(bed)
}

fn only_pin_is_dirty(bed: &mut Testbed<'_>) -> Result<()> {
    bed.reports(&[PINNED])?;
    bed.reports(&[PINNED])?;
    bed.check()
}

fn joins_while_tracking(context: &Context<'_>) -> Result<()> {
    let mut bed = with_pin(context)?;
    bed.start()?;
    only_pin_is_dirty(&mut bed)?;
    for _ in 0..2 {
        bed.must(join(EDU[0]))?;
        all_is_dirty(&mut bed)?;
        bed.must(leave(EDU[0]))?;
        all_was_dirty(&mut bed)?;
    }
    Ok(())
}

fn joins_before_start(context: &Context<'_>) -> Result<()> {
    let mut bed = with_pin(context)?;
    bed.must(join(EDU[0]))?;
    bed.start()?;
    all_is_dirty(&mut bed)?;
    // START once more is no START.
    bed.start()?;
    all_is_dirty(&mut bed)?;
    bed.must(leave(EDU[0]))?;
    all_was_dirty(&mut bed)
}

fn left_before_start(context: &Context<'_>) -> Result<()> {
    let mut bed = with_pin(context)?;
    bed.must(join(EDU[0]))?;
    bed.must(leave(EDU[0]))?;
    bed.start()?;
    only_pin_is_dirty(&mut bed)
}

fn between_reads(context: &Context<'_>) -> Result<()> {
    let mut bed = with_pin(context)?;
    bed.start()?;
    only_pin_is_dirty(&mut bed)?;
    bed.must(join(EDU[0]))?;
    bed.must(leave(EDU[0]))?;
    all_was_dirty(&mut bed)?;
    // Of two groups, the second one leaves nothing more than the first.
    for edu in EDU {
        bed.must(join(edu))?;
    }
    for edu in EDU {
        bed.must(leave(edu))?;
    }
    all_was_dirty(&mut bed)
}

fn stop_while_joined(context: &Context<'_>) -> Result<()> {
    let mut bed = with_pin(context)?;
    bed.start()?;
    bed.must(join(EDU[0]))?;
    bed.stop()?;
    bed.refused(Errno::EINVAL, Op::get_bitmap(at(0, 0), PAGES * PAGE))?;
    bed.start()?;
    all_is_dirty(&mut bed)?;
    bed.stop()?;
    bed.must(leave(EDU[0]))?;
    bed.start()?;
    only_pin_is_dirty(&mut bed)
}

fn two_groups(context: &Context<'_>) -> Result<()> {
    let mut bed = with_pin(context)?;
    bed.start()?;
    for (first, last) in [(EDU[0], EDU[1]), (EDU[1], EDU[0])] {
        bed.must(join(EDU[0]))?;
        bed.must(join(EDU[1]))?;
        all_is_dirty(&mut bed)?;
        bed.must(leave(first))?;
        all_is_dirty(&mut bed)?;
        bed.must(leave(last))?;
        all_was_dirty(&mut bed)?;
    }
    Ok(())
}

fn shared_group(context: &Context<'_>) -> Result<()> {
    let mut bed = with_pin(context)?;
    bed.start()?;
    bed.must(join(PAIR[0]))?;
    all_is_dirty(&mut bed)?;
    for device in PAIR {
        bed.must(Op::Open { device })?;
    }
    all_is_dirty(&mut bed)?;
    for (i, device) in PAIR.into_iter().enumerate() {
        let group = bed.group(device);
        let left = status(bed.container().detach(group, Leave::Unset))?;
        ensure!(left == Err(Errno::EBUSY), "UNSET_CONTAINER while {} are open: {left:?}", 2 - i);
        bed.must(Op::Close { device })?;
        all_is_dirty(&mut bed)?;
    }
    bed.must(leave(PAIR[1]))?;
    all_was_dirty(&mut bed)
}

fn maps_and_unmaps(context: &Context<'_>) -> Result<()> {
    let mut bed = with_pin(context)?;
    bed.start()?;
    bed.must(join(EDU[0]))?;
    bed.map(128..161)?;
    bed.must(map(192..193, Protection::READ))?;
    bed.reports(&[ALL, 128..161, 192..193])?;
    bed.unmap_reports(128..193, &[128..161, 192..193])?;
    // With a hole in front of it.
    bed.map(128..161)?;
    bed.unmap_reports(80..161, &[128..161])?;
    all_is_dirty(&mut bed)?;
    bed.map(128..161)?;
    bed.must(leave(EDU[0]))?;
    bed.map(192..194)?;
    bed.unmap_reports(128..161, &[128..161])?;
    bed.reports(&[ALL])?;
    only_pin_is_dirty(&mut bed)
}

fn pins_and_writes(context: &Context<'_>) -> Result<()> {
    let mut bed = with_pin(context)?;
    bed.start()?;
    bed.must(join(EDU[0]))?;
    bed.pin(20..30)?;
    bed.transfer(Opcode::Write, pages(20..30))?;
    bed.dma_write(at(40, 7)..at(41, 9))?;
    bed.unpin(20..25)?;
    bed.refused(Errno::EINVAL, command(0, Opcode::Pin, pages(60..PAGES + 1)))?;
    all_is_dirty(&mut bed)?;
    bed.dma_write(pages(50..51))?;
    bed.must(leave(EDU[0]))?;
    bed.dma_write(pages(51..52))?;
    bed.reports(&[ALL])?;
    bed.dma_write(pages(52..53))?;
    bed.reports(&[PINNED, 25..30, 52..53])?;
    bed.unpin(25..30)?;
    bed.reports(&[PINNED, 25..30]).and_then(|()| bed.reports(&[PINNED])).and_then(|()| bed.check())
}

fn emulated_leaves(context: &Context<'_>) -> Result<()> {
    let mut bed = with_pin(context)?;
    bed.count_locked_memory()?;
    bed.start()?;
    bed.must(join(EDU[0]))?;
    bed.must(Op::Close { device: 0 })?;
    bed.must(leave(0))?;
    all_is_dirty(&mut bed)?;
    bed.must(join(0))?;
    bed.must(Op::Open { device: 0 })?;
    bed.dma_write(pages(5..6))?;
    bed.pin(PINNED)?;
    all_is_dirty(&mut bed)?;
    bed.must(leave(EDU[0]))?;
    all_was_dirty(&mut bed)
}

fn leaves_by_close(context: &Context<'_>) -> Result<()> {
    let mut bed = with_pin(context)?;
    bed.start()?;
    bed.must(join(EDU[0]))?;
    all_is_dirty(&mut bed)?;
    bed.must(Op::Leave { device: EDU[0], by: Leave::Close })?;
    all_was_dirty(&mut bed)?;
    bed.must(join(EDU[0]))?;
    all_is_dirty(&mut bed)
}

fn leaves_by_death(context: &Context<'_>) -> Result<()> {
    let mut bed = with_pin(context)?;
    bed.start()?;
    bed.must(join(EDU[0]))?;
    let child = Fork::new()?;
    // The child has it, too: nothing happens before it dies.
    bed.container().detach(bed.group(EDU[0]), Leave::Close)?;
    all_is_dirty(&mut bed)?;
    drop(child);
    bed.has_left(EDU[0]);
    all_was_dirty(&mut bed)
}

fn dma(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, PAGES)?;
    bed.start()?;
    bed.user_write(pages(0..2))?;
    let edu = EDU[0];
    bed.must(join(edu))?;
    bed.must(Op::Open { device: edu })?;
    let copy = |from, to, length| Op::Copy { device: edu, from, to, length };
    bed.must(copy(at(0, 16), at(30, 24), 2 * PAGE - 4096 - 64))?;
    bed.must(copy(at(1, 0), at(60, 0), PAGE))?;
    bed.transfer(Opcode::DmaRead, pages(0..PAGES))?;
    bed.reports(&[ALL])?;
    bed.check()?;
    bed.must(copy(at(0, 0), at(40, 0), PAGE))?;
    bed.must(Op::Close { device: edu })?;
    bed.must(leave(edu))?;
    bed.reports(&[ALL])?;
    bed.reports(&[])?;
    bed.check()
}

fn last_group(context: &Context<'_>) -> Result<()> {
    let mut bed = with_pin(context)?;
    bed.count_locked_memory()?;
    // Where D6 shifts no bits.
    for page in [128, 256, 384] {
        bed.map(page..page + 3)?;
    }
    bed.start()?;
    bed.must(join(EDU[0]))?;
    bed.must(Op::Close { device: 0 })?;
    for slot in [0, EDU[0]] {
        bed.must(leave(slot))?;
        bed.check()?;
    }
    bed.must(join(0))?;
    bed.must(Op::Open { device: 0 })?;
    bed.refused(Errno::EINVAL, Op::get_bitmap(at(0, 0), PAGES * PAGE))?;
    bed.map(ALL)?;
    bed.pin(PINNED)?;
    bed.start()?;
    only_pin_is_dirty(&mut bed)?;
    // And the other way round.
    bed.must(join(EDU[0]))?;
    bed.must(leave(EDU[0]))?;
    bed.must(Op::Close { device: 0 })?;
    bed.must(leave(0))?;
    bed.check()?;
    bed.must(join(EDU[0]))?;
    bed.map(0..3)?;
    bed.check()
}
