// SPDX-License-Identifier: GPL-2.0-only

//! Commands that must fail: with which errno, and that nothing changes.

use anyhow::Result;
use dirty_model::{Errno, Protection};
use harness::{Context, Scenario, Skip, scenario};
use mdev_dma::{Opcode, Width, uapi};
use testbed::{Op, PAGE, Testbed, at, command, map, pages, same};

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "device/command/bad-operation",
        "numbers that are no operation are EOPNOTSUPP",
        bad_operation,
    ),
    scenario(
        "device/command/bad-range",
        "empty, wrapping, huge and unaligned ranges change nothing",
        bad_range,
    ),
    scenario(
        "device/command/not-mapped",
        "ranges that aren't mapped, or not as a whole, change nothing",
        not_mapped,
    ),
    scenario(
        "device/command/protections",
        "mappings without the permission to read or write are EPERM",
        protections,
    ),
    scenario(
        "device/command/not-pinned",
        "UNPIN, WRITE and READ of a range that is pinned in part change nothing",
        not_pinned,
    ),
    scenario(
        "device/command/dma-stops",
        "DMA_WRITE and DMA_READ stop at the first chunk that fails and count those before",
        dma_stops,
    ),
    scenario(
        "device/command/max-pins",
        "a PIN over MAX_PINS is ENOSPC, however few pages are pinned how often",
        max_pins,
    ),
];

/// Does `op`, which fails with `errno` and changes nothing, of a device of [`Testbed::with_pin`].
fn refused(bed: &mut Testbed<'_>, errno: Errno, op: Op) -> Result<()> {
    bed.refused(errno, op.clone())?;
    bed.has_only_pin()?;
    let Op::Command { op: number, iova, length, seed, .. } = op else { return Ok(()) };
    let read = |register, width| bed.device(0).read(register, width);
    same("IOVA", iova, read(uapi::RUST_MDEV_DMA_REG_IOVA, Width::Quad)?)?;
    same("LENGTH", length, read(uapi::RUST_MDEV_DMA_REG_LENGTH, Width::Quad)?)?;
    same("SEED", seed, read(uapi::RUST_MDEV_DMA_REG_SEED, Width::Quad)?)?;
    same("COMMAND", number.into(), read(uapi::RUST_MDEV_DMA_REG_COMMAND, Width::Long)?)
}

fn bad_operation(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pin(context)?;
    for op in [0, 7, 8, 31, 32, 33, 1 << 16, u32::MAX >> 1] {
        let op = Op::Command { device: 0, op, iova: at(10, 0), length: PAGE, seed: 5 };
        refused(&mut bed, Errno::EOPNOTSUPP, op)?;
    }
    Ok(())
}

fn bad_range(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pin(context)?;
    let max = bed.device(0).limits()?.max_length;
    for op in Opcode::ALL {
        let mut check = |errno, iova, length| {
            refused(
                &mut bed,
                errno,
                Op::Command { device: 0, op: op as u32, iova, length, seed: 5 },
            )
        };
        check(Errno::EINVAL, at(10, 0), 0)?;
        check(Errno::EINVAL, u64::MAX, 0)?;
        check(Errno::EOVERFLOW, PAGE.wrapping_neg(), PAGE)?;
        check(Errno::EOVERFLOW, at(10, 0), PAGE.wrapping_neg())?;
        check(Errno::EOVERFLOW, u64::MAX, u64::MAX)?;
        check(Errno::E2BIG, at(10, 0), max + PAGE)?;
        check(Errno::E2BIG, at(10, 1), max + 1)?;
        if matches!(op, Opcode::Pin | Opcode::Unpin) {
            check(Errno::EINVAL, at(10, 1), PAGE)?;
            check(Errno::EINVAL, at(10, 0), 1)?;
            check(Errno::EINVAL, at(10, 0), PAGE + 8)?;
            check(Errno::EINVAL, at(9, 8), 2 * PAGE - 8)?;
        }
    }
    Ok(())
}

fn not_mapped(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pin(context)?;
    for op in Opcode::ALL {
        let errno = match op {
            Opcode::Unpin | Opcode::Write | Opcode::Read => Errno::ENXIO,
            _ => Errno::EINVAL,
        };
        refused(&mut bed, errno, command(0, op, pages(64..65)))?;
        refused(&mut bed, errno, command(0, op, pages(1000..1100)))?;
        refused(&mut bed, errno, command(0, op, 0..PAGE))?;
        let last = PAGE.wrapping_neg() - PAGE;
        refused(&mut bed, errno, command(0, op, last..last + PAGE))?;
    }
    Ok(())
}

fn protections(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pin(context)?;
    bed.must(map(64..66, Protection::READ))?;
    bed.must(map(66..68, Protection::WRITE))?;
    for page in [64, 66] {
        for op in [Opcode::Pin, Opcode::DmaWrite] {
            refused(&mut bed, Errno::EPERM, command(0, op, pages(page..page + 1)))?;
        }
    }
    refused(&mut bed, Errno::EPERM, command(0, Opcode::DmaRead, pages(66..67)))?;
    bed.transfer(Opcode::DmaRead, pages(64..66))?;
    bed.has_only_pin()
}

fn not_pinned(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pin(context)?;
    for op in [Opcode::Unpin, Opcode::Write, Opcode::Read] {
        for range in [9..10, 9..11, 10..12, 0..64] {
            refused(&mut bed, Errno::ENXIO, command(0, op, pages(range)))?;
        }
    }
    for op in [Opcode::Write, Opcode::Read] {
        refused(&mut bed, Errno::ENXIO, command(0, op, at(9, PAGE - 1)..at(10, 8)))?;
        refused(&mut bed, Errno::ENXIO, command(0, op, at(10, 8)..at(11, 1)))?;
    }
    Ok(())
}

fn dma_stops(context: &Context<'_>) -> Result<()> {
    let chunk = u64::from(uapi::RUST_MDEV_DMA_DMA_CHUNK);
    let mut bed = Testbed::with_pages(context, 2 * chunk / PAGE)?;
    bed.start()?;
    let past_the_end = at(3, 7)..at(0, 2 * chunk + PAGE);
    for op in [Opcode::DmaWrite, Opcode::DmaRead] {
        let op = command(0, op, past_the_end.clone());
        let answer = bed.apply(op.clone())?;
        bed.refused(Errno::EINVAL, op)?;
        same("COUNT", 2 * chunk - 3 * PAGE - 7, answer.count)?;
        same("DIGEST", 0, answer.digest)?;
    }
    bed.reports(&[3..2 * chunk / PAGE])?;
    bed.check()
}

fn max_pins(context: &Context<'_>) -> Result<()> {
    const COUNT: u64 = 256;
    let mut bed = Testbed::with_pages(context, COUNT)?;
    let max = bed.device(0).limits()?.max_pins;
    if max > 1 << 17 || max % COUNT != 0 {
        return Err(Skip(format!("would take {max} pins")).into());
    }
    for _ in 0..max / COUNT {
        bed.pin(0..COUNT)?;
    }
    bed.has_pins(max)?;
    bed.refused(Errno::ENOSPC, command(0, Opcode::Pin, pages(0..1)))?;
    bed.unpin(3..5)?;
    bed.refused(Errno::ENOSPC, command(0, Opcode::Pin, pages(0..3)))?;
    bed.pin(0..2)?;
    bed.has_pins(max)?;
    bed.check()
}
