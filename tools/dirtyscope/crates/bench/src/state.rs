// SPDX-License-Identifier: GPL-2.0-only

//! What the device's state is when it migrates: its size, and how long it takes to stop the device and
//! read it, which is time for which a guest is stopped.

use super::{
    Bench, IOVA, PAGE_SIZE,
    measurements::{Cost, Expected, Growth},
    stats::median,
    timed_command,
};
use anyhow::{Result, ensure};
use mdev_dma::Opcode;
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use vfio_client::{Memory, MigState};

/// Bytes mapped.
const SIZE: u64 = 256 << 20;

/// Bytes that are read at once, as by QEMU.
const AT_ONCE: usize = 1 << 20;

/// Measures it, against the pages that are pinned.
pub fn run(bench: &Bench<'_>) -> Result<Vec<Growth>> {
    let memory = Arc::new(Memory::new(SIZE as usize)?);
    bench.map(&memory, 0, SIZE)?;
    let mut growth = Vec::new();
    for (axis, step) in [("pins side by side", 1), ("pins, every other", 2)] {
        if !bench.is_wanted(axis) {
            continue;
        }
        let most = (SIZE / PAGE_SIZE / step).min(bench.rust.limits()?.max_pins);
        let (mut sizes, mut times) = (Vec::new(), Vec::new());
        for pins in [most / 16, most / 4, most] {
            bench.progress(&format!("stop-copy, {axis}: {pins}"));
            let (size, time) = measure(bench, pins, step)?;
            sizes.push((pins as f64, size));
            times.push((pins as f64, time));
        }
        growth.push(Growth::new("device state", Cost::Bytes, axis, sizes, Expected::LINEAR));
        growth.push(Growth::new(
            "stop-copy",
            Cost::Nanoseconds,
            axis,
            times,
            Expected::UP_TO_LINEAR,
        ));
    }
    bench.unmap(SIZE)?;
    Ok(growth)
}

/// The state's bytes, and the median of the nanoseconds it takes, with so many of every `step`th page
/// pinned.
fn measure(bench: &Bench<'_>, pins: u64, step: u64) -> Result<(f64, f64)> {
    for_each(bench, Opcode::Pin, pins, step)?;
    let (mut size, mut times) = (0, Vec::new());
    for _ in 0..bench.repetitions {
        bench.check_stopped()?;
        let (bytes, time) = stop_copy(bench)?;
        size = bytes;
        times.push(time.as_nanos() as f64);
    }
    for_each(bench, Opcode::Unpin, pins, step)?;
    Ok((size as f64, median(&times)))
}

fn for_each(bench: &Bench<'_>, op: Opcode, pins: u64, step: u64) -> Result<()> {
    if step == 1 {
        return timed_command(&bench.rust, op as u32, IOVA, pins * PAGE_SIZE, 0).map(drop);
    }
    (0..pins).try_for_each(|i| {
        let iova = IOVA + i * step * PAGE_SIZE;
        timed_command(&bench.rust, op as u32, iova, PAGE_SIZE, 0).map(drop)
    })
}

/// Stops the device, reads its state, and lets it run again.
fn stop_copy(bench: &Bench<'_>) -> Result<(usize, Duration)> {
    let device = bench.rust.device();
    let begin = Instant::now();
    let file = device.set_migration_state(MigState::StopCopy)?;
    let state = file.map_or(Ok(Vec::new()), |file| file.read_to_end(AT_ONCE))?;
    let elapsed = begin.elapsed();
    device.set_migration_state(MigState::Running)?;
    ensure!(!state.is_empty(), "STOP_COPY came without data");
    Ok((state.len(), elapsed))
}
