// SPDX-License-Identifier: GPL-2.0-only

//! How a device's pins and registers end: by reset, by close, by the death of their process.

use super::super::{Context, Scenario};
use crate::testbed::{self, Op, PAGE, Testbed, at, command, pages, same, status};
use anyhow::{Context as _, Result, ensure};
use dirty_model::Errno;
use mdev_dma::{Op as Device, Width, uapi};
use std::{
    env,
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
};
use vfio_client::Group;

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "device/reset",
        about: "RESET gives back all pins and clears registers; what was dirty stays so once",
        run: reset,
    },
    Scenario {
        name: "device/close",
        about: "closing gives back all pins, opening again begins anew",
        run: close,
    },
    Scenario {
        name: "device/locked-memory",
        about: "VmLck counts pinned pages once, and is what it was after unpin, unmap and close",
        run: locked_memory,
    },
    Scenario {
        name: "device/container-closed",
        about: "a container closed while tracking, with pins, leaves nothing behind",
        run: container_closed,
    },
    Scenario {
        name: "device/group-busy",
        about: "a group that is open can't be opened again, until it is closed",
        run: group_busy,
    },
    Scenario {
        name: "device/process-killed",
        about: "a process killed with pins, and a generator that runs, leaves nothing behind",
        run: process_killed,
    },
];

fn reset(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 64)?;
    bed.start()?;
    bed.pin(3..6)?;
    bed.pin(3..4)?;
    bed.transfer(Device::Read, pages(3..6))?;
    bed.must(Op::Reset { device: 0 })?;
    bed.has_pins(0)?;
    let registers = (uapi::RUST_MDEV_DMA_REG_IOVA..=uapi::RUST_MDEV_DMA_REG_DIGEST).step_by(8);
    for register in registers {
        let value = bed.device(0).read(register, Width::Quad)?;
        same(&format!("register {register:#x}"), 0, value)?;
    }
    bed.refused(Errno::ENXIO, command(0, Device::Write, pages(3..4)))?;
    bed.reports(&[3..6])?;
    bed.reports(&[])?;
    bed.pin(3..4)?;
    bed.reports(&[3..4])?;
    bed.must(Op::Reset { device: 0 })?;
    bed.must(Op::Reset { device: 0 })?;
    bed.check()
}

fn close(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 64)?;
    bed.start()?;
    for _ in 0..3 {
        bed.pin(3..64)?;
        bed.transfer(Device::Write, at(3, 5)..at(5, 5))?;
        bed.must(Op::Close { device: 0 })?;
        bed.reports(&[3..64])?;
        bed.reports(&[])?;
        bed.must(Op::Open { device: 0 })?;
        bed.has_pins(0)?;
        let seed = bed.device(0).read(uapi::RUST_MDEV_DMA_REG_SEED, Width::Quad)?;
        same("SEED", 0, seed)?;
        bed.refused(Errno::ENXIO, command(0, Device::Write, pages(3..4)))?;
        bed.check()?;
    }
    Ok(())
}

fn locked_memory(context: &Context<'_>) -> Result<()> {
    let before = testbed::locked_memory()?;
    let mut bed = Testbed::new(context)?;
    bed.map(0..100)?;
    bed.map(100..200)?;
    let holds = |what: &str, count| same(what, before + count * PAGE, testbed::locked_memory()?);
    holds("VmLck before a pin", 0)?;
    bed.pin(10..150)?;
    holds("VmLck with 140 pages", 140)?;
    bed.pin(10..20)?;
    holds("VmLck with 10 of them pinned twice", 140)?;
    bed.unpin(10..20)?;
    holds("VmLck with all of them pinned once", 140)?;
    bed.unpin(10..20)?;
    holds("VmLck with 10 unpinned", 130)?;
    bed.refused(Errno::EINVAL, command(0, Device::Pin, pages(180..201)))?;
    holds("VmLck after a PIN that failed", 130)?;
    bed.unmap(100..200)?;
    holds("VmLck with 50 unmapped", 80)?;
    bed.must(Op::Reset { device: 0 })?;
    holds("VmLck after RESET", 0)?;
    bed.pin(0..7)?;
    bed.must(Op::Close { device: 0 })?;
    holds("VmLck after close", 0)?;
    bed.must(Op::Open { device: 0 })?;
    bed.pin(0..7)?;
    drop(bed);
    holds("VmLck after everything was closed", 0)
}

fn container_closed(context: &Context<'_>) -> Result<()> {
    let before = testbed::locked_memory()?;
    for _ in 0..3 {
        same("VmLck", before, testbed::locked_memory()?)?;
        let mut bed = Testbed::with_pages(context, 64)?;
        bed.refused(Errno::EINVAL, Op::get_bitmap(at(0, 0), 64 * PAGE))?;
        bed.check()?;
        bed.add_device()?;
        bed.start()?;
        bed.pin(0..64)?;
        bed.must(command(1, Device::Pin, pages(32..64)))?;
        bed.dma_write(pages(5..6))?;
    }
    Ok(())
}

fn group_busy(context: &Context<'_>) -> Result<()> {
    let node = context.device(0)?.node()?;
    let bed = Testbed::new(context)?;
    let open = || status(Group::open(&node).map(drop));
    let while_open = open()?;
    ensure!(while_open == Err(Errno::EBUSY), "opening it twice: {while_open:?}");
    drop(bed);
    let closed = open()?;
    ensure!(closed.is_ok(), "opening it after it was closed: {closed:?}");
    Ok(())
}

/// A child that is killed when it is dropped.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let ended = self.0.kill().and_then(|()| self.0.wait());
        debug_assert!(ended.is_ok());
    }
}

fn process_killed(context: &Context<'_>) -> Result<()> {
    let mdev = context.device(0)?;
    for _ in 0..2 {
        let mut hold = Command::new(env::current_exe()?);
        hold.args(["hold", &mdev.uuid.to_string(), &(100 * PAGE).to_string()]);
        let child = hold.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let mut child = Killed(child);
        let mut line = String::new();
        BufReader::new(child.0.stdout.take().context("no stdout")?).read_line(&mut line)?;
        ensure!(line == "0 100\n", "the other process says {line:?}, not that it pinned 100 pages");
        drop(child);

        let mut bed = Testbed::with_pages(context, 100)?;
        bed.has_pins(0)?;
        bed.pin(0..100)?;
        bed.check()?;
    }
    Ok(())
}
