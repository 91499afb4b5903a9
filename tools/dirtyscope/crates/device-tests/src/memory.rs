// SPDX-License-Identifier: GPL-2.0-only

//! What is in memory after a device wrote it, and what it says it read.

use anyhow::Result;
use dirty_model::Protection;
use harness::{Context, Scenario, scenario};
use mdev_dma::{Opcode, uapi};
use std::ops::Range;
use testbed::{PAGE, Testbed, at, map, pages};

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "device/memory/dma-write",
        "after DMA_WRITE at any alignment, memory is the pattern and nothing else changed",
        dma_write,
    ),
    scenario("device/memory/write", "the same for WRITE through pinned pages", write),
    scenario(
        "device/memory/mixed",
        "both kinds of writes and reads, over one another and over mapping boundaries",
        mixed,
    ),
    scenario(
        "device/memory/digest",
        "DMA_READ and READ of memory that no device wrote give its digest",
        digest,
    ),
    scenario("device/memory/read-only", "DMA_READ reads a read-only mapping", read_only),
    scenario(
        "device/memory/user-writes",
        "what the user writes between two commands is read, and not overwritten",
        user_writes,
    ),
];

/// Pages that `ranges` needs.
const PAGES: u64 = 200;

/// Ranges that differ in how they begin, end, and are cut.
fn ranges() -> Vec<Range<u64>> {
    let chunk = u64::from(uapi::RUST_MDEV_DMA_DMA_CHUNK) / PAGE;
    vec![
        pages(1..2),
        at(3, 0)..at(3, 1),
        at(3, PAGE - 1)..at(4, 0),
        at(4, 3)..at(4, 4),
        at(5, 4)..at(5, 12),
        at(5, 16)..at(5, 24),
        at(6, 1)..at(6, 16),
        at(6, 24)..at(6, 31),
        at(6, 33)..at(6, 71),
        at(7, PAGE - 1)..at(8, 1),
        at(8, PAGE - 9)..at(11, 7),
        at(chunk, 0)..at(2 * chunk, 0),
        at(2 * chunk - 1, PAGE - 5)..at(2 * chunk, 5),
        at(3 * chunk - 1, 1)..at(5 * chunk, 9),
        at(63, 100)..at(129, 77),
        at(PAGES - 1, 1)..at(PAGES, 0),
        pages(0..PAGES),
    ]
}

/// Writes all of `ranges` by one operation and reads them by another.
fn write_and_read(bed: &mut Testbed<'_>, write: Opcode, read: Opcode) -> Result<()> {
    bed.user_write(pages(0..PAGES))?;
    for range in ranges() {
        bed.transfer(write, range.clone())?;
        bed.check_memory()?;
        bed.transfer(read, range)?;
    }
    bed.check()
}

fn dma_write(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, PAGES)?;
    write_and_read(&mut bed, Opcode::DmaWrite, Opcode::DmaRead)
}

fn write(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, PAGES)?;
    bed.pin(0..PAGES)?;
    write_and_read(&mut bed, Opcode::Write, Opcode::Read)
}

fn mixed(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::new(context)?;
    bed.map(0..13)?;
    bed.map(13..63)?;
    bed.map(63..PAGES)?;
    bed.pin(0..PAGES)?;
    write_and_read(&mut bed, Opcode::DmaWrite, Opcode::Read)?;
    write_and_read(&mut bed, Opcode::Write, Opcode::DmaRead)
}

fn digest(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, PAGES)?;
    bed.user_write(pages(0..PAGES))?;
    bed.pin(0..PAGES)?;
    for range in ranges() {
        bed.transfer(Opcode::DmaRead, range.clone())?;
        bed.transfer(Opcode::Read, range)?;
    }
    bed.check()
}

fn read_only(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::new(context)?;
    bed.must(map(0..PAGES, Protection::READ))?;
    bed.user_write(pages(0..PAGES))?;
    for range in ranges() {
        bed.transfer(Opcode::DmaRead, range)?;
    }
    bed.check()
}

fn user_writes(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 16)?;
    bed.pin(0..16)?;
    bed.transfer(Opcode::Write, pages(0..16))?;
    bed.user_write(at(3, 5)..at(3, 305))?;
    bed.transfer(Opcode::Read, pages(0..16))?;
    bed.transfer(Opcode::DmaRead, pages(0..16))?;
    bed.dma_write(at(3, 0)..at(3, 6))?;
    bed.transfer(Opcode::Write, at(3, 304)..at(4, 0))?;
    bed.transfer(Opcode::Read, at(3, 1)..at(3, 400))?;
    bed.check()
}
