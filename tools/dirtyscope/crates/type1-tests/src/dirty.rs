// SPDX-License-Identifier: GPL-2.0-only

//! Which pages are dirty, and for how long.

use anyhow::{Result, ensure};
use dirty_model::{BITMAP_PAGES_MAX, Errno, Protection};
use harness::{Context, Scenario, scenario};
use mdev_dma::Opcode;
use testbed::{Buffer, BufferMemory, Op, PAGE, Testbed, at, command, pages, status};
use vfio_client::{
    BitmapArgs,
    uapi::{
        VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP,
        VFIO_IOMMU_DIRTY_PAGES_FLAG_START, VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP,
    },
};

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "type1/dirty/nothing-pinned",
        "after START, nothing is dirty if nothing is pinned",
        nothing_pinned,
    ),
    scenario(
        "type1/dirty/pinned-before-start",
        "pages pinned before START are reported on every read until unpinned",
        pinned_before_start,
    ),
    scenario(
        "type1/dirty/first-iovas",
        "so they are in mappings that begin at IOVA 0, and at the page behind it",
        first_iovas,
    ),
    scenario(
        "type1/dirty/pinned-while-tracking",
        "pages pinned after START are reported on every read until unpinned",
        pinned_while_tracking,
    ),
    scenario(
        "type1/dirty/unpinned-between-reads",
        "a page unpinned between two reads is reported once more, then not",
        unpinned_between_reads,
    ),
    scenario(
        "type1/dirty/pinned-and-unpinned",
        "a page pinned and unpinned between two reads is reported once",
        pinned_and_unpinned,
    ),
    scenario(
        "type1/dirty/pins-count",
        "a page pinned twice and unpinned once is still dirty",
        pins_count,
    ),
    scenario("type1/dirty/dma-write", "a write through vfio_dma_rw() is reported once", dma_write),
    scenario(
        "type1/dirty/dma-write-part-of-page",
        "a write of part of a page makes that page dirty",
        dma_write_part_of_page,
    ),
    scenario(
        "type1/dirty/dma-write-across-pages",
        "a write across page boundaries makes both sides dirty",
        dma_write_across_pages,
    ),
    scenario(
        "type1/dirty/dma-write-across-mappings",
        "a write across two adjacent mappings makes pages of both dirty",
        dma_write_across_mappings,
    ),
    scenario(
        "type1/dirty/dma-write-long",
        "a write that takes many vfio_dma_rw() makes all its pages dirty",
        dma_write_long,
    ),
    scenario(
        "type1/dirty/reads",
        "reads, through pins and by vfio_dma_rw(), make nothing dirty",
        reads,
    ),
    scenario(
        "type1/dirty/write-through-pins",
        "pages stay dirty while pinned, written or not",
        write_through_pins,
    ),
    scenario(
        "type1/dirty/stop-forgets",
        "STOP forgets what was dirty, a new START begins clean",
        stop_forgets,
    ),
    scenario("type1/dirty/start-twice", "a second START keeps the account", start_twice),
    scenario("type1/dirty/stop-twice", "a second STOP, and one without START, succeed", stop_twice),
    scenario(
        "type1/dirty/read-while-off",
        "GET_BITMAP fails with EINVAL before START and after STOP",
        read_while_off,
    ),
    scenario(
        "type1/dirty/bad-flags",
        "malformed DIRTY_PAGES is refused, tracking stays as it was",
        bad_flags,
    ),
    scenario(
        "type1/dirty/bad-read",
        "malformed GET_BITMAP is refused, and nothing is forgotten",
        bad_read,
    ),
    scenario(
        "type1/dirty/start-too-large",
        "START with a mapping beyond the largest bitmap fails, and nothing is tracked",
        start_too_large,
    ),
    scenario(
        "type1/dirty/largest-bitmap",
        "a mapping of 2^31 - 1 pages is tracked and read, into the largest buffer",
        largest_bitmap,
    ),
    scenario(
        "type1/dirty/read-faults",
        "GET_BITMAP and UNMAP fail with EFAULT where they can't write, and lose nothing",
        read_faults,
    ),
    scenario(
        "type1/dirty/pin-across-mappings",
        "a batch of pins over the border of two mappings makes pages of both dirty",
        pin_across_mappings,
    ),
    scenario(
        "type1/dirty/two-containers",
        "tracking, mappings and dirty pages of two containers are independent",
        two_containers,
    ),
    scenario(
        "type1/dirty/two-devices",
        "pins of two devices in one container are independent",
        two_devices,
    ),
];

fn nothing_pinned(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 100)?;
    bed.start()?;
    bed.reports(&[])?;
    bed.each_reports(&[])?;
    bed.check()
}

fn pinned_before_start(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 100)?;
    bed.pin(0..1)?;
    bed.pin(60..70)?;
    bed.pin(99..100)?;
    bed.start()?;
    for _ in 0..3 {
        bed.reports(&[0..1, 60..70, 99..100])?;
    }
    bed.unpin(60..70)?;
    bed.reports(&[0..1, 60..70, 99..100])?;
    bed.reports(&[0..1, 99..100])?;
    bed.check()
}

fn first_iovas(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 1)?;
    for range in [0..PAGE, PAGE..16 * PAGE] {
        bed.must(Op::map(range.start, range.end - range.start, Protection::READ_WRITE))?;
    }
    for pinned in [0..PAGE, 5 * PAGE..7 * PAGE] {
        bed.must(command(0, Opcode::Pin, pinned))?;
    }
    bed.start()?;
    for _ in 0..2 {
        bed.must(Op::get_bitmap(0, 16 * PAGE))?;
    }
    bed.must(Op::unmap(0, 16 * PAGE))?;
    bed.check()
}

fn pinned_while_tracking(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 100)?;
    bed.start()?;
    bed.pin(0..1)?;
    bed.pin(60..70)?;
    bed.pin(99..100)?;
    for _ in 0..3 {
        bed.reports(&[0..1, 60..70, 99..100])?;
    }
    bed.unpin(0..1)?;
    bed.unpin(60..70)?;
    bed.unpin(99..100)?;
    bed.reports(&[0..1, 60..70, 99..100])?;
    bed.reports(&[])?;
    bed.check()
}

fn unpinned_between_reads(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 16)?;
    bed.start()?;
    bed.pin(4..8)?;
    bed.reports(&[4..8])?;
    bed.unpin(5..6)?;
    bed.reports(&[4..8])?;
    bed.reports(&[4..5, 6..8])?;
    bed.check()
}

fn pinned_and_unpinned(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 16)?;
    bed.start()?;
    bed.reports(&[])?;
    bed.pin(4..8)?;
    bed.transfer(Opcode::Write, at(5, 100)..at(5, 200))?;
    bed.unpin(4..8)?;
    bed.reports(&[4..8])?;
    bed.reports(&[])?;
    bed.check()
}

fn pins_count(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 16)?;
    bed.start()?;
    bed.pin(2..6)?;
    bed.pin(4..8)?;
    bed.has_pins(8)?;
    bed.unpin(2..6)?;
    bed.reports(&[2..8])?;
    bed.reports(&[4..8])?;
    bed.unpin(4..8)?;
    bed.reports(&[4..8])?;
    bed.reports(&[])?;
    bed.has_pins(0)?;
    bed.check()
}

fn dma_write(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 100)?;
    bed.start()?;
    bed.dma_write(pages(3..5))?;
    bed.dma_write(pages(99..100))?;
    bed.reports(&[3..5, 99..100])?;
    bed.reports(&[])?;
    bed.dma_write(pages(4..5))?;
    bed.each_reports(&[4..5])?;
    bed.each_reports(&[])?;
    bed.check()
}

fn dma_write_part_of_page(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 16)?;
    bed.start()?;
    bed.dma_write(at(1, 0)..at(1, 1))?;
    bed.dma_write(at(4, 1000)..at(4, 1003))?;
    bed.dma_write(at(7, PAGE - 1)..at(8, 0))?;
    bed.reports(&[1..2, 4..5, 7..8])?;
    bed.reports(&[])?;
    bed.check()
}

fn dma_write_across_pages(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 128)?;
    bed.start()?;
    bed.dma_write(at(1, PAGE - 1)..at(2, 1))?;
    bed.dma_write(at(5, 8)..at(8, 8))?;
    bed.dma_write(at(63, PAGE - 3)..at(64, 5))?;
    bed.reports(&[1..3, 5..9, 63..65])?;
    bed.reports(&[])?;
    bed.check()
}

fn dma_write_across_mappings(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::new(context)?;
    bed.map(0..64)?;
    bed.map(64..128)?;
    bed.start()?;
    bed.dma_write(at(62, 100)..at(66, 100))?;
    bed.each_reports(&[62..64, 64..67])?;
    bed.dma_write(at(63, PAGE - 1)..at(64, 1))?;
    bed.reports(&[63..65])?;
    bed.reports(&[])?;
    bed.check()
}

fn dma_write_long(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 300)?;
    bed.start()?;
    bed.dma_write(at(7, 9)..at(290, 1))?;
    bed.reports(&[7..291])?;
    bed.reports(&[])?;
    bed.check()
}

fn reads(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 64)?;
    bed.pin(10..20)?;
    bed.start()?;
    bed.unpin(16..20)?;
    bed.reports(&[10..20])?;
    bed.transfer(Opcode::DmaRead, pages(0..64))?;
    bed.transfer(Opcode::DmaRead, at(30, 5)..at(31, 6))?;
    bed.transfer(Opcode::Read, at(10, 1)..at(16, 0))?;
    bed.reports(&[10..16])?;
    bed.check()
}

fn write_through_pins(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 16)?;
    bed.pin(2..6)?;
    bed.start()?;
    bed.transfer(Opcode::Write, at(3, 17)..at(4, 1))?;
    bed.reports(&[2..6])?;
    bed.check_memory()?;
    bed.reports(&[2..6])?;
    bed.transfer(Opcode::Write, pages(2..6))?;
    bed.unpin(2..6)?;
    bed.reports(&[2..6])?;
    bed.reports(&[])?;
    bed.check()
}

fn stop_forgets(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 16)?;
    bed.start()?;
    bed.dma_write(pages(1..2))?;
    bed.pin(3..5)?;
    bed.stop()?;
    bed.dma_write(pages(6..7))?;
    bed.unpin(3..4)?;
    bed.start()?;
    bed.reports(&[4..5])?;
    bed.check()
}

fn start_twice(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 16)?;
    bed.start()?;
    bed.dma_write(pages(1..2))?;
    bed.pin(3..4)?;
    bed.unpin(3..4)?;
    bed.start()?;
    bed.reports(&[1..2, 3..4])?;
    bed.start()?;
    bed.reports(&[])?;
    bed.check()
}

fn stop_twice(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 16)?;
    bed.stop()?;
    bed.start()?;
    bed.stop()?;
    bed.stop()?;
    bed.pin(3..4)?;
    bed.start()?;
    bed.reports(&[3..4])?;
    bed.check()
}

fn read_while_off(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 16)?;
    bed.pin(3..4)?;
    let read = Op::get_bitmap(at(0, 0), 16 * PAGE);
    bed.refused(Errno::EINVAL, read.clone())?;
    bed.start()?;
    bed.reports(&[3..4])?;
    bed.stop()?;
    bed.refused(Errno::EINVAL, read)?;
    bed.check()
}

fn bad_flags(context: &Context<'_>) -> Result<()> {
    let (start, stop, get) = (
        VFIO_IOMMU_DIRTY_PAGES_FLAG_START,
        VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP,
        VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP,
    );
    let mut bed = Testbed::with_pages(context, 16)?;
    let read = Op::get_bitmap(at(0, 0), 16 * PAGE);
    bed.pin(3..4)?;
    for tracking in [false, true] {
        for (flags, argsz) in [
            (1 << 31, None),
            (start | (1 << 3), None),
            (start | stop, None),
            (start | get, None),
            (stop | get, None),
            (start | stop | get, None),
            (start, Some(0)),
            (stop, Some(7)),
            (get, None),
        ] {
            let refused = status(bed.container().dirty(flags, argsz))?;
            ensure!(refused == Err(Errno::EINVAL), "flags {flags:#x} {argsz:?}: {refused:?}");
        }
        if !tracking {
            bed.refused(Errno::EINVAL, read.clone())?;
            bed.start()?;
        }
    }
    bed.reports(&[3..4])?;
    bed.check()
}

fn bad_read(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 100)?;
    bed.start()?;
    bed.dma_write(pages(3..4))?;
    let (iova, size) = (at(0, 0), 100 * PAGE);
    let good = BitmapArgs { pgsize: PAGE, size: 16 };
    let wrap = 0u64.wrapping_sub(PAGE);
    for (errno, iova, size, bitmap) in [
        (Errno::EINVAL, iova, 0, good),
        (Errno::EINVAL, iova + 8, size, good),
        (Errno::EINVAL, iova, size + 8, good),
        (Errno::EINVAL, iova, size - 8, good),
        (Errno::EOVERFLOW, iova, wrap, good),
        (Errno::EINVAL, iova, size, BitmapArgs { pgsize: 2 * PAGE, ..good }),
        (Errno::EINVAL, iova, size, BitmapArgs { pgsize: 3 * PAGE, ..good }),
        (Errno::EINVAL, iova, size, BitmapArgs { pgsize: PAGE / 2, ..good }),
        (Errno::EINVAL, iova, size, BitmapArgs { pgsize: PAGE / 2, size: 32 }),
        (Errno::EINVAL, iova, size, BitmapArgs { size: 0, ..good }),
        (Errno::EINVAL, iova, size, BitmapArgs { size: 8, ..good }),
        (Errno::EINVAL, iova, size, BitmapArgs { size: 15, ..good }),
        (Errno::EINVAL, iova, size, BitmapArgs { size: (1 << 28) + 8, ..good }),
        // 64 pages, if they are counted in 32 bits.
        (Errno::EINVAL, iova, ((1 << 32) + 64) * PAGE, BitmapArgs { size: 8, ..good }),
    ] {
        let refused = status(bed.container().dirty_bitmap(iova, size, &bitmap))?;
        ensure!(refused == Err(errno), "{iova:#x}+{size:#x} into {bitmap:?}: {refused:?}");
    }
    // Less than up to the end of the bitmap's description.
    for argsz in [8, 9, 47] {
        let refused = status(bed.container().dirty_bitmap_of(argsz, iova, size, &good))?;
        ensure!(refused == Err(Errno::EINVAL), "argsz {argsz}: {refused:?}");
    }
    bed.reports(&[3..4])?;
    bed.check()
}

/// A mapping of so many pages, of which the process has the first.
fn large(pages: u64) -> Op {
    let flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;
    Op::Map { iova: 1 << 45, size: pages * PAGE, backed: PAGE, flags }
}

fn start_too_large(context: &Context<'_>) -> Result<()> {
    // The second is one page, if they are counted in 32 bits.
    for too_large in [BITMAP_PAGES_MAX + 1, (1 << 32) + 1] {
        let mut bed = Testbed::with_pages(context, 16)?;
        bed.pin(3..4)?;
        bed.must(large(too_large))?;
        let read = Op::get_bitmap(at(0, 0), 16 * PAGE);
        for _ in 0..2 {
            bed.refused(Errno::EINVAL, Op::Start)?;
            bed.refused(Errno::EINVAL, read.clone())?;
            bed.dma_write(pages(5..6))?;
        }
        bed.must(Op::unmap(1 << 45, too_large * PAGE))?;
        bed.start()?;
        bed.reports(&[3..4])?;
        bed.refused(Errno::EINVAL, large(too_large))?;
        bed.check()?;
    }
    Ok(())
}

fn largest_bitmap(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::new(context)?;
    let (iova, size) = (1 << 45, BITMAP_PAGES_MAX * PAGE);
    bed.must(large(BITMAP_PAGES_MAX))?;
    bed.start()?;
    bed.must(command(0, Opcode::DmaWrite, iova + 1..iova + 2))?;
    let answer = bed.apply(Op::get_bitmap(iova, size))?;
    let dirty = answer.bitmap.map(|bitmap| bitmap.runs());
    ensure!(dirty == Some(vec![0..1]), "dirty: {dirty:?}");
    bed.must(Op::unmap(iova, size))
}

fn read_faults(context: &Context<'_>) -> Result<()> {
    // The bitmap has two pages.
    const PAGES: u64 = 8 * PAGE + 640;
    let mut bed = Testbed::new(context)?;
    let (iova, size) = (at(0, 0), PAGES * PAGE);
    let flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;
    bed.must(Op::Map { iova, size, backed: 16 * PAGE, flags })?;
    bed.start()?;
    bed.dma_write(pages(3..4))?;
    bed.pin(5..6)?;
    bed.unpin(5..6)?;
    for memory in [
        BufferMemory::Ends(0),
        BufferMemory::Ends(8),
        BufferMemory::Ends(PAGE),
        BufferMemory::Ends(PAGES.div_ceil(64) * 8 - 8),
        BufferMemory::ReadOnly,
    ] {
        let buffer = Buffer::covering(size).with_memory(memory);
        bed.refused(Errno::EFAULT, Op::GetBitmap { iova, size, buffer })?;
        bed.refused(Errno::EFAULT, Op::UnmapBitmap { iova, size, buffer })?;
    }
    // Where nothing is mapped, nothing is written.
    let buffer = Buffer::covering(size).with_memory(BufferMemory::Ends(0));
    bed.must(Op::GetBitmap { iova: iova + size, size, buffer })?;
    bed.reports(&[3..4, 5..6])?;
    bed.check()
}

fn pin_across_mappings(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::new(context)?;
    bed.map(0..10)?;
    bed.map(10..64)?;
    bed.start()?;
    bed.pin(8..13)?;
    bed.transfer(Opcode::Write, at(9, 5)..at(11, 5))?;
    for _ in 0..2 {
        bed.each_reports(&[8..10, 10..13])?;
    }
    bed.unpin(9..11)?;
    bed.each_reports(&[8..10, 10..13])?;
    bed.each_reports(&[8..9, 11..13])?;
    bed.check_memory()
}

fn two_containers(context: &Context<'_>) -> Result<()> {
    let mut one = Testbed::with_pages(context, 32)?;
    let mut two = Testbed::on(context, 1)?;
    two.map(16..64)?;
    one.start()?;
    for bed in [&mut one, &mut two] {
        bed.pin(20..22)?;
        bed.dma_write(pages(25..26))?;
    }
    two.refused(Errno::EINVAL, Op::get_bitmap(at(16, 0), 48 * PAGE))?;
    two.start()?;
    two.reports(&[20..22])?;
    one.reports(&[20..22, 25..26])?;
    one.stop()?;
    one.refused(Errno::EINVAL, Op::get_bitmap(at(0, 0), 32 * PAGE))?;
    two.dma_write(pages(60..64))?;
    two.unpin(20..22)?;
    two.reports(&[20..22, 60..64])?;
    one.must(Op::unmap_all())?;
    one.check()?;
    two.check()
}

fn two_devices(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 32)?;
    bed.add_device()?;
    bed.pin(2..6)?;
    bed.must(command(1, Opcode::Pin, pages(4..8)))?;
    bed.start()?;
    bed.reports(&[2..8])?;
    bed.refused(Errno::ENXIO, command(1, Opcode::Write, pages(2..3)))?;
    bed.must(command(1, Opcode::Write, pages(4..6)))?;
    bed.must(command(1, Opcode::DmaWrite, pages(20..21)))?;
    bed.unpin(2..6)?;
    bed.reports(&[2..8, 20..21])?;
    bed.reports(&[4..8])?;
    bed.must(Op::Close { device: 1 })?;
    bed.reports(&[4..8])?;
    bed.reports(&[])?;
    bed.check()
}
