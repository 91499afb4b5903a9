// SPDX-License-Identifier: GPL-2.0-only

//! Mappings: while tracking, side by side, with holes between them, unmapped while in use.
//!
//! The stock kernel shifts a mapping's own bitmap to where it belongs in the user's, and clears it
//! afterwards as if it were where it was. So where a mapping lies `n` pages past a multiple of 64
//! of the range that is read, and one of its last `n` pages was dirty, that is the last read of the
//! scenario: the next one may have spurious pages behind the mapping.

use anyhow::{Result, ensure};
use dirty_model::{BITMAP_PAGES_MAX, Errno, Protection};
use harness::{Context, Scenario, scenario};
use mdev_dma::{MdevDma, Opcode};
use std::sync::Arc;
use testbed::{
    Op, PAGE, Testbed, at, command,
    fixture::{Fixture, refused, succeeded},
    map, pages, same, status,
};
use vfio_client::{
    BitmapArgs, Container, Group, MapArgs, Memory, MigrationInfo, UnmapArgs,
    uapi::{
        VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_DMA_UNMAP_FLAG_ALL,
        VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP, VFIO_DMA_UNMAP_FLAG_VADDR,
        VFIO_IOMMU_DIRTY_PAGES_FLAG_START, VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP, VFIO_TYPE1_IOMMU,
    },
};

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "type1/map/info",
        "VFIO_IOMMU_GET_INFO has the page sizes, those of bitmaps, and the largest bitmap",
        info,
    ),
    scenario(
        "type1/map/while-tracking",
        "a mapping added while tracking is clean, then tracked as others are",
        while_tracking,
    ),
    scenario(
        "type1/map/adjacent",
        "two adjacent mappings read as one range of 130 pages, no multiple of 64",
        adjacent,
    ),
    scenario(
        "type1/map/adjacent-small",
        "four adjacent mappings of odd sizes share words of the bitmap",
        adjacent_small,
    ),
    scenario("type1/map/hole", "a hole between two mappings is not dirty", hole),
    scenario(
        "type1/map/hole-in-word",
        "a hole between two mappings that share no word with it, at an odd place",
        hole_in_word,
    ),
    scenario(
        "type1/map/range-around",
        "a range may begin before the first mapping and end after the last",
        range_around,
    ),
    scenario(
        "type1/map/bisecting-read",
        "a range that bisects a mapping is refused, and nothing is forgotten",
        bisecting_read,
    ),
    scenario(
        "type1/map/unmap-dirty",
        "UNMAP with bitmap reports what vfio_dma_rw() wrote",
        unmap_dirty,
    ),
    scenario(
        "type1/map/unmap-dirty-pinned",
        "UNMAP with bitmap reports pinned pages, and revokes the pins",
        unmap_dirty_pinned,
    ),
    scenario(
        "type1/map/unmap-dirty-clubbed",
        "UNMAP with bitmap of two adjacent mappings of odd sizes at once",
        unmap_dirty_clubbed,
    ),
    scenario(
        "type1/map/unmap-dirty-while-off",
        "UNMAP with bitmap fails with EINVAL if nothing is tracked, and unmaps nothing",
        unmap_dirty_while_off,
    ),
    scenario(
        "type1/map/unmap-pinned",
        "UNMAP revokes all pins in the range, and none outside",
        unmap_pinned,
    ),
    scenario(
        "type1/map/unmap-pinned-by-two",
        "UNMAP revokes the pins of both devices",
        unmap_pinned_by_two,
    ),
    scenario("type1/map/unmap-all", "UNMAP of everything, with pins", unmap_all),
    scenario(
        "type1/map/unmap-bisecting",
        "UNMAP of part of a mapping is refused, of nothing it succeeds with 0 bytes",
        unmap_bisecting,
    ),
    scenario(
        "type1/map/map-again",
        "what is mapped where something dirty was unmapped is clean",
        map_again,
    ),
    scenario("type1/map/dma-avail", "dma_avail counts mappings down, and up again", dma_avail),
    scenario(
        "type1/map/v1-container",
        "a type1 v1 container refuses to track dirty pages, and pins",
        v1_container,
    ),
    scenario("type1/map/bad-map", "malformed MAP_DMA is refused and maps nothing", bad_map),
    scenario(
        "type1/map/last-address",
        "MAP takes any address up to the last one there is; what the process has no memory for faults",
        last_address,
    ),
    scenario("type1/map/bad-unmap", "malformed UNMAP_DMA is refused and unmaps nothing", bad_unmap),
    scenario(
        "type1/map/least-argsz",
        "no structure has to be larger than what the kernel reads of it",
        least_argsz,
    ),
];

fn info(context: &Context<'_>) -> Result<()> {
    let bed = Testbed::new(context)?;
    let info = bed.container().info()?;
    ensure!(info.pgsizes & PAGE != 0, "no pages of {PAGE} bytes in {:#x}", info.pgsizes);
    let max_dirty_bitmap_size = BITMAP_PAGES_MAX.div_ceil(64) * 8;
    let migration = MigrationInfo { pgsize_bitmap: PAGE, max_dirty_bitmap_size };
    ensure!(info.migration == Some(migration), "migration: {:x?}", info.migration);

    let short = status(bed.container().info_of(15).map(drop))?;
    ensure!(short == Err(Errno::EINVAL), "argsz 15: {short:?}");
    let without_caps = bed.container().info_of(24)?;
    ensure!(without_caps.migration.is_none(), "no room, and yet {without_caps:?}");
    Ok(())
}

fn while_tracking(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 64)?;
    bed.start()?;
    bed.dma_write(pages(1..2))?;
    bed.map(64..128)?;
    bed.reports(&[1..2])?;
    bed.dma_write(at(63, PAGE - 1)..at(64, 1))?;
    bed.pin(127..128)?;
    bed.reports(&[63..65, 127..128])?;
    bed.reports(&[127..128])?;
    bed.check()
}

fn adjacent(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::new(context)?;
    bed.map(0..70)?;
    bed.map(70..130)?;
    bed.start()?;
    bed.dma_write(pages(68..72))?;
    bed.pin(100..101)?;
    bed.reports(&[68..72, 100..101])?;
    bed.reports(&[100..101])?;
    bed.dma_write(at(69, PAGE - 1)..at(70, 1))?;
    bed.each_reports(&[69..70, 70..71, 100..101])?;
    bed.dma_write(pages(0..1))?;
    bed.dma_write(pages(128..130))?;
    bed.check_memory()?;
    bed.reports(&[0..1, 100..101, 128..130])
}

fn adjacent_small(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::new(context)?;
    for range in [0..3, 3..10, 10..65, 65..66] {
        bed.map(range)?;
    }
    bed.start()?;
    for page in [0, 2, 3, 9, 10, 64, 65] {
        bed.dma_write(at(page, 8)..at(page, 16))?;
    }
    bed.each_reports(&[0..1, 2..3, 3..4, 9..10, 10..11, 64..65, 65..66])?;
    bed.dma_write(at(2, 100)..at(4, 100))?;
    bed.dma_write(at(9, 0)..at(11, 0))?;
    bed.dma_write(pages(63..66))?;
    bed.check_memory()?;
    bed.reports(&[2..5, 9..11, 63..66])
}

fn hole(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::new(context)?;
    bed.map(0..10)?;
    bed.map(128..138)?;
    bed.start()?;
    bed.pin(9..10)?;
    bed.dma_write(pages(128..130))?;
    bed.dma_write(pages(137..138))?;
    bed.reports(&[9..10, 128..130, 137..138])?;
    bed.reports(&[9..10])?;
    bed.check()
}

fn hole_in_word(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::new(context)?;
    bed.map(0..10)?;
    bed.map(20..30)?;
    bed.map(100..110)?;
    bed.start()?;
    bed.pin(9..10)?;
    bed.dma_write(pages(20..21))?;
    bed.each_reports(&[9..10, 20..21])?;
    bed.dma_write(pages(25..30))?;
    bed.dma_write(pages(100..101))?;
    bed.dma_write(pages(109..110))?;
    bed.check_memory()?;
    bed.reports(&[9..10, 25..30, 100..101, 109..110])
}

fn range_around(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::new(context)?;
    bed.map(64..80)?;
    bed.start()?;
    bed.pin(79..80)?;
    bed.dma_write(pages(64..65))?;
    for expected in [2, 1] {
        let answer = bed.apply(Op::get_bitmap(at(0, 0), 1000 * PAGE))?;
        let runs = answer.bitmap.map(|bitmap| bitmap.runs()).unwrap_or_default();
        ensure!(runs.len() == expected, "dirty: {runs:?}");
    }
    bed.must(Op::get_bitmap(at(0, 0), 64 * PAGE))?;
    bed.must(Op::get_bitmap(at(80, 0), PAGE))?;
    bed.check()
}

fn bisecting_read(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::new(context)?;
    bed.map(0..64)?;
    bed.map(64..128)?;
    bed.start()?;
    bed.dma_write(pages(0..2))?;
    bed.dma_write(pages(63..65))?;
    bed.dma_write(pages(127..128))?;
    for (first, count) in [(1, 63), (0, 63), (0, 127), (1, 127), (63, 2), (64, 63), (10, 1)] {
        let read = Op::get_bitmap(at(first, 0), count * PAGE);
        bed.refused(Errno::EINVAL, read)?;
    }
    bed.reports(&[0..2, 63..65, 127..128])?;
    bed.check()
}

fn unmap_dirty(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::new(context)?;
    bed.map(0..100)?;
    bed.map(128..160)?;
    bed.start()?;
    bed.dma_write(at(3, 1)..at(4, 1))?;
    bed.dma_write(pages(98..100))?;
    bed.dma_write(pages(130..131))?;
    bed.unmap_reports(0..100, &[3..5, 98..100])?;
    bed.refused(Errno::EINVAL, command(0, Opcode::DmaWrite, pages(3..4)))?;
    bed.reports(&[130..131])?;
    bed.unmap_reports(128..160, &[])?;
    bed.check()
}

fn unmap_dirty_pinned(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 100)?;
    bed.start()?;
    bed.pin(3..6)?;
    bed.pin(4..5)?;
    bed.pin(90..100)?;
    bed.reports(&[3..6, 90..100])?;
    bed.transfer(Opcode::Write, at(4, 0)..at(4, 16))?;
    bed.dma_write(pages(50..51))?;
    bed.unmap_reports(0..100, &[3..6, 50..51, 90..100])?;
    bed.has_pins(0)?;
    for op in [Opcode::Write, Opcode::Read, Opcode::Unpin] {
        bed.refused(Errno::ENXIO, command(0, op, pages(4..5)))?;
    }
    bed.map(0..100)?;
    bed.refused(Errno::ENXIO, command(0, Opcode::Write, pages(4..5)))?;
    bed.reports(&[])?;
    bed.check()
}

fn unmap_dirty_clubbed(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::new(context)?;
    bed.map(0..70)?;
    bed.map(70..130)?;
    bed.start()?;
    bed.pin(69..70)?;
    bed.pin(129..130)?;
    bed.dma_write(pages(0..1))?;
    bed.dma_write(pages(70..72))?;
    bed.unmap_reports(0..130, &[0..1, 69..72, 129..130])?;
    bed.has_pins(0)?;
    bed.check()
}

fn unmap_dirty_while_off(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 16)?;
    bed.pin(3..4)?;
    let unmap = Op::unmap_bitmap(at(0, 0), 16 * PAGE);
    bed.refused(Errno::EINVAL, unmap)?;
    bed.has_pins(1)?;
    bed.transfer(Opcode::Write, pages(3..4))?;
    bed.check()
}

fn unmap_pinned(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::new(context)?;
    bed.map(0..64)?;
    bed.map(64..128)?;
    bed.map(128..192)?;
    bed.pin(60..140)?;
    bed.pin(70..80)?;
    bed.pin(70..71)?;
    bed.has_pins(91)?;
    bed.unmap(64..128)?;
    bed.has_pins(16)?;
    bed.transfer(Opcode::Write, pages(60..64))?;
    bed.transfer(Opcode::Write, pages(128..140))?;
    bed.refused(Errno::ENXIO, command(0, Opcode::Write, at(63, 0)..at(64, 1)))?;
    bed.refused(Errno::ENXIO, command(0, Opcode::Unpin, pages(64..65)))?;
    bed.unmap(128..192)?;
    bed.unmap(0..64)?;
    bed.has_pins(0)?;
    bed.check()
}

fn unmap_pinned_by_two(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 64)?;
    bed.add_device()?;
    bed.pin(0..10)?;
    bed.must(command(1, Opcode::Pin, pages(5..15)))?;
    bed.start()?;
    bed.unmap_reports(0..64, &[0..15])?;
    bed.has_pins(0)?;
    bed.refused(Errno::ENXIO, command(1, Opcode::Write, pages(5..6)))?;
    bed.check()
}

fn unmap_all(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::new(context)?;
    bed.map(0..10)?;
    bed.map(1000..1010)?;
    bed.must(Op::map(0, PAGE, Protection::READ_WRITE))?;
    bed.pin(5..10)?;
    bed.pin(1000..1010)?;
    let answer = bed.apply(Op::unmap_all())?;
    same("bytes unmapped", 21 * PAGE, answer.count)?;
    bed.has_pins(0)?;
    bed.check()
}

fn unmap_bisecting(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::new(context)?;
    bed.map(0..64)?;
    bed.map(64..128)?;
    for (first, count) in [(1, 63), (0, 63), (0, 100), (10, 1), (63, 2)] {
        bed.refused(Errno::EINVAL, Op::unmap(at(first, 0), count * PAGE))?;
    }
    let answer = bed.apply(Op::unmap(at(200, 0), 10 * PAGE))?;
    same("bytes unmapped", 0, answer.count)?;
    let answer = bed.apply(Op::unmap(at(0, 0), 1000 * PAGE))?;
    same("bytes unmapped", 128 * PAGE, answer.count)?;
    bed.check()
}

fn map_again(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 64)?;
    bed.start()?;
    bed.dma_write(pages(0..64))?;
    bed.unmap(0..64)?;
    bed.map(0..64)?;
    bed.reports(&[])?;
    bed.dma_write(pages(5..6))?;
    bed.reports(&[5..6])?;
    bed.check()
}

fn dma_avail(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::new(context)?;
    let avail = |bed: &Testbed<'_>| -> Result<u64> {
        Ok(bed.container().info()?.dma_avail.unwrap_or(0).into())
    };
    let limit = avail(&bed)?;
    for i in 0..4 {
        bed.map(i * 10..i * 10 + 1)?;
        same("dma_avail", limit - i - 1, avail(&bed)?)?;
    }
    bed.refused(Errno::EEXIST, map(10..20, Protection::READ_WRITE))?;
    bed.unmap(10..11)?;
    same("dma_avail", limit - 3, avail(&bed)?)?;
    bed.must(Op::unmap_all())?;
    same("dma_avail", limit, avail(&bed)?)?;
    bed.check()
}

fn v1_container(context: &Context<'_>) -> Result<()> {
    let node = context.device(0)?.node()?;
    let container = Container::with_iommu(Group::open(&node)?, VFIO_TYPE1_IOMMU)?;
    let memory = Arc::new(Memory::new(PAGE as usize)?);
    let (iova, size) = (at(0, 0), PAGE);
    let flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;
    container.map(&MapArgs { memory: &memory, offset: 0, iova, size, flags, argsz: None })?;
    let bitmap = BitmapArgs { pgsize: PAGE, size: 8 };
    for (what, refused) in [
        ("START", status(container.dirty_start())?),
        ("STOP", status(container.dirty_stop())?),
        ("GET_BITMAP", status(container.dirty_bitmap(iova, size, &bitmap).map(drop))?),
    ] {
        ensure!(refused == Err(Errno::EACCES), "{what}: {refused:?}");
    }
    let device = MdevDma::open(&container, &node)?;
    same("STATUS of PIN", Errno::EACCES.0 as u64, device.pin(iova, size)?.status.into())?;
    same("STATUS of DMA_WRITE", 0, device.dma_write(iova, size, 1)?.status.into())?;
    let unmapped = container.unmap(&UnmapArgs { iova, size, ..Default::default() })?;
    same("bytes unmapped", size, unmapped)
}

fn bad_map(context: &Context<'_>) -> Result<()> {
    const RW: Protection = Protection::READ_WRITE;
    let mut bed = Testbed::with_pages(context, 16)?;
    bed.refused(Errno::EINVAL, Op::map(at(32, 0), 0, RW))?;
    bed.refused(Errno::EINVAL, Op::map(at(32, 8), PAGE, RW))?;
    bed.refused(Errno::EINVAL, Op::map(at(32, 0), PAGE - 1, RW))?;
    bed.refused(Errno::EINVAL, map(32..33, Protection::NONE))?;
    bed.refused(Errno::EEXIST, map(0..16, RW))?;
    bed.refused(Errno::EEXIST, map(15..17, RW))?;
    bed.refused(Errno::EOVERFLOW, Op::map(PAGE.wrapping_neg(), 2 * PAGE, RW))?;

    let memory = Arc::new(Memory::new(2 * PAGE as usize)?);
    let flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;
    let iova = at(32, 0);
    let good = MapArgs { memory: &memory, offset: 0, iova, size: PAGE, flags, argsz: None };
    for bad in [
        MapArgs { offset: 8, ..good },
        MapArgs { flags: flags | (1 << 31), ..good },
        MapArgs { argsz: Some(0), ..good },
        MapArgs { argsz: Some(31), ..good },
    ] {
        let refused = status(bed.container().map(&bad))?;
        ensure!(refused == Err(Errno::EINVAL), "MAP_DMA of {bad:?}: {refused:?}");
    }
    bed.check()
}

fn bad_unmap(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 16)?;
    bed.pin(3..4)?;
    bed.start()?;
    bed.refused(Errno::EINVAL, Op::unmap(at(0, 0), 0))?;
    bed.refused(Errno::EINVAL, Op::unmap(at(0, 8), PAGE))?;
    bed.refused(Errno::EINVAL, Op::unmap(at(0, 0), 16 * PAGE + 1))?;
    let size = 0u64.wrapping_sub(PAGE);
    bed.refused(Errno::EOVERFLOW, Op::unmap(at(0, 0), size))?;

    let good = UnmapArgs { iova: at(0, 0), size: 16 * PAGE, ..Default::default() };
    let all = VFIO_DMA_UNMAP_FLAG_ALL;
    for bad in [
        UnmapArgs { argsz: Some(0), ..good },
        UnmapArgs { argsz: Some(23), ..good },
        UnmapArgs { flags: 1 << 31, ..good },
        // Of everything, with a range.
        UnmapArgs { flags: all, ..good },
        UnmapArgs { flags: all, iova: 0, ..good },
        UnmapArgs { flags: all, size: 0, ..good },
        UnmapArgs {
            flags: VFIO_DMA_UNMAP_FLAG_VADDR | VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP,
            ..good
        },
        UnmapArgs {
            flags: all | VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP,
            iova: 0,
            size: 0,
            argsz: None,
        },
        UnmapArgs { flags: VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP, argsz: Some(24), ..good },
    ] {
        let refused = status(bed.container().unmap(&bad))?;
        ensure!(refused == Err(Errno::EINVAL), "UNMAP_DMA of {bad:?}: {refused:?}");
    }
    bed.has_pins(1)?;
    bed.reports(&[3..4])?;
    bed.check()
}

fn least_argsz(context: &Context<'_>) -> Result<()> {
    let fixture = Fixture::new(context, 1)?;
    let container = &fixture.container;
    let info = container.info_of(16)?;
    ensure!(info.pgsizes == container.info()?.pgsizes, "of 16 bytes: {info:?}");
    container.dirty(VFIO_IOMMU_DIRTY_PAGES_FLAG_START, Some(8))?;
    fixture.pin(0..1)?;
    fixture.reports(0..1, &[0..1])?;
    let read = BitmapArgs { pgsize: PAGE, size: 8 };
    container.dirty_bitmap_of(48, at(0, 0), PAGE, &read)?;
    container.dirty(VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP, Some(8))?;
    let stopped = status(container.dirty_bitmap(at(0, 0), PAGE, &read).map(drop))?;
    ensure!(stopped == Err(Errno::EINVAL), "GET_BITMAP after STOP: {stopped:?}");
    let all = UnmapArgs { iova: at(0, 0), size: PAGE, argsz: Some(24), ..Default::default() };
    same("bytes unmapped", PAGE, container.unmap(&all)?)
}

fn last_address(context: &Context<'_>) -> Result<()> {
    const LAST: u64 = u64::MAX - (PAGE - 1);
    let fixture = Fixture::without_mapping(context, 0, 1)?;
    let map = |size| status(fixture.container.map_kernel(at(0, 0), size, LAST));
    let mapped = map(PAGE)?;
    ensure!(mapped == Ok(()), "MAP of the last page there is: {mapped:?}");
    refused("PIN", Errno::EFAULT, fixture.device().pin(at(0, 0), PAGE)?)?;
    refused("DMA_WRITE", Errno::EFAULT, fixture.device().dma_write(at(0, 0), PAGE, 1)?)?;
    fixture.unmap(0..1)?;
    let mapped = map(2 * PAGE)?;
    ensure!(mapped == Err(Errno::EOVERFLOW), "MAP of one more, which would be at 0: {mapped:?}");
    // Nothing is there now.
    fixture.map(0..1)?;
    succeeded("PIN", fixture.device().pin(at(0, 0), PAGE)?)
}
