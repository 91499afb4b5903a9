// SPDX-License-Identifier: GPL-2.0-only

//! Pins: batches that fail, and what is counted.

use anyhow::Result;
use dirty_model::{Errno, Protection};
use harness::{Context, Scenario, locked_memory as locked_bytes, scenario};
use mdev_dma::Opcode;
use testbed::{Op, PAGE, Testbed, command, map, pages, same};

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "type1/pin/fails-in-first-batch",
        "a PIN whose first page isn't mapped leaves nothing pinned, and nothing dirty",
        pin_fails_in_first_batch,
    ),
    scenario(
        "type1/pin/fails-in-later-batch",
        "a PIN that fails in a later batch leaves nothing pinned",
        pin_fails_in_later_batch,
    ),
    scenario(
        "type1/pin/fails-beside-pins",
        "a PIN that fails leaves pages of its batch that were pinned before as they were",
        pin_fails_beside_pins,
    ),
    scenario(
        "type1/pin/locked-memory",
        "VmLck counts pinned pages once, and is what it was after unpin, unmap and close",
        locked_memory,
    ),
    scenario(
        "type1/pin/protection",
        "what may only be read is read, and no more; what may only be written can't be accessed at all",
        protection,
    ),
];

/// Does `op`, which fails with `errno` and changes nothing, of a device of [`Testbed::with_pin`].
fn refused(bed: &mut Testbed<'_>, errno: Errno, op: Op) -> Result<()> {
    bed.refused(errno, op)?;
    bed.has_only_pin()
}

fn pin_fails_in_first_batch(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pin(context)?;
    bed.map(100..164)?;
    refused(&mut bed, Errno::EINVAL, command(0, Opcode::Pin, pages(99..164)))?;
    refused(&mut bed, Errno::EINVAL, command(0, Opcode::Pin, pages(64..128)))?;
    bed.refused(Errno::ENXIO, command(0, Opcode::Read, pages(100..101)))
}

fn pin_fails_in_later_batch(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 200)?;
    bed.pin(10..11)?;
    // In the middle of a batch, nothing being tracked: the stock kernel makes such pages dirty.
    bed.refused(Errno::EINVAL, command(0, Opcode::Pin, pages(0..201)))?;
    bed.has_pins(1)?;
    bed.refused(Errno::ENXIO, command(0, Opcode::Read, pages(0..1)))?;
    bed.start()?;
    bed.has_only_pin()?;

    // At the first page of a batch: those before were pinned for a moment, and are dirty once.
    bed.map(256..300)?;
    bed.map(300..320)?;
    bed.refused(Errno::EINVAL, command(0, Opcode::Pin, pages(256..321)))?;
    bed.reports(&[10..11, 256..320])?;
    bed.refused(Errno::ENXIO, command(0, Opcode::Read, pages(256..257)))?;
    bed.has_only_pin()
}

fn pin_fails_beside_pins(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 4)?;
    bed.pin(1..3)?;
    bed.refused(Errno::EINVAL, command(0, Opcode::Pin, pages(0..8)))?;
    bed.has_pins(2)?;
    bed.transfer(Opcode::Write, pages(1..3))?;
    bed.transfer(Opcode::Read, pages(1..3))?;
    bed.refused(Errno::ENXIO, command(0, Opcode::Read, pages(0..1)))?;
    bed.check()
}

fn locked_memory(context: &Context<'_>) -> Result<()> {
    let before = locked_bytes()?;
    let mut bed = Testbed::new(context)?;
    bed.map(0..100)?;
    bed.map(100..200)?;
    let holds = |what: &str, count| same(what, before + count * PAGE, locked_bytes()?);
    holds("VmLck before a pin", 0)?;
    bed.pin(10..150)?;
    holds("VmLck with 140 pages", 140)?;
    bed.pin(10..20)?;
    holds("VmLck with 10 of them pinned twice", 140)?;
    bed.unpin(10..20)?;
    holds("VmLck with all of them pinned once", 140)?;
    bed.unpin(10..20)?;
    holds("VmLck with 10 unpinned", 130)?;
    bed.refused(Errno::EINVAL, command(0, Opcode::Pin, pages(180..201)))?;
    holds("VmLck after a PIN that failed", 130)?;
    bed.unmap(100..200)?;
    holds("VmLck with 50 unmapped", 80)?;
    bed.must(Op::Reset { device: 0 })?;
    holds("VmLck after RESET", 0)?;
    bed.pin(0..7)?;
    bed.must(Op::Close { device: 0 })?;
    holds("VmLck after close", 0)?;
    bed.must(Op::Open { device: 0 })?;
    bed.pin(0..7)?;
    drop(bed);
    holds("VmLck after everything was closed", 0)
}

fn protection(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::new(context)?;
    bed.must(map(0..4, Protection::READ))?;
    bed.must(map(4..8, Protection::WRITE))?;
    bed.map(8..12)?;
    bed.start()?;
    bed.must(command(0, Opcode::DmaRead, pages(1..3)))?;
    for (opcode, range) in [
        (Opcode::Pin, 1..3),
        (Opcode::DmaWrite, 1..3),
        (Opcode::Pin, 5..7),
        (Opcode::DmaWrite, 5..7),
        (Opcode::DmaRead, 5..7),
        // Into what may be accessed, and out of it.
        (Opcode::DmaRead, 3..5),
        (Opcode::DmaWrite, 7..9),
    ] {
        bed.refused(Errno::EPERM, command(0, opcode, pages(range)))?;
    }
    bed.dma_write(pages(9..10))?;
    bed.each_reports(&[9..10])?;
    bed.check()
}
