// SPDX-License-Identifier: GPL-2.0-only

//! The driver beside the C module: the same commands, in turn.

use super::{
    Bench, C_DRIVER, DRIVER, IOVA, PAGE_SIZE,
    measurements::{Comparison, Goal, Unit},
    stats::{Estimate, median},
    timed_command,
};
use anyhow::{Result, bail, ensure};
use mdev_dma::{MdevDma, Opcode, Outcome, Width, pattern, uapi};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use vfio_client::Memory;

/// Accesses to a register in one measurement.
const ACCESSES: u32 = 500;

/// Bytes that a command deals with. Few, so that it is done before a timer interrupts, or before the
/// host, if this is a VM, has something else to do.
const SIZE: u64 = 512 << 10;

/// Bytes that are pinned and unpinned, for the same reason: four batches.
const PIN_SIZE: u64 = 4 * uapi::RUST_MDEV_DMA_PIN_BATCH as u64 * PAGE_SIZE;

/// Bytes that are mapped.
const MAPPED: u64 = PIN_SIZE;

/// Bytes of memory beyond what is mapped, which can begin at any page of so many.
const SPARE: u64 = 64 << 10;

/// The ratio to aim at, everywhere.
const GOAL: f64 = 1.0;

/// A way through the drivers.
struct Path {
    name: &'static str,
    unit: Unit,
    /// How much is done in a round.
    amount: u64,
}

/// Measures every path.
pub fn run(bench: &Bench<'_>) -> Result<Vec<Comparison>> {
    // The process has all its pages from the beginning.
    let memory = Arc::new(Memory::new((MAPPED + SPARE) as usize)?);
    memory.write(0, &vec![1; memory.len()]);
    bench.map(&memory, 0, MAPPED)?;

    check_answers(bench)?;
    let mut rows = vec![pinned_writes(bench, &memory)?];
    rows.extend(pins(bench)?);
    rows.push(dma_writes(bench, &memory)?);
    rows.extend(registers(bench)?);
    bench.unmap(MAPPED)?;
    Ok(rows)
}

fn pinned_writes(bench: &Bench<'_>, memory: &Memory) -> Result<Comparison> {
    for device in [&bench.rust, &bench.c] {
        command(device, Opcode::Pin, 0)?;
    }
    check_pattern(bench, memory, Opcode::Write)?;
    let path = Path { name: "pinned writes", unit: Unit::Bytes, amount: SIZE };
    let row = compare(bench, &path, |device| command(device, Opcode::Write, 1), |_| Ok(()))?;
    for device in [&bench.rust, &bench.c] {
        command(device, Opcode::Unpin, 0)?;
    }
    Ok(row)
}

/// What type1 does for a page is another matter while it tracks.
fn pins(bench: &Bench<'_>) -> Result<[Comparison; 2]> {
    let pin_unpin = |device: &MdevDma| {
        let pin = timed_command(device, Opcode::Pin as u32, IOVA, PIN_SIZE, 0)?;
        Ok(pin + timed_command(device, Opcode::Unpin as u32, IOVA, PIN_SIZE, 0)?)
    };
    let row = |name| {
        let path = Path { name, unit: Unit::Pages, amount: PIN_SIZE / PAGE_SIZE };
        compare(bench, &path, pin_unpin, |_| Ok(()))
    };
    let container = bench.rust.device().container();
    let untracked = row("pin and unpin")?;
    container.dirty_start()?;
    let tracked = row("the same, tracking")?;
    container.dirty_stop()?;
    Ok([untracked, tracked])
}

fn dma_writes(bench: &Bench<'_>, memory: &Arc<Memory>) -> Result<Comparison> {
    check_pattern(bench, memory, Opcode::DmaWrite)?;
    let path = Path { name: "vfio_dma_rw() writes", unit: Unit::Bytes, amount: SIZE };
    // Where pages lie to one another matters to caches and TLBs, those of an emulator too. The
    // drivers' buffers stay where they are: the memory moves.
    compare(
        bench,
        &path,
        |device| command(device, Opcode::DmaWrite, 1),
        |round| {
            bench.unmap(MAPPED)?;
            bench.map(memory, round as u64 % (SPARE / PAGE_SIZE) * PAGE_SIZE, MAPPED)
        },
    )
}

fn registers(bench: &Bench<'_>) -> Result<[Comparison; 2]> {
    const IOVA_REGISTER: u32 = uapi::RUST_MDEV_DMA_REG_IOVA;
    let path = |name| Path { name, unit: Unit::Accesses, amount: ACCESSES.into() };
    let read = |device: &MdevDma| accesses(|| device.read(IOVA_REGISTER, Width::Quad).map(drop));
    let write = |device: &MdevDma| accesses(|| device.write(IOVA_REGISTER, Width::Quad, IOVA));
    Ok([
        compare(bench, &path("register read"), read, |_| Ok(()))?,
        compare(bench, &path("register write"), write, |_| Ok(()))?,
    ])
}

fn accesses(mut access: impl FnMut() -> mdev_dma::Result<()>) -> Result<Duration> {
    let begin = Instant::now();
    for _ in 0..ACCESSES {
        access()?;
    }
    Ok(begin.elapsed())
}

/// Runs a command. Returns how long it took: the write to COMMAND, that is.
fn command(device: &MdevDma, op: Opcode, seed: u64) -> Result<Duration> {
    timed_command(device, op as u32, IOVA, SIZE, seed)
}

/// A device that doesn't write what it should is fast, but no good.
fn check_pattern(bench: &Bench<'_>, memory: &Memory, op: Opcode) -> Result<()> {
    const SEED: u64 = 0xbe7c;
    let mut expected = vec![0; SIZE as usize];
    pattern::fill(&mut expected, SEED, IOVA);
    for (name, device) in bench.drivers() {
        memory.write(0, &vec![0; SIZE as usize]);
        command(device, op, SEED)?;
        if let Some(at) = memory.first_difference(0, &expected) {
            bail!("{op} of {name} did not write what it should at byte {at:#x}");
        }
    }
    Ok(())
}

/// Nor is one that saves the time for checks: both devices answer the same to accesses and commands
/// that aren't as they should be.
fn check_answers(bench: &Bench<'_>) -> Result<()> {
    let (rust, c) = (answers(&bench.rust)?, answers(&bench.c)?);
    for ((what, rust), (_, c)) in rust.iter().zip(&c) {
        ensure!(rust == c, "{what}: {DRIVER} answers {rust}, {C_DRIVER} answers {c}");
    }
    Ok(())
}

/// What `device` answers, by what it was asked.
fn answers(device: &MdevDma) -> Result<Vec<(String, String)>> {
    use uapi::{
        RUST_MDEV_DMA_BAR_SIZE as BAR_SIZE, RUST_MDEV_DMA_REG_GEN_LIMIT as GEN_LIMIT,
        RUST_MDEV_DMA_REG_IOVA as IOVA_REGISTER, RUST_MDEV_DMA_REG_IRQ_ENABLE as IRQ_ENABLE,
        RUST_MDEV_DMA_REG_IRQ_STATUS as IRQ_STATUS, RUST_MDEV_DMA_REG_LENGTH as LENGTH,
        RUST_MDEV_DMA_REG_PINS as PINS, RUST_MDEV_DMA_REG_REFUSED as REFUSED,
        RUST_MDEV_DMA_REG_SEED as SEED, RUST_MDEV_DMA_REG_STATUS as STATUS,
    };
    const BITS: u64 = 0x0102_0408_1020_4080;
    let errno = |result: mdev_dma::Result<()>| result.map_or_else(|error| error.errno(), |()| 0);
    let mut answers = Vec::new();

    // Every width, aligned and not, at registers that can be written or not, between them, at the end
    // of the BAR and behind it. Not COMMAND and GEN_CONTROL, nor what says how a command went.
    let registers = [
        uapi::RUST_MDEV_DMA_REG_MAGIC,
        uapi::RUST_MDEV_DMA_REG_VERSION,
        uapi::RUST_MDEV_DMA_REG_MAX_PINS,
        uapi::RUST_MDEV_DMA_REG_MAX_LENGTH,
        PINS,
        PINS + 8,
        IOVA_REGISTER,
        LENGTH,
        SEED,
        STATUS,
        REFUSED,
        IRQ_STATUS,
        IRQ_ENABLE,
        IRQ_ENABLE + 4,
        GEN_LIMIT,
        BAR_SIZE - 8,
        BAR_SIZE,
    ];
    for width in [Width::Byte, Width::Word, Width::Long, Width::Quad] {
        for register in registers {
            for at in register..register + 4 {
                let what = format!("{} bytes at {at:#x}", width as usize);
                let status = errno(device.write(at, width, BITS));
                answers.push((format!("a write of {what}"), format!("status {status}")));
                let mut value = 0;
                let status = errno(device.read(at, width).map(|read| value = read));
                let answer = format!("status {status}, {value:#x}");
                answers.push((format!("a read of {what}"), answer));
            }
        }
    }

    device.enable_irqs(0)?;

    let limits = device.limits()?;
    let (pin, unpin, write) = (Opcode::Pin as u32, Opcode::Unpin as u32, Opcode::Write as u32);
    for (op, iova, length) in [
        (0, IOVA, PAGE_SIZE),
        (63, IOVA, PAGE_SIZE),
        (pin, IOVA, 0),
        (pin, PAGE_SIZE.wrapping_neg(), PAGE_SIZE),
        (pin, IOVA, limits.max_length.saturating_add(PAGE_SIZE)),
        (pin, IOVA + 1, PAGE_SIZE),
        (pin, IOVA, PAGE_SIZE + 1),
        (unpin, IOVA, PAGE_SIZE),
        (write, IOVA, PAGE_SIZE),
        // Half of it isn't mapped. It leaves no page behind that counts as pinned.
        (pin, IOVA + MAPPED - 2 * PAGE_SIZE, 4 * PAGE_SIZE),
        (Opcode::DmaWrite as u32, IOVA + MAPPED - 2 * PAGE_SIZE, 4 * PAGE_SIZE),
        (unpin, IOVA + MAPPED - 2 * PAGE_SIZE, 2 * PAGE_SIZE),
        (pin, IOVA + MAPPED - 4 * PAGE_SIZE, 4 * PAGE_SIZE),
        (unpin, IOVA + MAPPED - 4 * PAGE_SIZE, 4 * PAGE_SIZE),
    ] {
        let Outcome { status, count, digest } = device.run(op, iova, length, 1)?;
        answers.push((
            format!("operation {op} of {iova:#x}+{length:#x}"),
            format!("status {status}, {count:#x} bytes, digest {digest}, {} pins", device.pins()?),
        ));
    }
    Ok(answers)
}

/// Has both drivers do the same in every round, each round in the other order, after one that doesn't
/// count. `before` is done before every round.
fn compare(
    bench: &Bench<'_>,
    path: &Path,
    run: impl Fn(&MdevDma) -> Result<Duration>,
    before: impl Fn(usize) -> Result<()>,
) -> Result<Comparison> {
    bench.progress(path.name);
    let drivers = bench.drivers();
    let mut seconds = [const { Vec::new() }; 2];
    for (_, device) in drivers {
        run(device)?;
    }
    for round in 0..bench.rounds {
        bench.check_stopped()?;
        before(round)?;
        for i in [round % 2, (round + 1) % 2] {
            seconds[i].push(run(drivers[i].1)?.as_secs_f64());
        }
    }

    let speed = |seconds: &[f64]| path.amount as f64 / median(seconds);
    let [rust, c] = &seconds;
    let ratio = Estimate::of(&rust.iter().zip(c).map(|(rust, c)| c / rust).collect::<Vec<_>>());
    Ok(Comparison {
        path: path.name,
        unit: path.unit,
        rust: speed(rust),
        c: speed(c),
        ratio,
        goal: Goal::at_least(GOAL, ratio),
    })
}
