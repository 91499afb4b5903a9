// SPDX-License-Identifier: GPL-2.0-only

//! How long type1 takes to begin, report and end its account, against how much there is to account
//! for.

use super::{
    Bench, IOVA, PAGE_SIZE,
    axis::{Axis, timed},
    bitmap_of, map,
    measurements::{Expected, Growth},
    timed_command,
};
use anyhow::{Result, ensure};
use mdev_dma::Opcode;
use std::{sync::Arc, time::Duration};
use vfio_client::{Container, Memory, UnmapArgs, uapi::VFIO_DMA_UNMAP_FLAG_ALL};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// What is measured, in this order.
const OPERATIONS: [&str; 7] = [
    "MAP of all",
    "START",
    "GET_BITMAP",
    "GET_BITMAP, one by one",
    "STOP",
    "UNMAP with bitmap",
    "UNMAP of all",
];

/// A mapping of so much fills whole words of the bitmap.
const SMALL: u64 = 256 * KIB;

/// So many mappings a container may have (`dma_entry_limit`).
const MOST_MAPPINGS: u64 = 65535;

/// Of more mappings each isn't asked for: with 65,535 of them it would take as long as all else together.
const MOST_ASKED: u64 = 4096;

/// What there is to account for.
#[derive(Clone, Copy)]
struct Case {
    /// Mappings, one behind the other, of the same memory.
    mappings: u64,
    /// Bytes of one.
    each: u64,
    /// Pinned pages in each, from its beginning on.
    pins: u64,
}

impl Case {
    fn size(&self) -> u64 {
        self.mappings * self.each
    }
}

/// Measures everything.
pub fn run(bench: &Bench<'_>) -> Result<Vec<Growth>> {
    use Expected as E;
    let mut growth = Vec::new();

    // The largest bitmap there is has a page less than 8 TiB.
    let axis = Axis {
        what: "GiB in a mapping",
        amounts: &[4, 16, 64, 256, 1024, 4096],
        operations: OPERATIONS,
    };
    // STOP frees the bitmap.
    let expected = of_one_mapping(E::LINEAR, E::CONSTANT);
    growth.extend(measure(bench, &axis, expected, |gib| Case {
        mappings: 1,
        each: gib * GIB,
        pins: 0,
    })?);

    let most = bench.rust.limits()?.max_pins.min(65536);
    let axis = Axis {
        what: "pins in a mapping",
        amounts: &[most / 16, most / 8, most / 4, most / 2, most],
        operations: OPERATIONS,
    };
    // UNMAP has them all unpinned.
    let expected = of_one_mapping(E::CONSTANT, E::LINEAR);
    growth.extend(measure(bench, &axis, expected, |pins| Case {
        mappings: 1,
        each: 256 * MIB,
        pins,
    })?);

    let expected = [
        Some(E::LINEAR),
        Some(E::LINEAR),
        Some(E::LINEAR),
        Some(E::LINEAR.but_for("D3", E::QUADRATIC)),
        Some(E::LINEAR),
        Some(E::LINEAR),
        Some(E::LINEAR),
    ];
    for (pins, what) in [(0, "mappings"), (1, "mappings with a pin")] {
        let axis = Axis {
            what,
            amounts: &[1, 16, 256, 1024, 4096, 16384, MOST_MAPPINGS],
            operations: OPERATIONS,
        };
        growth.extend(measure(bench, &axis, expected, |mappings| Case {
            mappings,
            each: SMALL,
            pins,
        })?);
    }
    Ok(growth)
}

/// What is expected of one mapping, whatever grows there: but for these two, which are about different things.
fn of_one_mapping(stop: Expected, unmap_all: Expected) -> [Option<Expected>; OPERATIONS.len()] {
    use Expected as E;
    let (map, start, get, unmap) = (E::CONSTANT, E::LINEAR, E::LINEAR, E::LINEAR);
    [Some(map), Some(start), Some(get), None, Some(stop), Some(unmap), Some(unmap_all)]
}

/// Measures everything against what is on the axis, of which `case` makes what there is then.
fn measure(
    bench: &Bench<'_>,
    axis: &Axis<'_, { OPERATIONS.len() }>,
    expected: [Option<Expected>; OPERATIONS.len()],
    case: impl Fn(u64) -> Case,
) -> Result<Vec<Growth>> {
    let most = axis.amounts.iter().map(|&amount| case(amount).each).max();
    let memory = Arc::new(Memory::new(most.unwrap_or(0) as usize)?);
    axis.measure(bench, expected, |amount| measure_once(bench, &case(amount), &memory))
}

fn measure_once(
    bench: &Bench<'_>,
    case: &Case,
    memory: &Arc<Memory>,
) -> Result<[Option<Duration>; OPERATIONS.len()]> {
    let container = bench.container();
    let (size, pins) = (case.size(), case.mappings * case.pins);

    // Touched, so that nobody has to wait for its pages.
    let room = Memory::new((bitmap_of(size).size as usize).next_multiple_of(PAGE_SIZE as usize))?;
    for page in (0..room.len()).step_by(PAGE_SIZE as usize) {
        room.write(page, &[0; 8]);
    }
    let get =
        |offset, size| container.dirty_bitmap_into(IOVA + offset, size, &bitmap_of(size), &room, 0);
    let get_each = || (0..size).step_by(case.each as usize).try_for_each(|at| get(at, case.each));

    let map = timed(|| map_all(container, case, memory))?;
    pin_all(bench, case)?;
    let start = timed(|| container.dirty_start())?;
    let get_all = timed(|| get(0, size))?;
    check_dirty(&room, pins)?;
    let get_each = (case.mappings <= MOST_ASKED).then(|| timed(get_each)).transpose()?;
    let stop = timed(|| container.dirty_stop())?;
    container.dirty_start()?;
    let args = UnmapArgs { iova: IOVA, size, ..Default::default() };
    let unmap = timed(|| container.unmap_dirty_into(&args, &bitmap_of(size), &room, 0).map(drop))?;
    check_dirty(&room, pins)?;
    container.dirty_stop()?;

    map_all(container, case, memory)?;
    pin_all(bench, case)?;
    let args = UnmapArgs { flags: VFIO_DMA_UNMAP_FLAG_ALL, ..Default::default() };
    let unmap_all = timed(|| container.unmap(&args).map(drop))?;
    Ok([Some(map), Some(start), Some(get_all), get_each, Some(stop), Some(unmap), Some(unmap_all)])
}

fn map_all(container: &Container, case: &Case, memory: &Arc<Memory>) -> vfio_client::Result<()> {
    (0..case.size())
        .step_by(case.each as usize)
        .try_for_each(|offset| map(container, memory, 0, IOVA + offset, case.each))
}

fn pin_all(bench: &Bench<'_>, case: &Case) -> Result<()> {
    let Some(length) = case.pins.checked_mul(PAGE_SIZE).filter(|&length| length != 0) else {
        return Ok(());
    };
    (0..case.size()).step_by(case.each as usize).try_for_each(|offset| {
        timed_command(&bench.rust, Opcode::Pin as u32, IOVA + offset, length, 0).map(drop)
    })
}

/// Wrong answers are not worth their time.
fn check_dirty(bitmap: &Memory, pins: u64) -> Result<()> {
    let mut chunk = vec![0; MIB as usize];
    let mut dirty = 0;
    for offset in (0..bitmap.len()).step_by(chunk.len()) {
        let length = chunk.len().min(bitmap.len() - offset);
        bitmap.read(offset, &mut chunk[..length]);
        let bytes = chunk[..length].iter().filter(|&&byte| byte != 0);
        dirty += bytes.map(|byte| u64::from(byte.count_ones())).sum::<u64>();
    }
    ensure!(dirty == pins, "{pins} pages are pinned, and {dirty} are reported dirty");
    Ok(())
}
