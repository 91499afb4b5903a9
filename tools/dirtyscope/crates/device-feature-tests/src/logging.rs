// SPDX-License-Identifier: GPL-2.0-only

//! DMA logging: the device's own account of what it writes, held against type1's, and against what it
//! owes ([`start`], [`report`], [`random`]).

pub mod random;
pub mod report;
pub mod start;

use anyhow::{Context as _, Result, ensure};
use dirty_model::{Bitmap, Errno};
use harness::{Context, Scenario, scenario};
use mdev_dma::{
    GeneratorConfig,
    uapi::{
        RUST_MDEV_DMA_GEN_DMA_RW as DMA_RW, RUST_MDEV_DMA_GEN_PIN as PIN,
        RUST_MDEV_DMA_GEN_PINNED as PINNED,
    },
};
use std::{fs, ops::Range};
use testbed::{
    PAGE, at,
    fixture::{stopped_with, succeeded},
    logging::Logging,
    same, status,
};

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "device/logging/offered",
        "there is a type with DMA logging if, and only if, the kernel can report it",
        offered,
    ),
    scenario(
        "device/logging/written",
        "the log has what was written, however, and forgets what it reported",
        written,
    ),
    scenario(
        "device/logging/type1",
        "log and type1's bitmap have the same writes, type1 pinned pages as well, and neither more",
        type1,
    ),
    scenario(
        "device/logging/type1-apart",
        "what type1 has and the log hasn't, and the other way round: each page for its reason",
        type1_apart,
    ),
    scenario("device/logging/refused", "START twice and REPORT without START are EINVAL", refused),
];

/// Pages of memory.
const PAGES: u64 = 300;

fn offered(_context: &Context<'_>) -> Result<()> {
    const PATH: &str = "/proc/kallsyms";
    let symbols = fs::read_to_string(PATH).context(PATH)?;
    let served = symbols.lines().any(|line| line.split(' ').nth(2) == Some("iova_bitmap_set"));
    let offered = Logging::is_offered()?;
    ensure!(offered == served, "the type is there: {offered}, the kernel can serve it: {served}");
    Ok(())
}

fn written(context: &Context<'_>) -> Result<()> {
    let logging = Logging::new(context, PAGES)?;
    let device = logging.fixture().device();
    logging.fixture().pin(0..100)?;
    succeeded("WRITE", device.write_pinned(at(0, 0), PAGE, 1)?)?;
    logging.start(&[at(0, 0)..at(200, 0), at(250, 0)..at(260, 0)])?;
    logging.reports(&[])?;

    succeeded("WRITE", device.write_pinned(at(3, 5), 2 * PAGE, 1)?)?;
    succeeded("DMA_WRITE", device.dma_write(at(62, 4095), 3 * PAGE, 1)?)?;
    succeeded("READ", device.read_pinned(at(10, 0), PAGE)?)?;
    succeeded("DMA_READ", device.dma_read(at(150, 0), PAGE)?)?;
    logging.fixture().pin(150..160)?;
    logging.reports(&[3..6, 62..66])?;
    logging.reports(&[])?;

    // Over the ends of ranges, and of blocks of 64 pages.
    succeeded("DMA_WRITE", device.dma_write(at(190, 0), 65 * PAGE, 2)?)?;
    logging.reports(&[190..200, 250..255])?;
    succeeded("DMA_WRITE", device.dma_write(at(1, 0), 129 * PAGE, 2)?)?;
    let first = device.device().logged(at(0, 0)..at(64, 0), PAGE)?;
    ensure!(Bitmap::from_words(first, 64).runs() == [1..64], "the log of the first 64 pages");
    logging.reports(&[64..130])?;

    // A write that fails may have written.
    logging.fixture().unmap(0..PAGES)?;
    logging.fixture().map(0..100)?;
    let outcome = device.dma_write(at(99, 0), 2 * PAGE, 3)?;
    same("STATUS", Errno::EINVAL.0 as u64, outcome.status.into())?;
    ensure!(logging.report()?.get(99), "page 99 was written, and isn't in the log");
    device.device().stop_logging()?;
    succeeded("DMA_WRITE", device.dma_write(at(5, 0), PAGE, 4)?)?;
    logging.start(&[at(0, 0)..at(PAGES, 0)])?;
    logging.reports(&[])
}

fn type1(context: &Context<'_>) -> Result<()> {
    for mode in [PINNED, DMA_RW, PIN, PINNED | DMA_RW | PIN] {
        let logging = Logging::new(context, PAGES)?;
        let fixture = logging.fixture();
        if mode & PINNED != 0 {
            fixture.pin(0..PAGES)?;
        }
        let mut config = GeneratorConfig {
            iova: at(0, 0),
            length: PAGES * PAGE,
            seed: 3,
            limit: 0,
            rate: 0,
            mode,
        };
        logging.start(&[at(0, 0)..at(PAGES, 0)])?;
        fixture.container.dirty_start()?;
        for limit in [1, 50, 120, 121, PAGES + 10] {
            let before = fixture.device().generator()?.counter;
            config.limit = limit;
            fixture.device().continue_generator(&config)?;
            stopped_with(fixture.wait_for_generator()?, 0, limit)?;
            let (log, dirty) = (logging.report()?, fixture.dirty(PAGES)?);
            for page in 0..PAGES {
                let was = (before..limit).any(|n| config.page(n) == at(page, 0));
                ensure!(log.get(page) == was, "page {page} was written: {was}; mode {mode}");
                ensure!(dirty.get(page) || !was, "page {page} is lost to type1; mode {mode}");
                let may = was || mode & PINNED != 0;
                ensure!(may || !dirty.get(page), "page {page} is spurious in type1; mode {mode}");
            }
        }
    }
    Ok(())
}

/// Both accounts begin together, and are read together; then they are held against each other.
fn type1_apart(context: &Context<'_>) -> Result<()> {
    let logging = Logging::new(context, PAGES)?;
    let (fixture, device) = (logging.fixture(), logging.fixture().device());
    let same = |log: &[Range<u64>], type1: &[Range<u64>]| -> Result<()> {
        logging.reports(log)?;
        fixture.reports(0..PAGES, type1)
    };
    logging.start(&[at(0, 0)..at(200, 0)])?;
    fixture.container.dirty_start()?;
    same(&[], &[])?;
    // Written in the ranges: both.
    succeeded("DMA_WRITE", device.dma_write(at(62, 4095), 70 * PAGE, 1)?)?;
    same(&[62..133], &[62..133])?;
    // Beside them: type1.
    succeeded("DMA_WRITE", device.dma_write(at(199, 0), 2 * PAGE, 1)?)?;
    same(&[199..200], &[199..201])?;
    // Pinned, and written or not: type1 has it each time.
    fixture.pin(10..20)?;
    succeeded("WRITE", device.write_pinned(at(12, 0), PAGE, 1)?)?;
    same(&[12..13], &[10..20])?;
    same(&[], &[10..20])?;
    // And once more after that, as they could be written until they were unpinned.
    succeeded("UNPIN", device.unpin(at(10, 0), 10 * PAGE)?)?;
    same(&[], &[10..20])?;
    same(&[], &[])?;
    // By a command that fails, of which a part was written: the log may have all of its range.
    fixture.unmap(0..PAGES)?;
    fixture.map(0..100)?;
    fixture.map(120..PAGES)?;
    let failed = device.dma_write(at(98, 0), 10 * PAGE, 1)?;
    ensure!(failed.status != 0, "DMA_WRITE to a gap: {failed:?}");
    let (log, dirty) = (logging.report()?.runs(), fixture.dirty_of(&[0..100, 120..PAGES], PAGES)?);
    let has_part = log.iter().any(|run| run.contains(&98) && run.contains(&99));
    let has_more = log.iter().any(|run| run.start < 98 || 108 < run.end);
    ensure!(
        has_part && !has_more,
        "98..108 was to be written and 98..100 was, the log has {log:?}"
    );
    // That type1 should have it is what type1/defect/D9-dma-rw-partial is about.
    let dirty = dirty.runs();
    ensure!(dirty.is_empty() || dirty == [98..100], "98..100 was written, type1 has {dirty:?}");
    // Unmapped after it was written: type1's account has gone with the mapping, the log hasn't.
    succeeded("DMA_WRITE", device.dma_write(at(5, 0), PAGE, 1)?)?;
    fixture.unmap(0..100)?;
    fixture.map(0..100)?;
    logging.reports(&[5..6])?;
    ensure!(fixture.dirty_of(&[0..100], PAGES)?.runs().is_empty(), "type1 has what was unmapped");
    Ok(())
}

fn refused(context: &Context<'_>) -> Result<()> {
    let logging = Logging::new(context, PAGES)?;
    let device = logging.fixture().device().device();
    let all = at(0, 0)..at(PAGES, 0);
    let report = status(device.logged(all.clone(), PAGE))?;
    ensure!(report == Err(Errno::EINVAL), "REPORT without START: {report:?}");
    device.stop_logging()?;
    logging.start(std::slice::from_ref(&all))?;
    let again = status(device.start_logging(std::slice::from_ref(&all), PAGE))?;
    ensure!(again == Err(Errno::EINVAL), "START twice: {again:?}");
    device.stop_logging()?;
    let report = status(device.logged(all.clone(), PAGE))?;
    ensure!(report == Err(Errno::EINVAL), "REPORT after STOP: {report:?}");
    logging.start(&[all])
}
