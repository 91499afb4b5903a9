// SPDX-License-Identifier: GPL-2.0-only

//! What devices of `rust_mdev_dma` do besides operations: the generator, the log, and all by iommufd.

use crate::sweep::{injected, sweep};
use anyhow::{Result, ensure};
use dirty_model::Errno;
use harness::{Context, Failure, Scenario, scenario};
use mdev_dma::{
    GeneratorConfig, MdevDma, Outcome,
    uapi::{RUST_MDEV_DMA_GEN_DMA_RW as DMA_RW, RUST_MDEV_DMA_GEN_PIN as PIN},
};
use testbed::{
    Injected, PAGE, at,
    direct::Direct,
    fixture::{Fixture, stopped_with, succeeded},
    logging::Logging,
    same,
};
use vfio_client::{
    Ioas,
    fail_nth::{Workers, with_failure},
};

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "fail-nth/generator",
        "the generator stops before the page whose write fails, and goes on from there",
        generator,
    ),
    scenario("fail-nth/logging/start", "a log is started: there is one, or none", log_start),
    scenario("fail-nth/logging/write", "what is written while a log is kept is in it", log_write),
    scenario(
        "fail-nth/logging/report",
        "a log is read: what was written is in it, or is still to be read",
        log_report,
    ),
    scenario("fail-nth/iommufd/open", "a device is opened by iommufd", direct_open),
    scenario("fail-nth/iommufd/pin", "PIN by iommufd: of all pages, or of none", direct_pin),
    scenario(
        "fail-nth/iommufd/unpin",
        "UNPIN by iommufd of a part of what was pinned at once",
        direct_unpin,
    ),
    scenario("fail-nth/iommufd/write", "DMA_WRITE by iommufd", direct_write),
];

const PAGES: u64 = 70;

/// What came of a command, of which an allocation was to fail.
fn command(n: u32, call: impl FnOnce() -> mdev_dma::Result<Outcome>) -> Result<Injected> {
    let (outcome, used) = with_failure(n, call)?;
    let status = match outcome {
        Ok(outcome) => outcome.status,
        // The doorbell was not reached.
        Err(error) if error.errno() != 0 => error.errno() as u32,
        Err(error) => return Err(error.into()),
    };
    ended(status, used)
}

/// The same of a status.
fn ended(status: u32, used: bool) -> Result<Injected> {
    match (status, used) {
        (0, true) => Ok(Injected::Absorbed),
        (0, false) => Ok(Injected::Unused),
        (status, true) if [Errno::ENOMEM, Errno::EFAULT].contains(&Errno(status as i32)) => {
            Ok(Injected::Failed)
        }
        (status, _) => Err(Failure::new(format!("STATUS is {status}")).into()),
    }
}

fn generator(context: &Context<'_>) -> Result<()> {
    const LIMIT: u64 = 6;
    let config = GeneratorConfig {
        iova: at(0, 0),
        length: LIMIT * PAGE,
        seed: 9,
        limit: LIMIT,
        rate: 0,
        mode: DMA_RW | PIN,
    };
    sweep(context, "the generator", |n| {
        let fixture = Fixture::new(context, LIMIT)?;
        fixture.container.dirty_start()?;
        let workers = Workers::arm(n)?;
        fixture.device().start_generator(&config)?;
        let stopped = fixture.wait_for_generator();
        let injected = ended(stopped?.status, workers.disarm())?;
        let counter = fixture.device().generator()?.counter;
        fixture.has_generated(&config, counter)?;
        if injected == Injected::Failed {
            fixture.device().continue_generator(&config)?;
        }
        stopped_with(fixture.wait_for_generator()?, 0, LIMIT)?;
        fixture.has_generated(&config, LIMIT)?;
        fixture.reports(0..LIMIT, &[0..LIMIT])?;
        same("PINS", 0, fixture.device().pins()?)?;
        Ok(injected)
    })
}

fn log_start(context: &Context<'_>) -> Result<()> {
    sweep(context, "DMA_LOGGING_START", |n| {
        let logging = Logging::new(context, PAGES)?;
        let ranges = [at(0, 0)..at(5, 0), at(10, 0)..at(PAGES, 0)];
        let (started, injected) = injected(n, || logging.start(&ranges))?;
        if started.is_none() {
            logging.start(&ranges)?;
        }
        let device = logging.fixture().device();
        succeeded("DMA_WRITE", device.dma_write(at(4, 0), 8 * PAGE, 1)?)?;
        logging.reports(&[4..5, 10..12])?;
        Ok(injected)
    })
}

fn log_write(context: &Context<'_>) -> Result<()> {
    sweep(context, "DMA_WRITE while a log is kept", |n| {
        let logging = Logging::new(context, PAGES)?;
        logging.start(&[at(0, 0)..at(PAGES, 0)])?;
        let write = || logging.fixture().device().dma_write(at(62, 0), 4 * PAGE, 1);
        let injected = command(n, write)?;
        if injected == Injected::Absorbed {
            // Without memory for the log, everything counts as written.
            let log = logging.report()?.runs();
            ensure!(log == [62..66] || log == [0..PAGES], "the log has {log:?}");
            return Ok(injected);
        }
        if injected == Injected::Failed {
            // It may have written all but the last byte.
            let log = logging.report()?;
            let written = |page| logging.fixture().page(page).iter().any(|&byte| byte != 0);
            for page in (0..PAGES).filter(|&page| written(page)) {
                ensure!(log.get(page), "page {page} was written, and isn't in the log");
            }
            succeeded("DMA_WRITE", write()?)?;
        }
        logging.reports(&[62..66])?;
        Ok(injected)
    })
}

fn log_report(context: &Context<'_>) -> Result<()> {
    sweep(context, "DMA_LOGGING_REPORT", |n| {
        let logging = Logging::new(context, PAGES)?;
        logging.start(&[at(0, 0)..at(PAGES, 0)])?;
        let device = logging.fixture().device();
        succeeded("DMA_WRITE", device.dma_write(at(62, 0), 4 * PAGE, 1)?)?;
        let (log, injected) = injected(n, || logging.report())?;
        let runs = log.map_or_else(|| logging.report(), Ok)?.runs();
        ensure!(runs == [62..66], "the log has {runs:?}");
        logging.reports(&[])?;
        Ok(injected)
    })
}

fn direct_open(context: &Context<'_>) -> Result<()> {
    // Skips the scenario where there is none.
    Direct::new(context, 1)?;
    let mdev = context.device(0)?;
    sweep(context, "a device by iommufd", |n| {
        let ioas = Ioas::new()?;
        let (device, injected) = injected(n, || Ok(MdevDma::open_in(&ioas, &mdev)?))?;
        let device = device.map_or_else(|| MdevDma::open_in(&ioas, &mdev), Ok)?;
        same("PINS", 0, device.pins()?)?;
        Ok(injected)
    })
}

fn direct_pin(context: &Context<'_>) -> Result<()> {
    sweep(context, "PIN by iommufd", |n| {
        let direct = Direct::new(context, PAGES)?;
        let device = &direct.device;
        // Only the pages of the second batch aren't there yet: each that isn't has allocations of its own, all
        // alike, and all of them took minutes.
        direct.memory.write(0, &vec![0; 64 * PAGE as usize]);
        let pin = || device.pin(at(1, 0), 67 * PAGE);
        let injected = command(n, pin)?;
        if injected == Injected::Failed {
            same("PINS after a PIN that failed", 0, device.pins()?)?;
            succeeded("PIN", pin()?)?;
        }
        same("PINS", 67, device.pins()?)?;
        succeeded("WRITE", device.write_pinned(at(1, 0), 67 * PAGE, 1)?)?;
        direct.has(at(1, 0)..at(68, 0), 1)?;
        direct.unmap()?;
        same("PINS", 0, device.pins()?)?;
        Ok(injected)
    })
}

fn direct_unpin(context: &Context<'_>) -> Result<()> {
    sweep(context, "UNPIN by iommufd", |n| {
        let direct = Direct::new(context, PAGES)?;
        let device = &direct.device;
        succeeded("PIN", device.pin(at(1, 0), 67 * PAGE)?)?;
        let unpin = || device.unpin(at(20, 0), 10 * PAGE);
        let injected = command(n, unpin)?;
        if injected == Injected::Failed {
            same("PINS after an UNPIN that failed", 67, device.pins()?)?;
            succeeded("UNPIN", unpin()?)?;
        }
        same("PINS", 57, device.pins()?)?;
        direct.unmap()?;
        same("PINS", 0, device.pins()?)?;
        Ok(injected)
    })
}

fn direct_write(context: &Context<'_>) -> Result<()> {
    sweep(context, "DMA_WRITE by iommufd", |n| {
        let direct = Direct::new(context, PAGES)?;
        let write = || direct.device.dma_write(at(1, 0), 20 * PAGE, 1);
        let injected = command(n, write)?;
        if injected == Injected::Failed {
            succeeded("DMA_WRITE", write()?)?;
        }
        direct.has(at(1, 0)..at(21, 0), 1)?;
        Ok(injected)
    })
}
