// SPDX-License-Identifier: GPL-2.0-only

//! The generator: that it writes what follows from seed and counter, and when it stops.

use anyhow::{Result, ensure};
use dirty_model::Errno;
use harness::{Context, Scenario, scenario};
use mdev_dma::{
    GeneratorConfig, IN_PROGRESS,
    uapi::{
        RUST_MDEV_DMA_GEN_DMA_RW as DMA_RW, RUST_MDEV_DMA_GEN_PIN as PIN,
        RUST_MDEV_DMA_GEN_PINNED as PINNED, RUST_MDEV_DMA_GEN_START as START,
    },
};
use std::{
    collections::BTreeSet,
    thread,
    time::{Duration, Instant},
};
use testbed::fixture::{Fixture, check_generated, stopped_with, succeeded};
use testbed::{PAGE, at, same};

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "device/generator/contents",
        "in each mode, memory is what seed and counter say, and type1 reports each write",
        contents,
    ),
    scenario("device/generator/in-turn", "with several modes it writes in each in turn", in_turn),
    scenario(
        "device/generator/stop",
        "once stopped it doesn't write, and its counter is exact",
        stop,
    ),
    scenario(
        "device/generator/continue",
        "CONTINUE counts on, START from 0; the registers may change meanwhile",
        goes_on,
    ),
    scenario("device/generator/rate", "it keeps to its rate", rate),
    scenario(
        "device/generator/pre-copy",
        "copying what is dirty while it writes, then once more, copies all of memory",
        pre_copy,
    ),
    scenario(
        "device/generator/bad-config",
        "invalid configurations are refused with their errno, and nothing is written",
        bad_config,
    ),
    scenario(
        "device/generator/write-fails",
        "it stops at the first page that it can't write, with the errno of that",
        write_fails,
    ),
    scenario(
        "device/generator/unmap",
        "it stops when its memory is unmapped while it writes",
        unmap,
    ),
    scenario("device/generator/commands", "commands run while it does", commands),
    scenario("device/generator/reset-and-close", "RESET and close stop it", reset_and_close),
];

/// All ways of writing.
const ALL: u32 = PINNED | DMA_RW | PIN;

/// As fast as it can, in the window of so many pages.
fn config(pages: u64, mode: u32) -> GeneratorConfig {
    let seed = 0x5eed_0000 + u64::from(mode);
    GeneratorConfig { iova: at(0, 0), length: pages * PAGE, seed, limit: 0, rate: 0, mode }
}

fn contents(context: &Context<'_>) -> Result<()> {
    const PAGES: u64 = 150;
    for mode in [PINNED, DMA_RW, PIN, DMA_RW | PIN, ALL] {
        for limit in [1, 40, PAGES, 3 * PAGES + 7] {
            let fixture = Fixture::new(context, PAGES)?;
            // Before tracking starts: only what is written may be dirty, unless pages stay pinned.
            if mode & PINNED != 0 {
                fixture.pin(0..PAGES)?;
            }
            fixture.container.dirty_start()?;
            let config = GeneratorConfig { limit, ..config(PAGES, mode) };
            fixture.device().start_generator(&config)?;
            stopped_with(fixture.wait_for_generator()?, 0, limit)?;
            fixture.has_generated(&config, limit)?;

            let written: BTreeSet<_> = (0..limit).map(|n| config.page(n)).collect();
            let dirty = fixture.dirty(PAGES)?;
            for page in 0..PAGES {
                let expected = mode & PINNED != 0 || written.contains(&at(page, 0));
                let (is, found) = (["clean", "dirty"][usize::from(expected)], dirty.get(page));
                ensure!(found == expected, "mode {mode}, limit {limit}: page {page} must be {is}");
            }
            same("PINS", if mode & PINNED != 0 { PAGES } else { 0 }, fixture.device().pins()?)?;
        }
    }
    Ok(())
}

fn in_turn(context: &Context<'_>) -> Result<()> {
    const PAGES: u64 = 30;
    for mode in [PINNED | DMA_RW, PINNED | PIN, ALL] {
        let fixture = Fixture::new(context, PAGES)?;
        let config = config(PAGES, mode);
        // Pinned is only what is written through pins in the first round: it ends in the next.
        let through_pins = |n| config.method(n) == PINNED;
        let pinned: BTreeSet<_> =
            (0..PAGES).filter(|&n| through_pins(n)).map(|n| config.page(n)).collect();
        for &iova in &pinned {
            succeeded("PIN", fixture.device().pin(iova, PAGE)?)?;
        }
        let fails = |&n: &u64| through_pins(n) && !pinned.contains(&config.page(n));
        let counter = (0..3 * PAGES).find(fails).unwrap_or(0);
        fixture.device().start_generator(&config)?;
        stopped_with(fixture.wait_for_generator()?, Errno::ENXIO.0, counter)?;
        fixture.has_generated(&config, counter)?;
    }
    Ok(())
}

fn stop(context: &Context<'_>) -> Result<()> {
    const PAGES: u64 = 500;
    let fixture = Fixture::new(context, PAGES)?;
    fixture.pin(0..PAGES)?;
    for mode in [PINNED, DMA_RW, PIN, ALL] {
        fixture.memory.write(0, &vec![0; fixture.memory.len()]);
        let config = config(PAGES, mode);
        fixture.device().start_generator(&config)?;
        fixture.wait_for_writes(1)?;
        let stopped = fixture.device().stop_generator()?;
        stopped_with(stopped, 0, stopped.counter)?;
        fixture.has_generated(&config, stopped.counter)?;
        fixture.is_quiesced()?;
        stopped_with(fixture.device().generator()?, 0, stopped.counter)?;
    }
    Ok(())
}

fn goes_on(context: &Context<'_>) -> Result<()> {
    let fixture = Fixture::new(context, 64)?;
    let mut config = GeneratorConfig { limit: 10, ..config(64, DMA_RW) };
    for limit in [10, 11, 64, 200] {
        config.limit = limit;
        fixture.device().continue_generator(&config)?;
        stopped_with(fixture.wait_for_generator()?, 0, limit)?;
        fixture.has_generated(&config, limit)?;
    }
    fixture.device().continue_generator(&config)?;
    stopped_with(fixture.wait_for_generator()?, 0, 200)?;

    config.limit = 0;
    fixture.device().continue_generator(&config)?;
    fixture.wait_for_writes(100)?;
    // It has its own copies.
    for register in [
        mdev_dma::uapi::RUST_MDEV_DMA_REG_GEN_IOVA,
        mdev_dma::uapi::RUST_MDEV_DMA_REG_GEN_LENGTH,
        mdev_dma::uapi::RUST_MDEV_DMA_REG_GEN_SEED,
    ] {
        fixture.device().write(register, mdev_dma::Width::Quad, 5)?;
    }
    fixture.wait_for_writes(100)?;
    let stopped = fixture.device().stop_generator()?;
    fixture.has_generated(&config, stopped.counter)?;

    config.limit = 3;
    fixture.device().start_generator(&config)?;
    stopped_with(fixture.wait_for_generator()?, 0, 3)
}

fn rate(context: &Context<'_>) -> Result<()> {
    const ATTEMPTS: u32 = 5;
    for rate in [100, 2000] {
        // It may be late, on a machine that is busy, but not always.
        let mut late = 0;
        while !keeps_to(context, rate)? {
            late += 1;
            ensure!(
                late < ATTEMPTS,
                "less than a quarter of {rate} pages per second, {late} times"
            );
        }
    }
    Ok(())
}

/// Whether it writes at least a quarter of so many pages per second. Fails if it writes more than all.
fn keeps_to(context: &Context<'_>, rate: u32) -> Result<bool> {
    const A_WHILE: Duration = Duration::from_millis(300);
    let fixture = Fixture::new(context, 64)?;
    let config = GeneratorConfig { rate, ..config(64, DMA_RW) };
    let begin = Instant::now();
    fixture.device().start_generator(&config)?;
    thread::sleep(A_WHILE);
    let stopped = fixture.device().stop_generator()?;
    let most = (begin.elapsed().as_secs_f64() * f64::from(rate)) as u64 + 1;
    ensure!(stopped.counter <= most, "{} pages, not {most}, at {rate} per second", stopped.counter);
    fixture.has_generated(&config, stopped.counter)?;
    let least = most / 4;
    let late = stopped.counter < least;
    if late {
        let found = stopped.counter;
        context.note(format_args!("{found} pages, not {least} to {most}, at {rate} per second"));
    }
    Ok(!late)
}

/// What a migration does with memory, in small.
fn pre_copy(context: &Context<'_>) -> Result<()> {
    const PAGES: u64 = 400;
    for mode in [DMA_RW, PIN, ALL] {
        let fixture = Fixture::new(context, PAGES)?;
        let config = config(PAGES, mode);
        if mode & PINNED != 0 {
            fixture.pin(0..PAGES)?;
        }
        fixture.device().start_generator(&config)?;
        fixture.wait_for_writes(100)?;
        fixture.container.dirty_start()?;
        let mut copy = fixture.copy();
        let mut transfer = || -> Result<()> {
            for page in fixture.dirty(PAGES)?.runs().into_iter().flatten() {
                let bytes = (page * PAGE) as usize..((page + 1) * PAGE) as usize;
                copy[bytes].copy_from_slice(&fixture.page(page));
            }
            Ok(())
        };
        for _ in 0..5 {
            transfer()?;
            fixture.wait_for_writes(PAGES / 3)?;
        }
        let stopped = fixture.device().stop_generator()?;
        transfer()?;
        check_generated(&copy, &config, stopped.counter)?;
    }
    Ok(())
}

fn bad_config(context: &Context<'_>) -> Result<()> {
    let fixture = Fixture::new(context, 64)?;
    let max = fixture.device().limits()?.max_length;
    let good = config(64, DMA_RW);
    for (errno, control, config) in [
        (Errno::EOPNOTSUPP, 3, good.clone()),
        (Errno::EOPNOTSUPP, u32::MAX, good.clone()),
        (Errno::EINVAL, START, GeneratorConfig { length: 0, ..good.clone() }),
        (Errno::EINVAL, START, GeneratorConfig { length: PAGE - 1, ..good.clone() }),
        (Errno::EINVAL, START, GeneratorConfig { iova: at(0, 8), ..good.clone() }),
        (Errno::EINVAL, START, GeneratorConfig { mode: 0, ..good.clone() }),
        (Errno::EINVAL, START, GeneratorConfig { mode: ALL + 1, ..good.clone() }),
        (Errno::EOVERFLOW, START, GeneratorConfig { iova: PAGE.wrapping_neg(), ..good.clone() }),
        (Errno::EOVERFLOW, START, GeneratorConfig { length: PAGE.wrapping_neg(), ..good.clone() }),
        (Errno::E2BIG, START, GeneratorConfig { length: max + PAGE, ..good.clone() }),
        (Errno::E2BIG, START, GeneratorConfig { iova: 0, length: 1 << 63, ..good.clone() }),
    ] {
        // One that runs is stopped by what is refused, too.
        fixture.device().start_generator(&GeneratorConfig { rate: 1, ..good.clone() })?;
        fixture.device().control_generator(control, &config)?;
        let stopped = fixture.device().generator()?;
        ensure!(stopped.status as i32 == errno.0, "{config:?}: {stopped:?}, not {errno}");
        fixture.is_quiesced()?;
        ensure!(fixture.device().generator()? == stopped, "it goes on");
    }
    Ok(())
}

fn write_fails(context: &Context<'_>) -> Result<()> {
    const PAGES: u64 = 100;
    for mode in [PINNED, DMA_RW, PIN] {
        let fixture = Fixture::without_mapping(context, 0, PAGES)?;
        fixture.map(0..PAGES / 2)?;
        let mut errno = Errno::EINVAL;
        if mode == PINNED {
            fixture.pin(0..PAGES / 2)?;
            errno = Errno::ENXIO;
        }
        let config = config(PAGES, mode);
        fixture.device().start_generator(&config)?;
        let fails = (0..PAGES).find(|&n| config.page(n) >= at(PAGES / 2, 0));
        let counter = fails.unwrap_or(PAGES);
        stopped_with(fixture.wait_for_generator()?, errno.0, counter)?;
        fixture.has_generated(&config, counter)?;
    }
    Ok(())
}

fn unmap(context: &Context<'_>) -> Result<()> {
    const PAGES: u64 = 300;
    for mode in [PINNED, DMA_RW, PIN, ALL] {
        let fixture = Fixture::new(context, PAGES)?;
        fixture.pin(0..PAGES)?;
        let config = config(PAGES, mode);
        fixture.device().start_generator(&config)?;
        fixture.wait_for_writes(100)?;
        fixture.unmap(0..PAGES)?;
        same("PINS", 0, fixture.device().pins()?)?;
        let stopped = fixture.wait_for_generator()?;
        let errno = Errno(stopped.status as i32);
        ensure!(matches!(errno, Errno::ENXIO | Errno::EINVAL), "mode {mode}: {stopped:?}");
        fixture.has_generated(&config, stopped.counter)?;
        fixture.is_quiesced()?;
    }
    Ok(())
}

fn commands(context: &Context<'_>) -> Result<()> {
    const PAGES: u64 = 100;
    let fixture = Fixture::new(context, PAGES)?;
    let device = fixture.device();
    let config = config(PAGES - 10, DMA_RW | PIN);
    device.start_generator(&config)?;
    fixture.wait_for_writes(1)?;
    let (iova, length) = (at(PAGES - 10, 0), 10 * PAGE);
    for seed in 0..20 {
        succeeded("PIN", device.pin(iova, length)?)?;
        succeeded("WRITE", device.write_pinned(iova, length, seed)?)?;
        let pinned = device.read_pinned(iova, length)?;
        succeeded("READ", pinned)?;
        succeeded("UNPIN", device.unpin(iova, length)?)?;
        same("digest", pinned.digest, device.dma_read(iova, length)?.digest)?;
        fixture.wait_for_writes(1)?;
    }
    succeeded("DMA_WRITE", device.dma_write(iova, length, 7)?)?;
    let stopped = device.stop_generator()?;
    let memory = fixture.copy();
    check_generated(&memory[..((PAGES - 10) * PAGE) as usize], &config, stopped.counter)
}

fn reset_and_close(context: &Context<'_>) -> Result<()> {
    let mut fixture = Fixture::new(context, 100)?;
    fixture.pin(0..100)?;
    let config = config(100, ALL);
    fixture.device().start_generator(&config)?;
    fixture.wait_for_writes(100)?;
    fixture.device().device().reset()?;
    stopped_with(fixture.device().generator()?, 0, 0)?;
    fixture.is_quiesced()?;

    fixture.pin(0..100)?;
    for rate in [0, 1] {
        fixture.device().start_generator(&GeneratorConfig { rate, ..config.clone() })?;
        same("GEN_STATUS", IN_PROGRESS.into(), fixture.device().generator()?.status.into())?;
        fixture.close();
        fixture.is_quiesced()?;
        fixture.open()?;
        stopped_with(fixture.device().generator()?, 0, 0)?;
        fixture.pin(0..100)?;
    }
    Ok(())
}
