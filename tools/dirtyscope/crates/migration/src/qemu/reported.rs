// SPDX-License-Identifier: GPL-2.0-only

//! What users reported of QEMU's own side, or what its source had looked like: each of these has lost
//! a device's writes in some version of QEMU, or might.

use super::{Iommu, QemuVmm};
use crate::{
    cases::{DMA_RW, HIGH_WINDOW, MachineCase, PINNED, STEADY, WINDOW, above_4g},
    contents::WrongMemory,
    pair::{MachinePair, bytes},
    runner::{KnownOfQemu, case},
    vmm::Layout,
};
use anyhow::{Error, Result, bail, ensure};
use mdev_dma::{Opcode, PAGE, Width};
use qemu_client::MigrationCapability;
use std::ops::Range;

/// These cases.
pub const CASES: &[MachineCase<QemuVmm>] = &[
    case("qemu/memory-hidden", "memory is hidden from the device and shown again", hidden),
    case("qemu/above-4g", "written above 4 GiB, where addresses aren't offsets", above_4g),
    case("qemu/system-reset", "the machine is reset in pre-copy, and goes on", system_reset),
    case("qemu/dirty-rate", "QEMU measures the dirty rate before and meanwhile", dirty_rate),
    case("qemu/switchover-ack", "the destination acknowledges the switchover", switchover_ack),
    case("qemu/ignore-shared", "the destination has the same memory, which isn't sent", shared),
    case("qemu/postcopy", "postcopy is asked for, which VFIO doesn't allow", postcopy),
    case("qemu/beyond-8t", "more memory than a dirty bitmap may have", beyond_8t),
    case("qemu/iommu-mapped", "written through an IOMMU of the guest's", iommu_mapped),
    case("qemu/iommu-unmapped", "the guest unmaps what was written", iommu_unmapped),
    case(
        "qemu/iommu-unmapped-above-4g",
        "as before, of memory above 4 GiB",
        iommu_unmapped_above_4g,
    ),
    case(
        "qemu/iommu-detached",
        "the guest takes away all memory from the device, which has written some",
        iommu_detached,
    ),
    case("qemu/iommu-on", "the guest turns its IOMMU on, which unmaps all", iommu_on),
    case("qemu/iommu-on-above-4g", "as before, with memory above 4 GiB", iommu_on_above_4g),
];

type Pair<'a> = MachinePair<'a, QemuVmm>;

/// Nothing is special.
const USUAL: Layout = Layout::of_devices(1);

/// Half of the memory is above 4 GiB.
const SPLIT: Layout = Layout::split(1);

/// What is written only so that a pass takes its time.
const FILLER: Range<u64> = 0x20_0000 / PAGE..0x40_0000 / PAGE;

fn hidden(pair: &mut Pair<'_>) -> Result<()> {
    // 32 KiB below 1 MiB, which the host bridge shows or hides by its register PAM3.
    const PAGES: Range<u64> = 0xd_0000 / PAGE..0xd_8000 / PAGE;
    const PAM3: u8 = 0x93;
    const SHOWN: u32 = 0x33;

    let show = |pair: &Pair<'_>, show| pair.here().qtest().config_write(0, PAM3, Width::Byte, show);
    pair.start(1)?;
    show(pair, SHOWN)?;
    pair.begin()?;
    pair.slow_pass(0, FILLER)?;
    pair.write(0, Opcode::DmaWrite, PAGES)?;
    show(pair, 0)?;
    show(pair, SHOWN)?;
    pair.complete().map(drop)
}

fn system_reset(pair: &mut Pair<'_>) -> Result<()> {
    let middle = WINDOW.start + (WINDOW.end - WINDOW.start) / 2;
    pair.start(1)?;
    pair.pin(0, WINDOW)?;
    pair.begin()?;
    pair.slow_pass(0, FILLER)?;
    pair.write(0, Opcode::Write, WINDOW.start..middle)?;
    pair.write(0, Opcode::DmaWrite, middle..WINDOW.end)?;
    pair.reset()?;
    pair.generate(0, WINDOW.start..middle, DMA_RW, STEADY)?;
    pair.complete_or_again()
}

fn dirty_rate(pair: &mut Pair<'_>) -> Result<()> {
    pair.start(1)?;
    pair.generate(0, WINDOW, DMA_RW, STEADY)?;
    pair.measure_dirty_rate()?;
    pair.begin()?;
    pair.passes(1)?;
    pair.measure_dirty_rate()?;
    pair.passes(3)?;
    pair.complete().map(drop)
}

fn switchover_ack(pair: &mut Pair<'_>) -> Result<()> {
    pair.start(1)?;
    pair.pin(0, WINDOW)?;
    pair.generate(0, WINDOW, PINNED | DMA_RW, STEADY)?;
    pair.begin_with(&[MigrationCapability::return_path, MigrationCapability::switchover_ack])?;
    pair.passes(3)?;
    pair.complete().map(drop)
}

fn shared(pair: &mut Pair<'_>) -> Result<()> {
    pair.start(1)?;
    pair.pin(0, WINDOW)?;
    pair.generate(0, WINDOW, PINNED | DMA_RW, STEADY)?;
    pair.migrate_sharing()?;
    pair.resume()?;
    pair.migrate_sharing()
}

fn postcopy(pair: &mut Pair<'_>) -> Result<()> {
    pair.start(1)?;
    pair.pin(0, WINDOW)?;
    pair.generate(0, WINDOW, PINNED | DMA_RW, STEADY)?;
    pair.refused(&[MigrationCapability::postcopy_ram], "postcopy")?;
    pair.migrate()
}

fn beyond_8t(pair: &mut Pair<'_>) -> Result<()> {
    let layout = Layout { memory: 9 << 40, ..USUAL };
    let Err(error) = pair.start_as(layout) else {
        bail!("a machine with 9 TiB of memory takes a device that it can't migrate with");
    };
    let why = format!("{error:#}");
    // All that is said of the device has "enable-migration" in it.
    ensure!(
        why.contains("dirty tracking limitation"),
        "a machine with 9 TiB of memory doesn't start: {why}"
    );
    Ok(())
}

fn iommu_mapped(pair: &mut Pair<'_>) -> Result<()> {
    let pages = HIGH_WINDOW;
    pair.start_as(Layout { iommu_tables: Iommu::TABLES, ..SPLIT })?;
    pair.enable_iommu(&pages)?;
    pair.here().iommu().map(pages.clone())?;
    pair.pin(0, pages.clone())?;
    pair.generate(0, pages, PINNED | DMA_RW, STEADY)?;
    pair.migrate()
}

fn iommu_unmapped(pair: &mut Pair<'_>) -> Result<()> {
    unmapped(pair, USUAL, WINDOW)
}

fn iommu_unmapped_above_4g(pair: &mut Pair<'_>) -> Result<()> {
    unmapped(pair, SPLIT, HIGH_WINDOW)
}

fn unmapped(pair: &mut Pair<'_>, layout: Layout, pages: Range<u64>) -> Result<()> {
    let (pages, filler) = (pages.start..pages.start + 64, pages.start + 64..pages.start + 512);
    pair.start_as(Layout { iommu_tables: Iommu::TABLES, ..layout })?;
    pair.enable_iommu(&pages)?;
    pair.here().iommu().map(pages.start..filler.end)?;
    pair.begin()?;
    pair.slow_pass(0, filler)?;
    pair.write(0, Opcode::DmaWrite, pages.clone())?;
    pair.here().iommu().unmap(pages.clone())?;
    pair.complete().map(drop).map_err(|error| known("Q1", error, &pages))
}

fn iommu_detached(pair: &mut Pair<'_>) -> Result<()> {
    /// Where the device finds memory: were all of it unmapped at once, type1 had no bitmap so large.
    const OFFSET: u64 = 16 << 40;

    let pages = WINDOW.start..WINDOW.start + 64;
    let filler = pages.end..pages.start + 512;
    pair.start_as(Layout { iommu_tables: Iommu::TABLES, ..USUAL })?;
    pair.enable_iommu_at(&pages, OFFSET)?;
    pair.here().iommu().map_from(pages.start..filler.end, OFFSET)?;
    pair.begin()?;
    pair.slow_pass(0, filler)?;
    pair.write(0, Opcode::DmaWrite, pages.clone())?;
    pair.detach_from_iommu()?;
    pair.complete().map(drop).map_err(|error| known("Q3", error, &pages))
}

/// An error of a defect of QEMU's, if it shows that these pages were lost and nothing else.
fn known(defect: &'static str, error: Error, pages: &Range<u64>) -> Error {
    match error.downcast() {
        Ok::<WrongMemory, _>(shown) if shown.is_lost(&bytes(pages)) => {
            KnownOfQemu { defect, shown }.into()
        }
        Ok(other) => other.into(),
        Err(error) => error,
    }
}

fn iommu_on(pair: &mut Pair<'_>) -> Result<()> {
    turned_on(pair, USUAL, WINDOW)
}

fn iommu_on_above_4g(pair: &mut Pair<'_>) -> Result<()> {
    turned_on(pair, SPLIT, HIGH_WINDOW)
}

fn turned_on(pair: &mut Pair<'_>, layout: Layout, pages: Range<u64>) -> Result<()> {
    pair.start_as(Layout { iommu_tables: Iommu::TABLES, ..layout })?;
    pair.begin()?;
    pair.slow_pass(0, FILLER)?;
    pair.write(0, Opcode::DmaWrite, pages.clone())?;
    pair.enable_iommu(&pages)?;
    pair.complete().map(drop)
}
