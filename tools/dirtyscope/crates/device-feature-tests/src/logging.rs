// SPDX-License-Identifier: GPL-2.0-only

//! DMA logging: the device's own account of what it writes, held against type1's.

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
use std::fs;
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
        "log and type1's bitmap each have what the generator wrote, type1 all of the log",
        type1,
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
            }
        }
    }
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
