// SPDX-License-Identifier: GPL-2.0-only

//! Commands that run in the background: that they do the same, and how they end early.

use anyhow::{Result, anyhow, bail, ensure};
use dirty_model::{Errno, Protection};
use harness::{Context, Scenario, scenario};
use mdev_dma::{
    GeneratorConfig, IN_PROGRESS, Opcode, Width,
    uapi::{
        RUST_MDEV_DMA_COMMAND_BACKGROUND as BACKGROUND, RUST_MDEV_DMA_GEN_DMA_RW,
        RUST_MDEV_DMA_GEN_PIN, RUST_MDEV_DMA_IRQ_COMMAND as COMMAND, RUST_MDEV_DMA_REG_IOVA,
    },
};
use procfs::process::{Process, Syscall};
use rustix::{process::Pid, thread::gettid};
use std::{
    ops::Range,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};
use testbed::fixture::{Fixture, LONG, is_awaited, succeeded};
use testbed::{Op, PAGE, Testbed, at, command, map, pages, same, status};
use vfio_client::{
    EventFd, MigState,
    uapi::{VFIO_BASE, VFIO_PCI_MSI_IRQ_INDEX, VFIO_TYPE},
};

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "device/background/same",
        "each operation does the same in the background, and memory, too, is the same",
        same_outcome,
    ),
    scenario(
        "device/background/same-errors",
        "each operation fails in the background as it does in the foreground",
        same_errors,
    ),
    scenario(
        "device/background/in-progress",
        "the status is EINPROGRESS meanwhile, others are refused, the end interrupts",
        in_progress,
    ),
    scenario("device/background/reset", "RESET ends a command early", reset),
    scenario("device/background/close", "closing the device ends a command early", close),
    scenario("device/background/unmap", "memory can be unmapped while a command uses it", unmap),
    scenario(
        "device/background/at-once",
        "everything that can be done to a device, by threads at the same time",
        at_once,
    ),
];

/// Pages of a command that takes long enough to be ended early.
const MANY: u64 = 1 << 14;

/// As [`command`], to run in the background.
fn background(op: Opcode, bytes: Range<u64>) -> Op {
    match command(0, op, bytes) {
        Op::Command { device, op, iova, length, seed } => {
            Op::Command { device, op: op | BACKGROUND, iova, length, seed }
        }
        other => other,
    }
}

fn same_outcome(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 200)?;
    bed.must(background(Opcode::Pin, pages(3..150)))?;
    bed.has_pins(147)?;
    bed.start()?;
    bed.must(background(Opcode::Unpin, pages(20..150)))?;
    bed.reports(&[3..150])?;
    bed.reports(&[3..20])?;
    bed.must(background(Opcode::Write, at(3, 5)..at(19, 7)))?;
    bed.must(background(Opcode::Read, at(4, 3)..at(12, 1)))?;
    bed.must(background(Opcode::DmaWrite, at(50, 1)..at(90, 77)))?;
    bed.must(background(Opcode::DmaRead, at(2, 9)..at(120, 3)))?;
    bed.reports(&[3..20, 50..91])?;
    bed.must(background(Opcode::Pin, pages(3..20)))?;
    bed.must(background(Opcode::Unpin, pages(3..20)))?;
    bed.must(background(Opcode::Unpin, pages(3..20)))?;
    bed.reports(&[3..20])?;
    bed.check()
}

fn same_errors(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 64)?;
    bed.must(map(64..70, Protection { read: true, write: false }))?;
    bed.pin(10..11)?;
    bed.start()?;
    let max = bed.device(0).limits()?.max_length;
    for op in Opcode::ALL {
        let pinned = matches!(op, Opcode::Write | Opcode::Read | Opcode::Unpin);
        bed.refused(Errno::EINVAL, background(op, at(10, 0)..at(10, 0)))?;
        bed.refused(Errno::E2BIG, background(op, at(0, 0)..at(0, max + PAGE)))?;
        let not_mapped = if pinned { Errno::ENXIO } else { Errno::EINVAL };
        bed.refused(not_mapped, background(op, pages(100..101)))?;
        if op != Opcode::DmaRead {
            let read_only = if pinned { Errno::ENXIO } else { Errno::EPERM };
            bed.refused(read_only, background(op, pages(65..66)))?;
        }
    }
    let op = Op::Command { device: 0, op: 7 | BACKGROUND, iova: at(10, 0), length: PAGE, seed: 0 };
    bed.refused(Errno::EOPNOTSUPP, op)?;
    bed.refused(Errno::EINVAL, background(Opcode::Pin, at(10, 1)..at(11, 1)))?;
    bed.must(Op::Close { device: 0 })?;
    bed.must(Op::Open { device: 0 })?;
    bed.reports(&[10..11])?;
    bed.check()
}

fn in_progress(context: &Context<'_>) -> Result<()> {
    let fixture = Fixture::new(context, MANY)?;
    let (device, eventfd) = (fixture.device(), EventFd::new()?);
    device.device().set_trigger(VFIO_PCI_MSI_IRQ_INDEX, &eventfd)?;
    device.enable_irqs(COMMAND)?;

    // It isn't completed as long as nobody serves its last page.
    let waits = fixture.unserved_last_page()?;
    device.run_in_background(Opcode::DmaWrite, at(0, 0), MANY * PAGE, 1)?;
    same("STATUS", IN_PROGRESS.into(), device.outcome()?.status.into())?;
    ensure!(!device.refused()?, "a command was refused although none was in progress");
    for op in [Opcode::Pin as u32, Opcode::DmaWrite as u32 | BACKGROUND, 99] {
        let outcome = device.run(op, at(3, 0), PAGE, 2)?;
        same("STATUS while it is in progress", IN_PROGRESS.into(), outcome.status.into())?;
        ensure!(device.refused()?, "a command wasn't refused");
    }
    same(
        "IOVA, which may be written",
        at(3, 0),
        device.read(RUST_MDEV_DMA_REG_IOVA, Width::Quad)?,
    )?;
    is_awaited(&waits)?;
    same("number of interrupts meanwhile", 0, eventfd.take()?)?;
    drop(waits);
    same("number of interrupts", 1, eventfd.wait(LONG)?)?;
    let outcome = device.outcome()?;
    succeeded("DMA_WRITE", outcome)?;
    same("COUNT", MANY * PAGE, outcome.count)?;
    same("PINS", 0, device.pins()?)?;

    let digest = device.dma_read(at(0, 0), MANY * PAGE)?.digest;
    ensure!(!device.refused()?, "a command was refused although none was in progress");
    device.dma_write(at(0, 0), MANY * PAGE, 1)?;
    same("digest after the same again", digest, device.dma_read(at(0, 0), MANY * PAGE)?.digest)
}

/// Has all pages written, and ends that by `end` when it has begun. The last page must be as it was, at
/// least once: a vCPU that waits for its turn may come too late.
fn ends_early(context: &Context<'_>, end: impl Fn(&mut Fixture) -> Result<()>) -> Result<Fixture> {
    const ATTEMPTS: u32 = 10;
    for _ in 0..ATTEMPTS {
        let mut fixture = Fixture::new(context, MANY)?;
        fixture.device().run_in_background(Opcode::DmaWrite, at(0, 0), MANY * PAGE, 1)?;
        loop {
            let in_progress = fixture.device().outcome()?.is_in_progress();
            if !is_zero(&fixture, 0) {
                break;
            }
            ensure!(in_progress, "it ended, and wrote nothing");
        }
        end(&mut fixture)?;
        fixture.is_quiesced()?;
        if is_zero(&fixture, MANY - 1) {
            return Ok(fixture);
        }
    }
    bail!("{ATTEMPTS} commands were completed")
}

fn is_zero(fixture: &Fixture, page: u64) -> bool {
    fixture.page(page).iter().all(|&byte| byte == 0)
}

fn has_no_outcome(fixture: &Fixture) -> Result<()> {
    let outcome = fixture.device().outcome()?;
    ensure!(outcome == mdev_dma::Outcome { status: 0, count: 0, digest: 0 }, "{outcome:?}");
    Ok(())
}

fn reset(context: &Context<'_>) -> Result<()> {
    let fixture = ends_early(context, |fixture| Ok(fixture.device().device().reset()?))?;
    has_no_outcome(&fixture)?;
    let device = fixture.device();
    succeeded("DMA_WRITE", device.dma_write(at(0, 0), PAGE, 2)?)?;

    device.run_in_background(Opcode::Pin, at(0, 0), MANY * PAGE, 1)?;
    device.device().reset()?;
    same("PINS", 0, device.pins()?)
}

fn close(context: &Context<'_>) -> Result<()> {
    let mut fixture = ends_early(context, |fixture| {
        fixture.close();
        Ok(())
    })?;
    fixture.open()?;
    has_no_outcome(&fixture)?;
    succeeded("DMA_WRITE", fixture.device().dma_write(at(0, 0), PAGE, 2)?)
}

fn unmap(context: &Context<'_>) -> Result<()> {
    // How long so many pages take depends on the machine, and so does how long another thread takes to
    // come to its unmap: a vCPU may wait 100 ms for its turn.
    const FEW: u64 = 1 << 12;
    const MOST: u64 = 1 << 16;
    const ATTEMPTS: u32 = 40;
    for opcode in Opcode::ALL {
        let mut attempts = 1;
        let mut pages = FEW;
        while !unmap_meets(context, opcode, pages)? {
            ensure!(attempts < ATTEMPTS, "{opcode} was quicker than the unmap {ATTEMPTS} times");
            attempts += 1;
            pages = MOST.min(pages * 2);
        }
        context.note(format!("{opcode} of {pages} pages: in progress in attempt {attempts}"));
    }
    Ok(())
}

/// Unmaps all memory, so many pages, that a command is about to use. Returns whether the command is
/// known to have been in progress once the unmap had begun.
fn unmap_meets(context: &Context<'_>, opcode: Opcode, pages: u64) -> Result<bool> {
    let fixture = &Fixture::new(context, pages)?;
    let device = fixture.device();
    if matches!(opcode, Opcode::Unpin | Opcode::Write | Opcode::Read) {
        fixture.pin(0..pages)?;
    }
    let seen = thread::scope(|scope| -> Result<bool> {
        let (sender, thread_id) = mpsc::channel();
        let unmap = scope.spawn(move || -> Result<()> {
            sender.send(gettid())?;
            device.run_in_background(opcode, at(0, 0), pages * PAGE, 1)?;
            // The workqueue's turn.
            thread::sleep(Duration::from_millis(1));
            fixture.unmap(0..pages)
        });
        let thread_id = thread_id.recv()?;
        let mut seen = false;
        while !seen && !unmap.is_finished() {
            seen = is_unmapping(thread_id) && device.outcome()?.is_in_progress();
        }
        unmap.join().map_err(|_| anyhow!("the thread that unmaps panicked"))??;
        Ok(seen)
    })?;
    same("PINS", 0, device.pins()?)?;
    let outcome = device.wait(LONG)?;
    let errno = Errno(outcome.status as i32);
    let known = matches!(errno, Errno(0) | Errno::EINVAL | Errno::ENXIO);
    ensure!(known, "{opcode}: {outcome:?}");
    fixture.is_quiesced()?;
    same("PINS", 0, device.pins()?)?;
    // What has transferred bytes, and then nothing is mapped, was met as well.
    Ok(seen || errno == Errno::EINVAL && outcome.count > 0)
}

/// Whether a thread of this process waits for a lock in `VFIO_IOMMU_UNMAP_DMA`. While it runs, it can't
/// be told.
fn is_unmapping(thread_id: Pid) -> bool {
    const REQUEST: u64 = ((VFIO_TYPE as u64) << 8) | (VFIO_BASE as u64 + 14);
    let task = Process::myself().and_then(|me| me.task_from_tid(thread_id.as_raw_nonzero().get()));
    // The arguments of an ioctl are file descriptor, request and address.
    matches!(task.and_then(|task| task.syscall()), Ok(Syscall::Blocked { argument_registers, .. })
        if argument_registers[1] == REQUEST)
}

/// Nothing is said of what comes of it, but that the device is what it was once it is over: no thread
/// hangs, no call fails as it mustn't, and the kernel doesn't complain.
fn at_once(context: &Context<'_>) -> Result<()> {
    const PAGES: u64 = 256;
    const A_WHILE: Duration = Duration::from_millis(400);
    let fixture = Fixture::new(context, PAGES)?;
    let device = fixture.device();
    let config = GeneratorConfig {
        iova: at(0, 0),
        length: PAGES * PAGE,
        seed: 1,
        limit: 0,
        rate: 0,
        mode: RUST_MDEV_DMA_GEN_DMA_RW | RUST_MDEV_DMA_GEN_PIN,
    };
    let commands = || -> Result<()> {
        for (n, op) in (0..).zip(Opcode::ALL) {
            device.run(op as u32, at(n, 0), 64 * PAGE, n)?;
            device.run_in_background(op, at(n, 0), 64 * PAGE, n)?;
        }
        Ok(())
    };
    let generator = || Ok(device.start_generator(&config)?);
    let unmap = || {
        fixture.unmap(0..PAGES)?;
        fixture.map(0..PAGES)
    };
    let reset = || Ok(device.device().reset()?);
    let states = || -> Result<()> {
        for state in [MigState::PreCopy, MigState::StopCopy, MigState::Running] {
            // A reset in between makes another way of it, which may not exist.
            let found = status(device.device().set_migration_state(state))?.map(drop);
            ensure!(matches!(found, Ok(()) | Err(Errno::EINVAL)), "{state}: {found:?}");
        }
        Ok(())
    };
    let registers = || -> Result<()> {
        device.pins()?;
        device.generator()?;
        device.clear_irqs(u32::MAX)?;
        Ok(device.enable_irqs(COMMAND)?)
    };
    let actions: [&(dyn Fn() -> Result<()> + Sync); 6] =
        [&commands, &generator, &unmap, &reset, &states, &registers];
    repeat_at_once(actions, A_WHILE)?;
    device.device().reset()?;
    same("PINS", 0, device.pins()?)?;
    fixture.is_quiesced()?;
    succeeded("DMA_WRITE", device.dma_write(at(0, 0), PAGES * PAGE, 1)?)
}

/// Does each of these again and again, in a thread of its own, for so long.
fn repeat_at_once<const N: usize>(
    actions: [&(dyn Fn() -> Result<()> + Sync); N],
    time: Duration,
) -> Result<()> {
    let begin = Instant::now();
    thread::scope(|scope| {
        let threads = actions.map(|action| {
            scope.spawn(move || -> Result<()> {
                while begin.elapsed() < time {
                    action()?;
                }
                Ok(())
            })
        });
        for thread in threads {
            thread.join().map_err(|_| anyhow!("a thread panicked"))??;
        }
        Ok(())
    })
}
