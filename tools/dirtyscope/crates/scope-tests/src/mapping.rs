// SPDX-License-Identifier: GPL-2.0-only

//! What can be mapped for an IOMMU, and what that locks.

use crate::{join, leave};
use anyhow::{Result, ensure};
use dirty_model::{Errno, Protection};
use harness::{Context, Scenario, scenario};
use mdev_dma::Opcode;
use std::sync::Arc;
use testbed::{
    Op, PAGE, Testbed, at, command, map, pages,
    slots::{EDU, PAIR},
    status,
};
use vfio_client::{
    Access, MapArgs, Memory,
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
