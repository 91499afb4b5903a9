// SPDX-License-Identifier: GPL-2.0-only

//! How a device's pins and registers end: by reset, by close, by the death of their process.

use anyhow::{Result, ensure};
use dirty_model::Errno;
use harness::{Context, OtherProcess, Scenario, scenario};
use mdev_dma::{Opcode, Width, uapi};
use testbed::{Op, PAGE, Testbed, at, command, fixture::LONG, pages, same};

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "device/lifetime/reset",
        "RESET unpins all pages and clears registers; what was dirty stays so once",
        reset,
    ),
    scenario("device/lifetime/close", "closing unpins all pages, opening again begins anew", close),
    scenario(
        "device/lifetime/process-killed",
        "a process killed with pins, and a generator that runs, leaves nothing behind",
        process_killed,
    ),
];

fn reset(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 64)?;
    bed.start()?;
    bed.pin(3..6)?;
    bed.pin(3..4)?;
    bed.transfer(Opcode::Read, pages(3..6))?;
    bed.must(Op::Reset { device: 0 })?;
    bed.has_pins(0)?;
    let registers = (uapi::RUST_MDEV_DMA_REG_IOVA..=uapi::RUST_MDEV_DMA_REG_DIGEST).step_by(8);
    for register in registers {
        let value = bed.device(0).read(register, Width::Quad)?;
        same(&format!("register {register:#x}"), 0, value)?;
    }
    bed.refused(Errno::ENXIO, command(0, Opcode::Write, pages(3..4)))?;
    bed.reports(&[3..6])?;
    bed.reports(&[])?;
    bed.pin(3..4)?;
    bed.reports(&[3..4])?;
    bed.must(Op::Reset { device: 0 })?;
    bed.must(Op::Reset { device: 0 })?;
    bed.check()
}

fn close(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 64)?;
    bed.start()?;
    for _ in 0..3 {
        bed.pin(3..64)?;
        bed.transfer(Opcode::Write, at(3, 5)..at(5, 5))?;
        bed.must(Op::Close { device: 0 })?;
        bed.reports(&[3..64])?;
        bed.reports(&[])?;
        bed.must(Op::Open { device: 0 })?;
        bed.has_pins(0)?;
        let seed = bed.device(0).read(uapi::RUST_MDEV_DMA_REG_SEED, Width::Quad)?;
        same("SEED", 0, seed)?;
        bed.refused(Errno::ENXIO, command(0, Opcode::Write, pages(3..4)))?;
        bed.check()?;
    }
    Ok(())
}

fn process_killed(context: &Context<'_>) -> Result<()> {
    let mdev = context.device(0)?;
    for _ in 0..2 {
        let (mut child, line) =
            OtherProcess::start(&["hold", &mdev.uuid.to_string(), &(100 * PAGE).to_string()])?;
        ensure!(line == "0 100", "the other process says {line:?}, not that it pinned 100 pages");
        child.kill(LONG)?;

        let mut bed = Testbed::with_pages(context, 100)?;
        bed.has_pins(0)?;
        bed.pin(0..100)?;
        bed.check()?;
    }
    Ok(())
}
