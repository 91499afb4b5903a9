// SPDX-License-Identifier: GPL-2.0-only

//! REPORT: what it says, in which pages, and what it leaves.

use anyhow::{Result, ensure};
use dirty_model::Errno;
use harness::{Context, Failure, Scenario, Shows, Signature, defect, scenario};
use mdev_dma::{GeneratorConfig, Opcode, uapi};
use std::time::Instant;
use testbed::{
    PAGE, at,
    fixture::{LONG, is_awaited, succeeded},
    logging::{Logging, LoggingPair},
    status,
};
use vfio_client::{Access, Memory};

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "device/logging/report-pages",
        "REPORT in pages of 4 KiB and up to 2^63 bytes has each that was written in",
        pages,
    ),
    scenario(
        "device/logging/report-ranges",
        "REPORT across ranges, beside them, of nothing, unaligned and twice has what is due",
        ranges,
    ),
    scenario(
        "device/logging/report-sets",
        "REPORT sets bits wherever the bitmap is, and clears none",
        only_sets,
    ),
    scenario(
        "device/logging/report-refused",
        "REPORT refuses page sizes and ranges that are none, and forgets nothing",
        refused,
    ),
    defect(
        "device/logging/D28-report-fault",
        "REPORT to a bitmap that can't be written fails, or forgets nothing",
        fault,
        Signature {
            defect: "D28",
            shows: Shows::Difference { what: FORGOTTEN, lost: &[], spurious: &[] },
            complaints: &[],
        },
    ),
    scenario(
        "device/logging/while-writing",
        "who copies what REPORT says, again and again, has what the device wrote in the end",
        while_writing,
    ),
    scenario(
        "device/logging/amid-write",
        "what is still being written when REPORT comes is in the next",
        amid_write,
    ),
    scenario(
        "device/logging/limit",
        "with more than fits into the log, all is reported, but nothing of no bytes",
        limit,
    ),
];

const PAGES: u64 = 300;

/// What is written, and that the model knows of it.
fn write(pair: &mut LoggingPair, iova: u64, length: u64) -> Result<()> {
    let outcome = pair.fixture().device().dma_write(iova, length, 1)?;
    succeeded("DMA_WRITE", outcome)?;
    pair.written(iova, length, outcome);
    Ok(())
}

fn pages(context: &Context<'_>) -> Result<()> {
    let mut pair = LoggingPair::new(context, PAGES)?;
    for shift in (12..=34).chain([40, 62, 63]) {
        let page_size = 1 << shift;
        pair.start(&[(at(0, 0), PAGES * PAGE)], PAGE)?;
        write(&mut pair, at(3, 5), 1)?;
        write(&mut pair, at(17, 4095), 2)?;
        write(&mut pair, at(60, 0), 9 * PAGE)?;
        write(&mut pair, at(PAGES - 1, 0), PAGE)?;
        pair.report(at(0, 0), PAGES * PAGE, page_size)?;
        pair.report_all()?;
        // All of the address space that has a bitmap so small, or nearly.
        write(&mut pair, at(3, 5), 1)?;
        let end = page_size.checked_mul(1 << 20).unwrap_or(u64::MAX - 1);
        pair.report(0, end.max(at(PAGES, 0)).min(page_size.saturating_mul(1 << 22)), page_size)?;
        pair.report_all()?;
        pair.stop()?;
    }
    Ok(())
}

fn ranges(context: &Context<'_>) -> Result<()> {
    let mut pair = LoggingPair::new(context, PAGES)?;
    pair.start(&[(at(10, 0), 90 * PAGE), (at(150, 0), 100 * PAGE)], PAGE)?;
    let all = PAGES * PAGE;
    for (iova, length) in [
        // In one, in both, at their ends, in between, before and behind.
        (at(20, 0), 10 * PAGE),
        (at(90, 0), 70 * PAGE),
        (at(99, 0), PAGE),
        (at(149, 0), 2 * PAGE),
        (at(100, 0), 50 * PAGE),
        (at(0, 0), 10 * PAGE),
        (at(250, 0), 50 * PAGE),
        (at(PAGES, 0), 100 * PAGE),
        (0, at(0, 0)),
        (at(0, 0), 0),
        (0, 0),
        (at(50, 0), 0),
        // Parts of pages.
        (at(50, 1), 1),
        (at(50, 2048), PAGE),
        (at(50, 4095), 2),
        (at(50, 0), PAGE - 1),
        (at(62, 100), 70 * PAGE),
        (at(98, 2048), 60 * PAGE + 3),
    ] {
        write(&mut pair, at(0, 0), all)?;
        for page_size in [PAGE, PAGE, 2 * PAGE, 64 * PAGE] {
            pair.report(iova, length, page_size)?;
        }
        pair.report_all()?;
    }
    Ok(())
}

fn only_sets(context: &Context<'_>) -> Result<()> {
    const BEFORE: u8 = 0b0101_1010;

    let logging = Logging::new(context, PAGES)?;
    let device = logging.fixture().device();
    logging.start(&[at(0, 0)..at(PAGES, 0)])?;
    let room = Memory::new(3 * PAGE as usize)?;
    let bytes = PAGES.div_ceil(64) as usize * 8;
    // At the beginning of a page, across two, and where one ends.
    for offset in [PAGE as usize, 2 * PAGE as usize - 16, 2 * PAGE as usize - bytes] {
        room.write(0, &vec![BEFORE; room.len()]);
        succeeded("DMA_WRITE", device.dma_write(at(3, 0), 20 * PAGE, 1)?)?;
        succeeded("DMA_WRITE", device.dma_write(at(PAGES - 1, 0), PAGE, 1)?)?;
        device.device().logged_into(at(0, 0), PAGES * PAGE, PAGE, &room, offset)?;
        let mut found = vec![0; room.len()];
        room.read(0, &mut found);
        for (i, byte) in found.into_iter().enumerate() {
            let written = |page| (3..23).contains(&page) || page == PAGES as usize - 1;
            let first = i.checked_sub(offset).map(|byte| byte * 8);
            let set = (0..8).filter(|bit| first.is_some_and(|first| written(first + bit)));
            let expected = set.fold(BEFORE, |byte, bit| byte | (1 << bit));
            ensure!(
                byte == expected,
                "bitmap at {offset}: byte {i} is {byte:#x}, not {expected:#x}"
            );
        }
    }
    Ok(())
}

fn refused(context: &Context<'_>) -> Result<()> {
    let mut pair = LoggingPair::new(context, PAGES)?;
    pair.start(&[(at(0, 0), PAGES * PAGE)], PAGE)?;
    write(&mut pair, at(5, 0), 70 * PAGE)?;
    for page_size in [0, 1, 2048, PAGE + 1, PAGE + 2048, 3 * PAGE, 5 << 20, u64::MAX] {
        pair.report(at(0, 0), PAGES * PAGE, page_size)?;
    }
    for (iova, length) in
        [(u64::MAX, 1), (u64::MAX - PAGE + 1, PAGE), (0u64.wrapping_sub(5 * PAGE), 9 * PAGE)]
    {
        pair.report(iova, length, PAGE)?;
    }
    pair.report_all()
}

const FORGOTTEN: &str =
    "REPORT to where it can't write succeeds, and has forgotten what was written";

fn fault(context: &Context<'_>) -> Result<()> {
    let logging = Logging::new(context, PAGES)?;
    let device = logging.fixture().device();
    logging.start(&[at(0, 0)..at(PAGES, 0)])?;
    let room = Memory::with_guard(2 * PAGE as usize, PAGE as usize)?;
    room.set_access(0..PAGE as usize, Access::Read)?;
    // Memory that can only be read, and none.
    for offset in [0, room.len()] {
        succeeded("DMA_WRITE", device.dma_write(at(3, 0), 20 * PAGE, 1)?)?;
        let report = device.device().logged_into(at(0, 0), PAGES * PAGE, PAGE, &room, offset);
        match status(report)? {
            Ok(()) if logging.report()?.runs() != [3..23] => {
                return Failure::unless_none(Some(FORGOTTEN.into()));
            }
            // The log is to be taken for corrupt.
            Err(errno) => ensure!(errno == Errno::EFAULT, "REPORT: {errno}, but must be EFAULT"),
            Ok(()) => {}
        }
    }
    Ok(())
}

fn while_writing(context: &Context<'_>) -> Result<()> {
    const ENOUGH: u64 = 40 * PAGES;

    for mode in [
        uapi::RUST_MDEV_DMA_GEN_DMA_RW,
        uapi::RUST_MDEV_DMA_GEN_PINNED,
        uapi::RUST_MDEV_DMA_GEN_PIN,
    ] {
        let logging = Logging::new(context, PAGES)?;
        let fixture = logging.fixture();
        if mode == uapi::RUST_MDEV_DMA_GEN_PINNED {
            fixture.pin(0..PAGES)?;
        }
        let length = PAGES * PAGE;
        let config = GeneratorConfig { iova: at(0, 0), length, seed: 5, limit: 0, rate: 0, mode };
        logging.start(&[at(0, 0)..at(PAGES, 0)])?;
        let mut copy = vec![0; fixture.memory.len()];
        fixture.device().start_generator(&config)?;
        let (begin, mut reports) = (Instant::now(), 0);
        loop {
            let ended = fixture.device().generator()?.counter >= ENOUGH;
            if ended {
                fixture.device().stop_generator()?;
            }
            for page in logging.report()?.runs().into_iter().flatten() {
                let bytes = (page * PAGE) as usize..((page + 1) * PAGE) as usize;
                fixture.memory.read(bytes.start, &mut copy[bytes]);
            }
            reports += 1;
            if ended {
                break;
            }
            ensure!(begin.elapsed() < LONG, "the generator has not written enough");
        }
        context.note(format!("{reports} reports"));
        ensure!(reports > 2, "only {reports} reports while the generator wrote");
        let stale = (0..PAGES).filter(|page| {
            let bytes = (page * PAGE) as usize..((page + 1) * PAGE) as usize;
            fixture.page(*page) != copy[bytes]
        });
        let stale: Vec<_> = stale.collect();
        ensure!(stale.is_empty(), "mode {mode}: these pages were not reported again: {stale:?}");
    }
    Ok(())
}

fn amid_write(context: &Context<'_>) -> Result<()> {
    let logging = Logging::new(context, PAGES)?;
    let fixture = logging.fixture();
    logging.start(&[at(0, 0)..at(PAGES, 0)])?;
    // It is being written for as long as nobody serves its page.
    let waits = fixture.memory.unserved()?;
    fixture.device().run_in_background(Opcode::DmaWrite, at(3, 0), PAGE, 1)?;
    is_awaited(&waits)?;
    logging.report()?;
    drop(waits);
    succeeded("DMA_WRITE", fixture.device().wait(LONG)?)?;
    logging.reports(&[3..4])
}

fn limit(context: &Context<'_>) -> Result<()> {
    /// Words that a log has, of 64 pages each.
    const WORDS: u64 = 1 << 18;
    /// Words that a mapping takes; all of them are of the same memory.
    const EACH: u64 = 256;

    let logging = Logging::new(context, EACH * 64)?;
    let (fixture, device) = (logging.fixture(), logging.fixture().device());
    for n in 1..=WORDS / EACH {
        fixture.map_at(0..EACH * 64, n * EACH * 64)?;
    }
    let all = at(0, 0)..at((WORDS + EACH) * 64, 0);
    logging.start(std::slice::from_ref(&all))?;
    for word in 0..WORDS {
        succeeded("DMA_WRITE", device.dma_write(at(word * 64, 0), 1, 1)?)?;
    }
    // The log is full, and exact; a page for each word it has.
    let some = at(64, 0)..at(128, 0);
    let words = device.device().logged(some.clone(), PAGE)?;
    ensure!(
        words == [1],
        "a log that is full has {words:x?} for a word in which one page was written"
    );
    succeeded("DMA_WRITE", device.dma_write(at(64, 0), 1, 1)?)?;
    succeeded("DMA_WRITE", device.dma_write(at(WORDS * 64, 0), 1, 1)?)?;
    for _ in 0..2 {
        let words = device.device().logged(some.clone(), PAGE)?;
        ensure!(words == [u64::MAX], "a log with more than fits has {words:x?}");
    }
    // No bytes have no pages, whatever the log has.
    let room = Memory::new(PAGE as usize)?;
    device.device().logged_into(some.start, 0, PAGE, &room, 0)?;
    let mut bytes = vec![0; room.len()];
    room.read(0, &mut bytes);
    ensure!(bytes.iter().all(|&byte| byte == 0), "REPORT of no bytes has set bits");
    device.device().stop_logging()?;
    logging.start(std::slice::from_ref(&all))?;
    let words = device.device().logged(some, PAGE)?;
    ensure!(words == [0], "after STOP and START, the log has {words:x?}");
    Ok(())
}
