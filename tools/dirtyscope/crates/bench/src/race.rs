// SPDX-License-Identifier: GPL-2.0-only

//! The driver against the C module: the same commands, in turn.

use super::{
    Bench, C_DRIVER, IOVA, PAGE_SIZE,
    report::{Comparison, Goal, Unit},
    stats::{Estimate, median},
    timed_command,
};
use anyhow::{Result, bail};
use mdev_dma::{MdevDma, Opcode, Width, pattern, uapi};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use vfio_client::Memory;

/// What only the C module has: sets pinned pages by the kernel's `memset()`, to the lowest byte of the
/// seed. See `tools/bench/c_mdev_dma.c`.
const OP_MEMSET: u32 = 31;

/// Accesses to a register in one measurement.
const ACCESSES: u32 = 500;

/// Bytes that a command deals with. Few, so that it is done before the host, if this is a VM, has
/// something else to do.
const SIZE: u64 = 2 << 20;

/// Bytes that are pinned and unpinned, for the same reason: four batches.
const PIN_SIZE: u64 = 4 * uapi::RUST_MDEV_DMA_PIN_BATCH as u64 * PAGE_SIZE;

/// Bytes of memory beyond what is mapped, which can begin at any page of so many.
const SPARE: u64 = 64 << 10;

/// Somebody who takes part.
struct Contestant<'a> {
    name: &'static str,
    run: &'a dyn Fn() -> Result<Duration>,
    /// The ratio to aim at, of the first contestant's speed to this one's.
    goal: Option<f64>,
}

/// Measures everything that is compared.
pub fn run(bench: &Bench<'_>) -> Result<Vec<Comparison>> {
    // The process has all its pages from the beginning.
    let memory = Arc::new(Memory::new((SIZE + SPARE) as usize)?);
    memory.write(0, &vec![1; memory.len()]);
    bench.map(&memory, 0, SIZE)?;

    let mut rows = pinned_writes(bench, &memory)?;
    rows.extend(pins(bench)?);
    rows.extend(dma_writes(bench, &memory)?);
    rows.extend(registers(bench)?);
    bench.unmap(SIZE)?;
    Ok(rows)
}

fn pinned_writes(bench: &Bench<'_>, memory: &Memory) -> Result<Vec<Comparison>> {
    let (rust, c) = (&bench.rust, &bench.c);
    command(rust, Opcode::Pin as u32, 0)?;
    command(c, Opcode::Pin as u32, 0)?;

    let write = Opcode::Write as u32;
    check_pattern(memory, "rust_mdev_dma", rust, write)?;
    check_pattern(memory, C_DRIVER, c, write)?;
    command(c, OP_MEMSET, 0xa5)?;
    check_memory(memory, &vec![0xa5; SIZE as usize], "MEMSET of the C module")?;

    let contestants = [
        Contestant { name: "", run: &|| command(rust, write, 1), goal: None },
        Contestant { name: C_DRIVER, run: &|| command(c, write, 2), goal: Some(1.0) },
        Contestant { name: "memset()", run: &|| command(c, OP_MEMSET, 3), goal: Some(0.95) },
    ];
    let rows = race(bench, "pinned writes", Unit::Bytes, SIZE as f64, &contestants)?;
    command(rust, Opcode::Unpin as u32, 0)?;
    command(c, Opcode::Unpin as u32, 0)?;
    Ok(rows)
}

fn pins(bench: &Bench<'_>) -> Result<Vec<Comparison>> {
    let pin_unpin = |device: &MdevDma| {
        let pin = timed_command(device, Opcode::Pin as u32, IOVA, PIN_SIZE, 0)?;
        Ok(pin + timed_command(device, Opcode::Unpin as u32, IOVA, PIN_SIZE, 0)?)
    };
    let contestants = [
        Contestant { name: "", run: &|| pin_unpin(&bench.rust), goal: None },
        Contestant { name: C_DRIVER, run: &|| pin_unpin(&bench.c), goal: Some(1.0) },
    ];
    let pages = PIN_SIZE / PAGE_SIZE;
    race(bench, "pin and unpin", Unit::Pages, pages as f64, &contestants)
}

fn dma_writes(bench: &Bench<'_>, memory: &Arc<Memory>) -> Result<Vec<Comparison>> {
    let (rust, c) = (&bench.rust, &bench.c);
    let write = Opcode::DmaWrite as u32;
    check_pattern(memory, "rust_mdev_dma", rust, write)?;
    check_pattern(memory, C_DRIVER, c, write)?;
    let contestants = [
        Contestant { name: "", run: &|| command(rust, write, 1), goal: None },
        Contestant { name: C_DRIVER, run: &|| command(c, write, 2), goal: Some(1.0) },
    ];
    // Where pages lie to one another matters to caches and TLBs, those of an emulator too. The
    // drivers' buffers stay where they are: the memory moves.
    race_on(bench, "vfio_dma_rw() writes", Unit::Bytes, SIZE as f64, &contestants, |round| {
        bench.unmap(SIZE)?;
        bench.map(memory, round as u64 % (SPARE / PAGE_SIZE) * PAGE_SIZE, SIZE)
    })
}

fn registers(bench: &Bench<'_>) -> Result<Vec<Comparison>> {
    let read = |device: &MdevDma| accesses(|| device.read(IOVA_REGISTER, Width::Quad).map(drop));
    let write = |device: &MdevDma| accesses(|| device.write(IOVA_REGISTER, Width::Quad, IOVA));
    let mut rows = Vec::new();
    for (what, access) in [
        ("register read", &read as &dyn Fn(&MdevDma) -> Result<Duration>),
        ("register write", &write),
    ] {
        let contestants = [
            Contestant { name: "", run: &|| access(&bench.rust), goal: None },
            Contestant { name: C_DRIVER, run: &|| access(&bench.c), goal: None },
        ];
        let unit = Unit::Accesses;
        rows.extend(race(bench, what, unit, ACCESSES.into(), &contestants)?);
    }
    Ok(rows)
}

const IOVA_REGISTER: u32 = uapi::RUST_MDEV_DMA_REG_IOVA;

fn accesses(mut access: impl FnMut() -> mdev_dma::Result<()>) -> Result<Duration> {
    let begin = Instant::now();
    for _ in 0..ACCESSES {
        access()?;
    }
    Ok(begin.elapsed())
}

/// Runs a command over all of the memory. Returns how long it took: the write to COMMAND, that is.
fn command(device: &MdevDma, op: u32, seed: u64) -> Result<Duration> {
    timed_command(device, op, IOVA, SIZE, seed)
}

/// A device that doesn't write what it should is fast, but no good.
fn check_pattern(memory: &Memory, name: &str, device: &MdevDma, op: u32) -> Result<()> {
    const SEED: u64 = 0xbe7c;
    memory.write(0, &vec![0; SIZE as usize]);
    command(device, op, SEED)?;
    let mut expected = vec![0; SIZE as usize];
    pattern::fill(&mut expected, SEED, IOVA);
    check_memory(memory, &expected, &format!("operation {op} of {name}"))
}

fn check_memory(memory: &Memory, expected: &[u8], what: &str) -> Result<()> {
    match memory.first_difference(0, expected) {
        None => Ok(()),
        Some(at) => bail!("{what} did not write what it should at byte {at:#x}"),
    }
}

/// Has all contestants do the same in every round, each round in another order, after one that
/// doesn't count. Compares the first one to the others. `amount` is what they do in a round.
fn race(
    bench: &Bench<'_>,
    what: &'static str,
    unit: Unit,
    amount: f64,
    contestants: &[Contestant<'_>],
) -> Result<Vec<Comparison>> {
    race_on(bench, what, unit, amount, contestants, |_| Ok(()))
}

/// As [`race`], with something to be done before every round.
fn race_on(
    bench: &Bench<'_>,
    what: &'static str,
    unit: Unit,
    amount: f64,
    contestants: &[Contestant<'_>],
    before: impl Fn(usize) -> Result<()>,
) -> Result<Vec<Comparison>> {
    bench.progress(what);
    let mut seconds = vec![Vec::new(); contestants.len()];
    for contestant in contestants {
        (contestant.run)()?;
    }
    for round in 0..bench.rounds {
        bench.check_stopped()?;
        before(round)?;
        for i in 0..contestants.len() {
            let i = (i + round) % contestants.len();
            seconds[i].push((contestants[i].run)()?.as_secs_f64());
        }
    }

    let speed = |i: usize| amount / median(&seconds[i]);
    let rows = contestants.iter().enumerate().skip(1).map(|(i, reference)| {
        let ratios = seconds[0].iter().zip(&seconds[i]).map(|(mine, its)| its / mine);
        let ratio = Estimate::of(&ratios.collect::<Vec<_>>());
        Comparison {
            what,
            unit,
            measured: speed(0),
            reference: reference.name,
            reference_measured: speed(i),
            ratio,
            goal: reference.goal.map(|goal| Goal::at_least(goal, ratio)),
        }
    });
    Ok(rows.collect())
}
