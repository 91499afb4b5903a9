// SPDX-License-Identifier: GPL-2.0-only

//! How long type1 takes to begin, report and end its account, against how much there is to account
//! for.

use super::{
    Bench, IOVA, PAGE_SIZE,
    measurements::{Cost, Growth},
    stats::median,
    timed_command,
};
use anyhow::{Result, ensure};
use mdev_dma::Opcode;
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use vfio_client::{
    BitmapArgs, MapArgs, Memory, UnmapArgs,
    uapi::{VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE},
};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// What is measured, in this order.
const OPERATIONS: [&str; 5] =
    ["START", "GET_BITMAP", "GET_BITMAP of each mapping", "STOP", "UNMAP with bitmap"];

/// What there is to account for.
#[derive(Clone, Copy)]
struct Case {
    /// Bytes mapped.
    size: u64,
    /// Mappings of the same size, one behind the other.
    mappings: u64,
    /// Pinned pages, from the beginning on.
    pins: u64,
}

/// Measures everything.
pub fn run(bench: &Bench<'_>) -> Result<Vec<Growth>> {
    let mut growth = Vec::new();
    let sizes = [4, 16, 64, 256];
    let cases = sizes.map(|gib| (gib, Case { size: gib * GIB, mappings: 1, pins: 0 }));
    growth.extend(axis(bench, "GiB mapped (1 mapping, nothing pinned)", &cases)?);

    let most = bench.rust.limits()?.max_pins.min(65536);
    let pins = [most / 16, most / 8, most / 4, most / 2, most];
    let cases = pins.map(|pins| (pins, Case { size: 256 * MIB, mappings: 1, pins }));
    growth.extend(axis(bench, "pages pinned (1 mapping of 256 MiB)", &cases)?);

    // A mapping of 256 KiB fills whole words of the bitmap.
    let counts = [64, 256, 1024, 4096];
    let cases = counts.map(|mappings| (mappings, Case { size: GIB, mappings, pins: 0 }));
    growth.extend(axis(bench, "mappings (1 GiB in all, nothing pinned)", &cases)?);
    Ok(growth)
}

/// Measures all cases, each of which has so much of what is on the axis.
fn axis(bench: &Bench<'_>, axis: &'static str, cases: &[(u64, Case)]) -> Result<Vec<Growth>> {
    let mut points = [const { Vec::new() }; OPERATIONS.len()];
    for (x, case) in cases {
        bench.progress(&format!("dirty tracking, {axis}: {x}"));
        let medians = measure(bench, case)?;
        for (points, median) in points.iter_mut().zip(medians) {
            points.push((*x as f64, median));
        }
    }
    // With one mapping, all of them are each of them.
    let one = cases.iter().all(|(_, case)| case.mappings == 1);
    let growth = OPERATIONS.into_iter().zip(points).enumerate();
    Ok(growth
        .filter(|&(i, _)| !(one && i == 2))
        .map(|(_, (operation, points))| Growth::new(operation, Cost::Nanoseconds, axis, points))
        .collect())
}

/// The medians of a case, in nanoseconds.
fn measure(bench: &Bench<'_>, case: &Case) -> Result<[f64; OPERATIONS.len()]> {
    let memory = Arc::new(Memory::new(case.size as usize)?);
    let mut samples = [const { Vec::new() }; OPERATIONS.len()];
    for _ in 0..bench.repetitions {
        bench.check_stopped()?;
        for (samples, sample) in samples.iter_mut().zip(measure_once(bench, case, &memory)?) {
            samples.push(sample.as_nanos() as f64);
        }
    }
    Ok(samples.map(|samples| median(&samples)))
}

fn measure_once(
    bench: &Bench<'_>,
    case: &Case,
    memory: &Arc<Memory>,
) -> Result<[Duration; OPERATIONS.len()]> {
    let &Case { size, mappings, pins } = case;
    let container = bench.rust.device().container();
    let each = size / mappings;
    for offset in (0..size).step_by(each as usize) {
        container.map(&MapArgs {
            memory,
            offset: offset as usize,
            iova: IOVA + offset,
            size: each,
            flags: VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
            argsz: None,
        })?;
    }
    if pins != 0 {
        timed_command(&bench.rust, Opcode::Pin as u32, IOVA, pins * PAGE_SIZE, 0)?;
    }

    // Touched, so that nobody has to wait for its pages.
    let room = Memory::new((bitmap_of(size).size as usize).next_multiple_of(PAGE_SIZE as usize))?;
    for page in (0..room.len()).step_by(PAGE_SIZE as usize) {
        room.write(page, &[0; 8]);
    }
    let get =
        |offset, size| container.dirty_bitmap_into(IOVA + offset, size, &bitmap_of(size), &room, 0);

    let start = timed(|| container.dirty_start())?;
    let get_all = timed(|| get(0, size))?;
    check_dirty(&room, pins)?;
    let get_each = timed(|| (0..size).step_by(each as usize).try_for_each(|at| get(at, each)))?;
    let stop = timed(|| container.dirty_stop())?;
    container.dirty_start()?;
    let args = UnmapArgs { iova: IOVA, size, ..Default::default() };
    let unmap = timed(|| container.unmap_dirty_into(&args, &bitmap_of(size), &room, 0).map(drop))?;
    check_dirty(&room, pins)?;
    container.dirty_stop()?;
    Ok([start, get_all, get_each, stop, unmap])
}

fn bitmap_of(size: u64) -> BitmapArgs {
    BitmapArgs { pgsize: PAGE_SIZE, size: (size / PAGE_SIZE).div_ceil(64) * 8 }
}

/// Wrong answers are not worth their time.
fn check_dirty(bitmap: &Memory, pins: u64) -> Result<()> {
    let mut bytes = vec![0; bitmap.len()];
    bitmap.read(0, &mut bytes);
    let dirty: u64 = bytes.iter().map(|byte| u64::from(byte.count_ones())).sum();
    ensure!(dirty == pins, "{pins} pages are pinned, and {dirty} are reported dirty");
    Ok(())
}

fn timed(f: impl FnOnce() -> vfio_client::Result<()>) -> Result<Duration> {
    let begin = Instant::now();
    f()?;
    Ok(begin.elapsed())
}
