// SPDX-License-Identifier: GPL-2.0-only

//! What a client that means harm does, and that it harms nobody: each of these once brought the kernel
//! or the device down. `dirtyscope abuse` looks for more.

use crate::{
    migration_state::{begin, load, save, set, write},
    stream::{changed, field, quad},
};
use anyhow::{Context as _, Result, anyhow, ensure};
use dirty_model::Errno;
use harness::{
    Context, OtherProcess, Scenario, ServedElsewhere, needs_fuse, pages_pinned, scenario,
    unmount_fuse,
};
use mdev_dma::{
    GeneratorConfig, Opcode,
    uapi::{
        RUST_MDEV_DMA_GEN_DMA_RW as DMA_RW, RUST_MDEV_DMA_GEN_PIN as PIN,
        RUST_MDEV_DMA_GEN_PINNED as PINNED, RUST_MDEV_DMA_IRQ_COMMAND as COMMAND,
        RUST_MDEV_DMA_IRQ_GENERATOR as GENERATOR,
    },
};
use std::{
    path::Path,
    thread,
    time::{Duration, Instant},
};
use testbed::fixture::{Fixture, LONG, is_awaited, succeeded};
use testbed::{PAGE, at, same, status};
use vfio_client::{
    EventFd, Memory,
    MigState::{Resuming, Running, Stop},
    Signals, Unserved,
    uapi::VFIO_PCI_MSI_IRQ_INDEX,
};

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "device/hostile/counter",
        "a generator whose counter is the largest number goes on from 0, in all modes",
        counter,
    ),
    scenario(
        "device/hostile/signals",
        "signals that kill nobody don't keep a device from loading its state",
        signals,
    ),
    scenario(
        "device/hostile/unserved-reset",
        "RESET ends what waits for memory that nobody serves: a command, the generator",
        unserved_reset,
    ),
    scenario(
        "device/hostile/unserved-close",
        "closing the device ends what waits for memory that nobody serves",
        unserved_close,
    ),
    scenario(
        "device/hostile/unserved-data",
        "RESET doesn't wait for who writes or reads migration data that nobody serves",
        unserved_data,
    ),
    scenario(
        "device/hostile/reset-interrupts",
        "what RESET ends doesn't interrupt",
        reset_interrupts,
    ),
    scenario(
        "device/hostile/killed",
        "a process is killed in what waits for its device, which waits for it; or in loading a state",
        killed,
    ),
    scenario(
        "device/hostile/fuse",
        "RESET and close end a DMA_WRITE or DMA_READ that waits for memory of FUSE; all else, and PIN, ends \
         with its server",
        fuse,
    ),
    scenario(
        "device/hostile/fuse-killed",
        "a process that is killed while its device waits for memory of FUSE that it serves itself ends \
         with the file system",
        fuse_killed,
    ),
];

/// Pages of memory.
const PAGES: u64 = 64;

fn config(mode: u32) -> GeneratorConfig {
    GeneratorConfig { iova: at(0, 0), length: PAGES * PAGE, seed: 3, limit: 0, rate: 0, mode }
}

fn counter(context: &Context<'_>) -> Result<()> {
    let fixture = Fixture::new(context, PAGES)?;
    fixture.pin(0..PAGES)?;
    let other = Fixture::without_mapping(context, 1, PAGES)?;
    other.map(0..PAGES)?;
    for mode in [PINNED, DMA_RW, PIN, PINNED | DMA_RW | PIN] {
        set(&fixture, Stop)?;
        fixture.device().start_generator(&config(mode))?;
        let stream = changed(&save(&fixture)?, field(11), &quad(u64::MAX));
        write(&begin(&other, Resuming)?, &stream)?;
        set(&other, Running)?;
        while other.device().generator()?.counter > 1 << 32 {
            ensure!(other.device().generator()?.is_running(), "it stopped");
            thread::sleep(Duration::from_millis(1));
        }
        other.wait_for_writes(PAGES)?;
        other.device().device().reset()?;
        fixture.device().stop_generator()?;
    }
    Ok(())
}

fn signals(context: &Context<'_>) -> Result<()> {
    const MANY: u64 = 1 << 13;
    let fixture = Fixture::new(context, MANY)?;
    fixture.pin(0..MANY)?;
    let stream = save(&fixture)?;
    let other = Fixture::without_mapping(context, 1, MANY)?;
    other.map(0..MANY)?;
    let begun = Instant::now();
    load(&other, &stream)?;
    // Many, and few enough for a slow kernel to do anything else.
    let interval = (begun.elapsed() / 50).max(Duration::from_millis(1));
    for _ in 0..3 {
        write(&begin(&other, Resuming)?, &stream)?;
        let signals = Signals::every(interval)?;
        let found = status(other.device().device().set_migration_state(Stop))?.map(drop);
        drop(signals);
        ensure!(found == Ok(()), "RESUMING to STOP: {found:?}");
        same("PINS", MANY, other.device().pins()?)?;
    }
    Ok(())
}

/// Has a device wait for its memory, which nobody serves.
fn unserved(fixture: &Fixture, waits: &Unserved, generator: bool) -> Result<()> {
    if generator {
        fixture.device().start_generator(&config(DMA_RW))?;
    } else {
        fixture.device().run_in_background(Opcode::DmaWrite, at(0, 0), PAGES * PAGE, 1)?;
    }
    is_awaited(waits)
}

fn unserved_reset(context: &Context<'_>) -> Result<()> {
    let fixture = Fixture::new(context, PAGES)?;
    for generator in [false, true] {
        let waits = fixture.memory.unserved()?;
        unserved(&fixture, &waits, generator)?;
        fixture.device().device().reset()?;
        same("STATUS", 0, fixture.device().outcome()?.status.into())?;
        drop(waits);
    }
    succeeded("DMA_WRITE", fixture.device().dma_write(at(0, 0), PAGES * PAGE, 1)?)
}

fn unserved_close(context: &Context<'_>) -> Result<()> {
    for generator in [false, true] {
        let mut fixture = Fixture::new(context, PAGES)?;
        let waits = fixture.memory.unserved()?;
        unserved(&fixture, &waits, generator)?;
        fixture.close();
        drop(waits);
        fixture.open()?;
        succeeded("DMA_WRITE", fixture.device().dma_write(at(0, 0), PAGES * PAGE, 1)?)?;
    }
    Ok(())
}

fn unserved_data(context: &Context<'_>) -> Result<()> {
    let fixture = Fixture::new(context, 1)?;
    let device = fixture.device().device();
    for state in [Resuming, vfio_client::MigState::StopCopy] {
        let file = begin(&fixture, state)?;
        let memory = Memory::new(PAGE as usize)?;
        let waits = memory.unserved()?;
        thread::scope(|scope| -> Result<()> {
            let transfer = scope.spawn(|| status(file.transfer(&memory, PAGE as usize)));
            is_awaited(&waits)?;
            let done = device.reset();
            drop(waits);
            transfer.join().map_err(|_| anyhow!("a thread panicked"))??.ok();
            Ok(done?)
        })?;
        let ended = status(file.transfer(&memory, 1))?;
        ensure!(ended == Err(Errno::ENODEV), "{state}: {ended:?}");
    }
    Ok(())
}

fn reset_interrupts(context: &Context<'_>) -> Result<()> {
    let fixture = Fixture::new(context, PAGES)?;
    let (device, eventfd) = (fixture.device(), EventFd::new()?);
    device.device().set_trigger(VFIO_PCI_MSI_IRQ_INDEX, &eventfd)?;
    for generator in [false, true] {
        // It is in progress for as long as this.
        let waits = fixture.memory.unserved()?;
        device.enable_irqs(COMMAND | GENERATOR)?;
        unserved(&fixture, &waits, generator)?;
        device.device().reset()?;
        same("signals of what RESET ended", 0, eventfd.take()?)?;
    }
    // One that isn't reset interrupts.
    device.enable_irqs(COMMAND)?;
    device.run_in_background(Opcode::DmaWrite, at(0, 0), PAGE, 1)?;
    same("signals of what was completed", 1, eventfd.wait(LONG)?)
}

fn killed(context: &Context<'_>) -> Result<()> {
    const MANY: u64 = 1 << 10;
    let device = context.device(0)?.uuid.to_string();
    let pinned = pages_pinned()?;
    for (what, pages) in [("quiesce", PAGES), ("access", PAGES), ("load", MANY)] {
        for delay in [0, 3, 10, 30] {
            let arguments = ["hold", &device, &(pages * PAGE).to_string(), "--what", what];
            let (mut process, _) = OtherProcess::start(&arguments)?;
            thread::sleep(Duration::from_millis(delay));
            process.kill(LONG).with_context(|| what.to_owned())?;
            same("pages pinned", pinned, pages_pinned()?)?;
            let fixture = Fixture::new(context, PAGES)?;
            succeeded("DMA_WRITE", fixture.device().dma_write(at(0, 0), PAGES * PAGE, 1)?)?;
            fixture.pin(0..PAGES)?;
        }
    }
    Ok(())
}

/// The time in which what waits comes to wait.
const A_WHILE: Duration = Duration::from_millis(20);

fn fuse(context: &Context<'_>) -> Result<()> {
    for op in [Opcode::DmaWrite, Opcode::DmaRead, Opcode::Pin] {
        for end in ["the file system", "RESET", "close", "unmap", "STOP"] {
            let (mut server, memory) = ServedElsewhere::new(PAGES * PAGE)?;
            let mut fixture = Fixture::with_memory(context.device(0)?, memory)?;
            fixture.map(0..PAGES)?;
            fixture.device().run_in_background(op, at(0, 0), PAGES * PAGE, 1)?;
            server.wait_until_asked()?;
            let begin = Instant::now();
            let ended = thread::scope(|scope| {
                let ending = scope.spawn(|| match end {
                    "RESET" => Ok(fixture.device().device().reset()?),
                    "unmap" => fixture.unmap(0..PAGES),
                    "STOP" => set(&fixture, Stop),
                    "close" => {
                        fixture.close();
                        Ok(())
                    }
                    _ => {
                        let outcome = fixture.device().wait(LONG)?;
                        same("STATUS", Errno::EFAULT.0 as u64, outcome.status.into())
                    }
                });
                // All can be killed but page faults of pins.
                if op == Opcode::Pin || !matches!(end, "RESET" | "close") {
                    thread::sleep(A_WHILE);
                    drop(server);
                }
                ending.join().map_err(|_| anyhow!("a thread panicked"))?
            });
            ended.with_context(|| format!("{op}, ended by {end}"))?;
            ensure!(begin.elapsed() < LONG, "{op}, ended by {end} after {:?}", begin.elapsed());
        }
    }
    let fixture = Fixture::new(context, PAGES)?;
    succeeded("DMA_WRITE", fixture.device().dma_write(at(0, 0), PAGES * PAGE, 1)?)
}

fn fuse_killed(context: &Context<'_>) -> Result<()> {
    needs_fuse()?;
    let device = context.device(0)?.uuid.to_string();
    let arguments = ["hold", &device, &(PAGES * PAGE).to_string(), "--what", "fuse"];
    let (mut process, directory) = OtherProcess::start(&arguments)?;
    let killed = process.kill(A_WHILE);
    context.progress(format_args!(
        "the process ends {}",
        if killed.is_ok() { "by itself" } else { "with the file system" }
    ));
    let directory = Path::new(&directory);
    unmount_fuse(directory)?;
    std::fs::remove_dir(directory)?;
    process.kill(LONG)?;
    let fixture = Fixture::new(context, PAGES)?;
    succeeded("DMA_WRITE", fixture.device().dma_write(at(0, 0), PAGES * PAGE, 1)?)
}
