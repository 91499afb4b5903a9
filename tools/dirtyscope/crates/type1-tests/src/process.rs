// SPDX-License-Identifier: GPL-2.0-only

//! What the process that owns the memory does meanwhile, and what it may not.

use anyhow::{Context as _, Result};
use dirty_model::Errno;
use harness::{Context, OtherProcess, Scenario, scenario};
use mdev_dma::Opcode;
use testbed::{Op, PAGE, Testbed, at, command, fixture::LONG, pages};
use vfio_client::Fork;

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "type1/process/hidden-memory",
        "devices fault on memory that was taken away, nothing is dirty; pins stay good",
        hidden_memory,
    ),
    scenario(
        "type1/process/memlock-limit",
        "over RLIMIT_MEMLOCK, without CAP_IPC_LOCK, PIN is ENOMEM and leaves nothing pinned",
        memlock_limit,
    ),
    scenario(
        "type1/process/fork",
        "after fork() devices go on writing to the parent's memory, and it is dirty",
        fork,
    ),
    scenario(
        "type1/process/killed-unserved",
        "a process is killed while its device waits for memory that it serves, and doesn't",
        killed_unserved,
    ),
];

fn hidden_memory(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 64)?;
    bed.user_write(pages(0..64))?;
    bed.pin(12..13)?;
    bed.start()?;
    bed.must(Op::Hide { iova: at(10, 0), size: 4 * PAGE })?;
    bed.refused(Errno::EFAULT, command(0, Opcode::DmaWrite, at(10, 0)..at(10, 1)))?;
    bed.refused(Errno::EFAULT, command(0, Opcode::DmaRead, at(9, 0)..at(11, 0)))?;
    bed.refused(Errno::EFAULT, command(0, Opcode::Pin, pages(10..12)))?;
    bed.reports(&[12..13])?;

    bed.pin(12..13)?;
    bed.transfer(Opcode::Write, pages(12..13))?;
    bed.dma_write(at(9, 5)..at(10, 0))?;
    bed.must(Op::Show { iova: at(10, 0), size: 4 * PAGE })?;
    bed.check_memory()?;
    bed.dma_write(at(10, 0)..at(12, 0))?;
    bed.pin(13..14)?;
    bed.reports(&[9..14])?;
    bed.reports(&[12..14])?;
    bed.check()
}

fn memlock_limit(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 64)?;
    bed.add_device()?;
    bed.count_locked_memory()?;
    bed.must(Op::Limit { pages: Some(10) })?;
    bed.map(64..128)?;
    bed.pin(64..72)?;
    bed.refused(Errno::ENOMEM, command(0, Opcode::Pin, pages(72..75)))?;
    bed.check()?;
    // What is pinned counts once.
    bed.must(command(1, Opcode::Pin, pages(66..74)))?;
    bed.refused(Errno::ENOMEM, command(1, Opcode::Pin, pages(74..75)))?;
    bed.unpin(64..65)?;
    bed.pin(74..75)?;
    bed.check()?;
    // Who mapped this could lock what they wanted.
    bed.pin(0..20)?;
    bed.check()?;
    bed.must(Op::Limit { pages: None })?;
    bed.must(Op::unmap_all())?;
    bed.check()
}

fn fork(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 32)?;
    bed.user_write(pages(0..32))?;
    bed.pin(2..6)?;
    bed.start()?;
    let child = Fork::new()?;
    bed.transfer(Opcode::Write, at(2, 7)..at(6, 0))?;
    bed.user_write(pages(7..8))?;
    bed.dma_write(at(7, 9)..at(9, 9))?;
    bed.pin(12..14)?;
    bed.transfer(Opcode::Write, pages(12..14))?;
    bed.user_write(pages(13..15))?;
    bed.transfer(Opcode::DmaRead, pages(0..32))?;
    bed.transfer(Opcode::Read, pages(12..14))?;
    bed.reports(&[2..6, 7..10, 12..14])?;
    bed.check()?;
    drop(child);
    bed.transfer(Opcode::Write, pages(2..6))?;
    bed.dma_write(pages(20..21))?;
    bed.unpin(2..6)?;
    bed.reports(&[2..6, 12..14, 20..21])?;
    bed.check()
}

fn killed_unserved(context: &Context<'_>) -> Result<()> {
    let device = context.device(0)?.uuid.to_string();
    for what in ["foreground", "background"] {
        let arguments = ["hold", &device, &(16 * PAGE).to_string(), "--what", what];
        let (mut process, _) = OtherProcess::start(&arguments)?;
        process.kill(LONG).with_context(|| what.to_owned())?;
        let mut bed = Testbed::with_pages(context, 16)?;
        bed.dma_write(pages(0..16))?;
        bed.pin(0..16)?;
        bed.check()?;
    }
    Ok(())
}
