// SPDX-License-Identifier: GPL-2.0-only

//! What can be mapped for an IOMMU, and what that locks and pins.

use crate::{join, leave};
use anyhow::{Context as _, Result, ensure};
use dirty_model::{Errno, Protection};
use harness::{Context, Scenario, Setting, in_file, scenario};
use mdev_dma::Opcode;
use std::sync::Arc;
use testbed::{
    Op, PAGE, Testbed, at, command, map, pages, same,
    slots::{EDU, PAIR},
    status,
};
use vfio_client::{
    Access, MapArgs, Memory, UnmapArgs,
    uapi::{VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE},
};

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "type1/iommu/hole",
        "memory that isn't there can't be mapped for an IOMMU, which then can't join",
        hole,
    ),
    scenario(
        "type1/iommu/read-only-memory",
        "nor can memory be mapped for writing that can only be read",
        read_only_memory,
    ),
    scenario(
        "type1/iommu/iova-ranges",
        "what the IOMMU can't map is EINVAL, and so is joining with such a mapping",
        iova_ranges,
    ),
    scenario(
        "type1/iommu/locked-memory",
        "all that is mapped is locked, once, until the last IOMMU has left: then what is pinned",
        locked_memory,
    ),
    scenario(
        "type1/iommu/scattered",
        "of memory whose pages lie apart, nothing stays pinned or mapped when a limit ends a MAP or a join",
        scattered,
    ),
    scenario(
        "type1/iommu/page-sizes",
        "an IOMMU narrows the page sizes that GET_INFO says, until it has left",
        page_sizes,
    ),
    scenario(
        "type1/iommu/disable-hugepages",
        "with disable_hugepages, what is mapped, locked, pinned and dirty is what it is without",
        disable_hugepages,
    ),
];

fn hole(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pin(context)?;
    bed.count_locked_memory()?;
    let size = 8 * PAGE;
    let with_hole = |page| Op::Map {
        iova: at(page, 0),
        size,
        backed: 5 * PAGE,
        flags: VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
    };
    bed.must(with_hole(100))?;
    for _ in 0..2 {
        bed.refused(Errno::EFAULT, join(EDU[0]))?;
        bed.has_only_pin()?;
    }
    bed.unmap(100..108)?;
    bed.must(Op::Hide { iova: at(60, 0), size: PAGE })?;
    bed.refused(Errno::EFAULT, join(EDU[0]))?;
    bed.must(Op::Show { iova: at(60, 0), size: PAGE })?;
    bed.has_only_pin()?;

    bed.must(join(EDU[0]))?;
    bed.refused(Errno::EFAULT, with_hole(100))?;
    bed.refused(Errno::EFAULT, with_hole(64))?;
    bed.reports(&[0..64])?;
    // What the IOMMU has mapped may be taken away from the process.
    bed.must(Op::Hide { iova: at(60, 0), size: PAGE })?;
    bed.refused(Errno::EFAULT, command(0, Opcode::Pin, pages(60..61)))?;
    bed.must(Op::Show { iova: at(60, 0), size: PAGE })?;
    bed.reports(&[0..64])?;
    bed.must(leave(EDU[0]))?;
    bed.reports(&[0..64])?;
    bed.has_only_pin()
}

fn read_only_memory(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pin(context)?;
    bed.count_locked_memory()?;
    let memory = Arc::new(Memory::new(4 * PAGE as usize)?);
    memory.write(0, &[1; 4 * PAGE as usize]);
    memory.set_access(0..4 * PAGE as usize, Access::Read)?;
    let container = bed.container().clone();
    let map = |flags| {
        let (iova, size) = (at(1000, 0), 4 * PAGE);
        let args = MapArgs { memory: &memory, offset: 0, iova, size, flags, argsz: None };
        status(container.map(&args))
    };
    bed.must(join(EDU[0]))?;
    let writable = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;
    let mapped = map(writable)?;
    ensure!(mapped == Err(Errno::EFAULT), "mapping it for writing: {mapped:?}");
    bed.reports(&[0..64])?;
    bed.check()?;
    let mapped = map(VFIO_DMA_MAP_FLAG_READ)?;
    ensure!(mapped == Ok(()), "mapping it for reading: {mapped:?}");
    Ok(())
}

fn iova_ranges(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pin(context)?;
    ensure!(bed.container().info()?.iova_ranges.is_none(), "there was no IOMMU yet");
    let ranges = context.edus()?.singles[0].iova_ranges()?;
    let (Some(first), Some(last)) = (ranges.first(), ranges.last()) else {
        anyhow::bail!("the IOMMU can't map anything")
    };
    let outside = [*first.end() + 1, *last.end() + 1];
    let one = |iova| Op::map(iova, PAGE, Protection::READ_WRITE);
    bed.must(one(outside[0]))?;
    bed.refused(Errno::EINVAL, join(EDU[0]))?;
    bed.must(Op::unmap(outside[0], PAGE))?;
    bed.has_only_pin()?;
    bed.must(join(EDU[0]))?;
    let found = bed.container().info()?.iova_ranges;
    ensure!(found.as_ref() == Some(&ranges), "the IOMMU maps {ranges:x?}, type1 says {found:x?}");
    for iova in outside {
        bed.refused(Errno::EINVAL, one(iova))?;
        let over = Op::map(iova - PAGE, 2 * PAGE, Protection::READ_WRITE);
        bed.refused(Errno::EINVAL, over)?;
        bed.must(one(iova - PAGE))?;
        bed.must(Op::unmap(iova - PAGE, PAGE))?;
    }
    // Of two groups in one domain, and with the first one gone.
    bed.must(join(PAIR[0]))?;
    bed.must(leave(EDU[0]))?;
    let found = bed.container().info()?.iova_ranges;
    ensure!(found.as_ref() == Some(&ranges), "the IOMMU maps {ranges:x?}, type1 says {found:x?}");
    bed.refused(Errno::EINVAL, one(outside[0]))?;
    bed.must(leave(PAIR[0]))?;
    let found = bed.container().info()?.iova_ranges;
    ensure!(found == Some(vec![0..=u64::MAX]), "without an IOMMU, type1 says {found:x?}");
    for iova in outside {
        bed.must(one(iova))?;
        bed.must(Op::unmap(iova, PAGE))?;
    }
    bed.check()
}

fn locked_memory(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 64)?;
    bed.count_locked_memory()?;
    bed.pin(0..10)?;
    bed.map(100..150)?;
    bed.pin(105..110)?;
    bed.check()?;
    for edu in EDU {
        bed.must(join(edu))?;
        bed.check()?;
    }
    bed.unpin(0..5)?;
    bed.pin(20..40)?;
    bed.check()?;
    bed.map(200..210)?;
    bed.must(map(210..220, Protection::READ))?;
    bed.pin(200..205)?;
    bed.check()?;
    bed.unmap(100..150)?;
    bed.check()?;
    for edu in EDU {
        bed.must(leave(edu))?;
        bed.check()?;
    }
    bed.unpin(20..40)?;
    bed.unmap(200..210)?;
    bed.check()?;
    bed.must(Op::Close { device: 0 })?;
    bed.check()
}

fn scattered(context: &Context<'_>) -> Result<()> {
    const PAGES: u64 = 300;
    const SECOND: u64 = 1000;
    const OTHERS: u64 = 1200;
    let mut bed = Testbed::new(context)?;
    bed.count_locked_memory()?;
    let limit = |pages| Op::Limit { pages: Some(pages) };
    bed.must(limit(2 * PAGES))?;
    bed.map(0..PAGES)?;
    bed.map(SECOND..SECOND + PAGES)?;
    // By turns, so that what is side by side here isn't where the pages are.
    for page in 0..PAGES {
        bed.user_write(pages(page..page + 1))?;
        bed.user_write(pages(SECOND + page..SECOND + page + 1))?;
    }
    bed.pin(3..5)?;
    for too_few in [PAGES - 1, PAGES + PAGES / 2] {
        bed.must(limit(too_few))?;
        bed.refused(Errno::ENOMEM, join(EDU[0]))?;
        bed.check()?;
    }
    bed.must(limit(2 * PAGES))?;
    bed.must(join(EDU[0]))?;
    bed.check()?;
    bed.must(Op::Open { device: EDU[0] })?;
    for (from, to) in [(1, PAGES - 1), (SECOND + 7, 8)] {
        let (from, to) = (at(from, 0), at(to, 0));
        bed.must(Op::Copy { device: EDU[0], from, to, length: PAGE })?;
    }
    bed.check()?;
    bed.unmap(SECOND..SECOND + PAGES)?;
    bed.check()?;
    bed.must(limit(PAGES + OTHERS))?;
    maps_scattered(&mut bed, OTHERS)?;
    bed.must(Op::Close { device: EDU[0] })?;
    bed.must(leave(EDU[0]))?;
    bed.check()?;
    bed.unmap(0..PAGES)?;
    bed.check()
}

/// Maps such memory for the IOMMU of a container that may lock as much as this once more: half of it
/// can't be mapped twice, nor can what has a hole, and nothing stays pinned.
fn maps_scattered(bed: &mut Testbed<'_>, count: u64) -> Result<()> {
    // That of a file has no huge pages.
    let size = count * PAGE;
    let memories = [Arc::new(in_file(size)?.1), Arc::new(in_file(size)?.1)];
    for page in 0..count {
        for memory in &memories {
            memory.write((page * PAGE) as usize, &[1]);
        }
    }
    let container = bed.container().clone();
    let flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;
    let map = |page, memory, size| {
        let args = MapArgs { memory, offset: 0, iova: at(page, 0), size, flags, argsz: None };
        status(container.map(&args))
    };
    let unmap = |page, size| {
        let args = UnmapArgs { iova: at(page, 0), size, ..Default::default() };
        status(container.unmap(&args))
    };
    let [one, two] = &memories;
    // One more than type1 unmaps before it has the IOMMU forget them, and one more than twice as many.
    for regions in [512 + 1, 2 * 512 + 1] {
        let size = pages_of_regions(one, count, regions)? * PAGE;
        let mapped = map(4000, one, size)?;
        ensure!(mapped == Ok(()), "mapping {regions} regions: {mapped:?}");
        let unmapped = unmap(4000, size)?;
        ensure!(unmapped == Ok(size), "unmapping {regions} regions: {unmapped:?}");
        bed.check()?;
    }
    let (half, whole) = (count / 2 * PAGE, count * PAGE);
    let mapped = map(4000, one, half)?;
    ensure!(mapped == Ok(()), "mapping as much as may be locked: {mapped:?}");
    let mapped = map(6000, two, whole)?;
    ensure!(mapped == Err(Errno::ENOMEM), "mapping more than may be locked: {mapped:?}");
    let unmapped = unmap(4000, half)?;
    ensure!(unmapped == Ok(half), "unmapping it: {unmapped:?}");
    bed.check()?;
    let hole = half as usize;
    two.set_access(hole..hole + PAGE as usize, Access::None)?;
    let mapped = map(6000, two, whole)?;
    ensure!(mapped == Err(Errno::EFAULT), "mapping memory with a hole: {mapped:?}");
    bed.check()
}

/// With how many pages the first `count` of a memory begin that are so many regions: pages that follow one
/// another where they are.
fn pages_of_regions(memory: &Memory, count: u64, regions: usize) -> Result<u64> {
    let frames = memory.frames(0..(count * PAGE) as usize);
    let frames = frames.context("/proc/self/pagemap says nothing")?;
    let mut begins = (1..frames.len()).filter(|&page| frames[page] != frames[page - 1] + 1);
    // The first region ends where the second one begins.
    let end = begins.nth(regions - 1);
    Ok(end.with_context(|| format!("{count} pages have no {regions} regions"))? as u64)
}

fn page_sizes(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 4)?;
    let sizes = |bed: &Testbed<'_>| -> Result<u64> {
        let info = bed.container().info()?;
        let bitmaps = info.migration.map(|migration| migration.pgsize_bitmap);
        ensure!(bitmaps == Some(PAGE), "bitmaps have pages of {bitmaps:x?}");
        Ok(info.pgsizes)
    };
    let without = sizes(&bed)?;
    for _ in 0..2 {
        bed.must(join(EDU[0]))?;
        let with = sizes(&bed)?;
        // None has them all: there are sizes beyond all memory among them.
        ensure!(
            with & PAGE != 0 && with & !without == 0 && with != without,
            "page sizes of an IOMMU: {with:#x}, of {without:#x}"
        );
        bed.must(join(EDU[1]))?;
        same("page sizes with two groups", with, sizes(&bed)?)?;
        bed.must(leave(EDU[0]))?;
        same("page sizes with one of them", with, sizes(&bed)?)?;
        bed.must(Op::Close { device: 0 })?;
        bed.must(leave(0))?;
        same("page sizes with the IOMMU alone", with, sizes(&bed)?)?;
        bed.must(join(0))?;
        bed.must(Op::Open { device: 0 })?;
        bed.must(leave(EDU[1]))?;
        same("page sizes when the IOMMU has left", without, sizes(&bed)?)?;
    }
    bed.check()
}

fn disable_hugepages(context: &Context<'_>) -> Result<()> {
    let path = "/sys/module/vfio_iommu_type1/parameters/disable_hugepages";
    let _setting = Setting::new(path, "Y")?;
    hole(context)?;
    locked_memory(context)?;
    scattered(context)
}
