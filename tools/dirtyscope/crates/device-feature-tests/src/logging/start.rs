// SPDX-License-Identifier: GPL-2.0-only

//! START: which ranges it takes, and that those are logged.

use anyhow::{Result, ensure};
use dirty_model::{Errno, LOG_RANGES_MAX};
use harness::{Context, Scenario, scenario};
use testbed::{PAGE, at, fixture::succeeded, logging::LoggingPair, status};
use vfio_client::Memory;

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "device/logging/start-ranges",
        "START takes up to 256 ranges, in any order, and what is written in them is logged",
        ranges,
    ),
    scenario(
        "device/logging/start-refused",
        "START refuses ranges that are none, too many, unaligned, overlapping or too long, and logs nothing",
        refused,
    ),
    scenario(
        "device/logging/start-fault",
        "START of ranges that can't be read is EFAULT, and logs nothing",
        fault,
    ),
    scenario(
        "device/logging/start-page-sizes",
        "the page size of START is a hint: the device chooses its own",
        page_sizes,
    ),
];

/// Pages of memory: twice as many as there can be ranges, and some.
const PAGES: u64 = 2 * LOG_RANGES_MAX as u64 + 88;

/// A page.
fn page(n: u64) -> (u64, u64) {
    (at(n, 0), PAGE)
}

/// So many pages, of which no two touch.
fn many(count: u64) -> Vec<(u64, u64)> {
    (0..count).map(|n| page(2 * n)).collect()
}

fn ranges(context: &Context<'_>) -> Result<()> {
    let mut pair = LoggingPair::new(context, PAGES)?;
    let mut backwards = many(LOG_RANGES_MAX as u64);
    backwards.reverse();
    for ranges in [
        vec![(at(0, 0), PAGES * PAGE)],
        vec![page(7)],
        many(LOG_RANGES_MAX as u64),
        backwards,
        // Side by side, and around the word of a bitmap.
        vec![(at(60, 0), 4 * PAGE), (at(64, 0), 4 * PAGE), page(68)],
        // Where nothing is mapped, and all there is.
        vec![page(PAGES + 5), page(3)],
        vec![(0, u64::MAX - PAGE + 1)],
    ] {
        pair.start(&ranges, PAGE)?;
        write_all(&mut pair)?;
        pair.report_all()?;
        pair.report_all()?;
        pair.stop()?;
    }
    Ok(())
}

fn write_all(pair: &mut LoggingPair) -> Result<()> {
    let outcome = pair.fixture().device().dma_write(at(0, 0), PAGES * PAGE, 1)?;
    succeeded("DMA_WRITE", outcome)?;
    pair.written(at(0, 0), PAGES * PAGE, outcome);
    Ok(())
}

fn refused(context: &Context<'_>) -> Result<()> {
    let mut pair = LoggingPair::new(context, PAGES)?;
    for (ranges, page_size) in [
        (vec![], PAGE),
        (many(LOG_RANGES_MAX as u64 + 1), PAGE),
        (vec![page(0), (at(1, 1), PAGE)], PAGE),
        (vec![page(0), (at(1, 0), PAGE + 1)], PAGE),
        // Of larger pages, the IOVA isn't a multiple, then the length.
        (vec![(at(1, 0), 16 * PAGE)], 16 * PAGE),
        (vec![(at(0, 0), 15 * PAGE)], 16 * PAGE),
        (vec![page(0)], 0),
        (vec![(at(0, 0), 2 * PAGE), page(1)], PAGE),
        (vec![page(1), (at(0, 0), 8 * PAGE)], PAGE),
        (vec![page(1), page(2), page(1)], PAGE),
        (vec![(u64::MAX - PAGE + 1, PAGE)], PAGE),
        (vec![page(0), (PAGE, u64::MAX - PAGE + 1)], PAGE),
    ] {
        pair.start(&ranges, page_size)?;
        ensure!(!pair.is_on(), "the model takes {ranges:x?}");
        write_all(&mut pair)?;
        // It doesn't log.
        pair.report_all()?;
    }
    // Nor does a refused one end what was started.
    pair.start(&[page(3)], PAGE)?;
    write_all(&mut pair)?;
    pair.start(&[page(4)], PAGE)?;
    pair.start(&[], PAGE)?;
    pair.report_all()
}

fn fault(context: &Context<'_>) -> Result<()> {
    let mut pair = LoggingPair::new(context, PAGES)?;
    let memory = Memory::with_guard(PAGE as usize, PAGE as usize)?;
    let range: Vec<_> = [at(0, 0), PAGE].into_iter().flat_map(u64::to_ne_bytes).collect();
    let last = memory.len() - range.len();
    memory.write(last, &range);
    // No range can be read, and then only the first of two.
    for (offset, count) in [(memory.len(), 1), (last, 2)] {
        let device = pair.fixture().device().device();
        let answer = status(device.start_logging_from(PAGE, count, &memory, offset))?;
        ensure!(answer == Err(Errno::EFAULT), "START: {answer:?}, but must be EFAULT");
        pair.report_all()?;
    }
    Ok(())
}

fn page_sizes(context: &Context<'_>) -> Result<()> {
    let mut pair = LoggingPair::new(context, PAGES)?;
    for page_size in [1, 512, PAGE, 2 * PAGE, 16 * PAGE, 64 * PAGE, 1 << 21, 1 << 30] {
        let length = (64 * PAGE).max(page_size);
        pair.start(&[(at(0, 0), length), (at(0, 0) + 2 * length, length)], page_size)?;
        ensure!(pair.is_on(), "the model refuses pages of {page_size:#x}");
        write_all(&mut pair)?;
        pair.report_all()?;
        pair.stop()?;
    }
    // A part of a page that was asked for is logged as the page.
    pair.start(&[(at(5, 100), 1), (at(9, 4095), 2)], 1)?;
    write_all(&mut pair)?;
    pair.report_all()
}
