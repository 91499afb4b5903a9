// SPDX-License-Identifier: GPL-2.0-only

//! The cases of migration that are for all VMMs: ways to write memory meanwhile.

use crate::{
    pair::MachinePair,
    runner::Case,
    vmm::{ABOVE_4G, Layout, RAM, Vmm},
};
use anyhow::{Result, ensure};
use mdev_dma::{
    Opcode, PAGE,
    uapi::{RUST_MDEV_DMA_GEN_DMA_RW, RUST_MDEV_DMA_GEN_PIN, RUST_MDEV_DMA_GEN_PINNED},
};
use std::ops::Range;

pub const PINNED: u32 = RUST_MDEV_DMA_GEN_PINNED;
pub const DMA_RW: u32 = RUST_MDEV_DMA_GEN_DMA_RW;
const PIN: u32 = RUST_MDEV_DMA_GEN_PIN;

/// As fast as it can, which leaves the VMM little time in a VM of two emulated CPUs.
const FAST: u32 = 0;

/// Every page of the window several times a second.
pub const STEADY: u32 = 5000;

/// All memory from 1 MiB on: below it, a PC has other things than memory as well.
const HIGH: Range<u64> = 0x10_0000 / PAGE..RAM / PAGE;

/// 4 MiB in the middle of it.
pub const WINDOW: Range<u64> = 0x100_0000 / PAGE..0x140_0000 / PAGE;

/// Memory below 640 KiB: a mapping of its own.
const LOW: Range<u64> = 0x1_0000 / PAGE..0xa_0000 / PAGE;

/// What is written above 4 GiB.
pub const HIGH_WINDOW: Range<u64> = (ABOVE_4G + 0x40_0000) / PAGE..(ABOVE_4G + 0x60_0000) / PAGE;

/// A case with machines of a VMM that have no guest.
pub type MachineCase<V> = Case<fn(&mut MachinePair<'_, V>) -> Result<()>>;

/// These cases, for a VMM.
pub fn cases<V: Vmm>() -> Vec<MachineCase<V>> {
    let case = |name: &str, about, run| -> MachineCase<V> {
        Case { name: format!("{}/{name}", V::FAMILY).into(), about, run }
    };
    vec![
        case("idle", "nothing is written", idle),
        case("pinned", "written through pins only", pinned),
        case("dma-rw", "written by vfio_dma_rw() only", dma_rw),
        case("pin-write-unpin", "every page pinned for its write only", pin_write_unpin),
        case("both", "written through pins and by vfio_dma_rw(), in turn", both),
        case("every-page", "every page of memory written during pre-copy", every_page),
        case("low-memory", "written where a PC's memory is in pieces", low_memory),
        case("last-moment", "written by commands and the generator up to STOP", last_moment),
        case("command-in-progress", "a command writes in the background at STOP", in_progress),
        case("pinned-long-before", "pinned and written before, written again late", long_before),
        case("unpinned-meanwhile", "unpinned in pre-copy, after a write", unpinned_meanwhile),
        case("cancelled", "a migration is cancelled, the next one is good", cancelled),
        case("destination-dies", "the destination is killed, the next one is good", dies),
        case("destination-dies-late", "as before, when the source is stopped already", dies_late),
        case("back-and-forth", "to another machine and back, twice", back_and_forth),
        case("two-devices", "two devices write, each in its own way", two_devices),
    ]
}

fn idle<V: Vmm>(pair: &mut MachinePair<'_, V>) -> Result<()> {
    pair.start(1)?;
    pair.begin()?;
    // There is nothing that would make a VMM ask again.
    pair.passes(1)?;
    pair.complete().map(drop)
}

fn pinned<V: Vmm>(pair: &mut MachinePair<'_, V>) -> Result<()> {
    pair.start(1)?;
    pair.pin(0, WINDOW)?;
    pair.generate(0, WINDOW, PINNED, STEADY)?;
    pair.migrate()
}

fn dma_rw<V: Vmm>(pair: &mut MachinePair<'_, V>) -> Result<()> {
    pair.start(1)?;
    pair.generate(0, WINDOW, DMA_RW, STEADY)?;
    pair.migrate()
}

fn pin_write_unpin<V: Vmm>(pair: &mut MachinePair<'_, V>) -> Result<()> {
    pair.start(1)?;
    pair.generate(0, WINDOW, PIN, STEADY)?;
    pair.migrate()
}

fn both<V: Vmm>(pair: &mut MachinePair<'_, V>) -> Result<()> {
    pair.start(1)?;
    pair.pin(0, WINDOW)?;
    pair.generate(0, WINDOW, PINNED | DMA_RW, STEADY)?;
    pair.migrate()
}

fn every_page<V: Vmm>(pair: &mut MachinePair<'_, V>) -> Result<()> {
    pair.start(1)?;
    // With few pins, most pages are dirty because they were written.
    pair.generate(0, HIGH, DMA_RW | PIN, STEADY)?;
    pair.begin()?;
    pair.passes(2)?;
    pair.written(HIGH.end - HIGH.start)?;
    pair.complete().map(drop)
}

fn low_memory<V: Vmm>(pair: &mut MachinePair<'_, V>) -> Result<()> {
    pair.start(1)?;
    pair.pin(0, LOW)?;
    pair.generate(0, LOW, PINNED | DMA_RW | PIN, STEADY)?;
    pair.migrate()
}

fn last_moment<V: Vmm>(pair: &mut MachinePair<'_, V>) -> Result<()> {
    pair.start(1)?;
    pair.generate(0, WINDOW, DMA_RW, FAST)?;
    pair.begin()?;
    pair.passes(2)?;
    // The VMM is told to complete right after this, while the generator writes.
    pair.write(0, Opcode::DmaWrite, HIGH.start..HIGH.start + 64)?;
    let late = pair.complete()?;
    ensure!(late > 0, "the generator wrote nothing before STOP");
    Ok(())
}

fn in_progress<V: Vmm>(pair: &mut MachinePair<'_, V>) -> Result<()> {
    pair.start(1)?;
    pair.begin()?;
    pair.passes(1)?;
    // All of it arrives: a command that has begun is completed before the device stops.
    pair.complete_in_commands(0, HIGH)
}

fn long_before<V: Vmm>(pair: &mut MachinePair<'_, V>) -> Result<()> {
    pair.start(1)?;
    pair.pin(0, WINDOW)?;
    pair.write(0, Opcode::Write, WINDOW)?;
    pair.begin()?;
    pair.passes(3)?;
    pair.write(0, Opcode::Write, WINDOW.start..WINDOW.start + 100)?;
    pair.complete().map(drop)
}

fn unpinned_meanwhile<V: Vmm>(pair: &mut MachinePair<'_, V>) -> Result<()> {
    pair.start(1)?;
    pair.pin(0, WINDOW)?;
    pair.begin()?;
    pair.passes(2)?;
    pair.write(0, Opcode::Write, WINDOW)?;
    pair.unpin(0, WINDOW)?;
    pair.complete().map(drop)
}

fn cancelled<V: Vmm>(pair: &mut MachinePair<'_, V>) -> Result<()> {
    pair.start(1)?;
    pair.pin(0, WINDOW)?;
    pair.generate(0, WINDOW, PINNED | DMA_RW, STEADY)?;
    pair.begin()?;
    pair.passes(2)?;
    pair.cancel()?;
    pair.migrate()
}

fn dies<V: Vmm>(pair: &mut MachinePair<'_, V>) -> Result<()> {
    pair.start(1)?;
    pair.pin(0, WINDOW)?;
    pair.generate(0, WINDOW, PINNED | DMA_RW, STEADY)?;
    pair.begin()?;
    pair.passes(2)?;
    pair.destination_dies()?;
    pair.migrate()
}

fn dies_late<V: Vmm>(pair: &mut MachinePair<'_, V>) -> Result<()> {
    pair.start(1)?;
    pair.pin(0, WINDOW)?;
    pair.generate(0, WINDOW, PINNED | DMA_RW, STEADY)?;
    pair.begin_with_pause()?;
    pair.passes(2)?;
    pair.pause()?;
    pair.destination_dies_in_pause()?;
    pair.migrate()
}

fn back_and_forth<V: Vmm>(pair: &mut MachinePair<'_, V>) -> Result<()> {
    pair.start(1)?;
    pair.pin(0, WINDOW)?;
    pair.generate(0, WINDOW, PINNED | DMA_RW, STEADY)?;
    pair.migrate()?;
    for _ in 0..3 {
        pair.resume()?;
        pair.migrate()?;
    }
    Ok(())
}

fn two_devices<V: Vmm>(pair: &mut MachinePair<'_, V>) -> Result<()> {
    let middle = WINDOW.start + (WINDOW.end - WINDOW.start) / 2;
    let (first, second) = (WINDOW.start..middle, middle..WINDOW.end);
    pair.start(2)?;
    pair.pin(0, first.clone())?;
    pair.generate(0, first, PINNED, STEADY)?;
    pair.generate(1, second, DMA_RW | PIN, STEADY)?;
    pair.migrate()
}

/// Written above 4 GiB, where addresses aren't offsets.
pub fn above_4g<V: Vmm>(pair: &mut MachinePair<'_, V>) -> Result<()> {
    pair.start_as(Layout::split(1))?;
    pair.pin(0, HIGH_WINDOW)?;
    pair.generate(0, HIGH_WINDOW, PINNED | DMA_RW, STEADY)?;
    pair.migrate()
}

/// Migrates a machine that was started once more: in a way, in pages and at a rate that follow from
/// the number of the round.
pub fn round<V: Vmm>(pair: &mut MachinePair<'_, V>, number: u64) -> Result<()> {
    const MODES: [u32; 7] =
        [PINNED, DMA_RW, PINNED | DMA_RW, PIN, PINNED | PIN, DMA_RW | PIN, PINNED | DMA_RW | PIN];
    const RATES: [u32; 3] = [FAST, 500, STEADY];
    let mode = MODES[(number % 7) as usize];
    let pages = [WINDOW, LOW, HIGH.end - 1024..HIGH.end][(number / 7 % 3) as usize].clone();
    let pinned = mode & PINNED != 0;
    if pinned {
        pair.pin(0, pages.clone())?;
    }
    pair.generate(0, pages.clone(), mode, RATES[(number % 3) as usize])?;
    pair.migrate()?;
    if pinned { pair.unpin(0, pages) } else { Ok(()) }
}
