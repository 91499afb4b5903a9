// SPDX-License-Identifier: GPL-2.0-only

//! Where things end: mappings that a container may have, memory for bitmaps, and IOVAs.

use crate::{charge::scattered, process::edu};
use anyhow::{Result, ensure};
use dirty_model::{BITMAP_PAGES_MAX, Errno, Protection};
use harness::{
    Context, Scenario, Setting, locked_memory, memory_available, scenario, slab_unreclaimable,
};
use mdev_dma::Opcode;
use testbed::{
    Op, PAGE, Rights, Testbed, at, command, fixture::succeeded, map, pages, same, status,
};
use vfio_client::{
    Access, Container, Group, Leave,
    uapi::{VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE},
};

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "type1/limit/dma-entries",
        "a container has as many mappings as dma_entry_limit said when it began; one more is ENOSPC",
        dma_entries,
    ),
    scenario(
        "type1/limit/failing-start",
        "a START that fails, again and again, leaves no memory behind",
        failing_start,
    ),
    scenario(
        "type1/limit/come-and-go",
        "pins, mappings, groups and containers that come and go, again and again, leave no memory behind",
        come_and_go,
    ),
    scenario(
        "type1/limit/iommu-come-and-go",
        "groups with an IOMMU and mappings for it, which come and go or fail, leave no pages behind",
        iommu_come_and_go,
    ),
    scenario(
        "type1/limit/memlock-of-iommu",
        "MAP and a join beyond RLIMIT_MEMLOCK are ENOMEM, unless the user has CAP_IPC_LOCK",
        memlock_of_iommu,
    ),
    scenario(
        "type1/limit/end-of-iova",
        "a mapping that ends at 2^64 is pinned, written, read and unmapped like any other",
        end_of_iova,
    ),
];

const DMA_ENTRY_LIMIT: &str = "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit";

fn dma_entries(context: &Context<'_>) -> Result<()> {
    const LIMIT: u64 = 5;
    let (mut bed, usual) = {
        let limit = Setting::new(DMA_ENTRY_LIMIT, &LIMIT.to_string())?;
        (Testbed::new(context)?, limit.old().parse()?)
    };
    let avail = |bed: &Testbed<'_>| -> Result<u64> {
        Ok(bed.container().info()?.dma_avail.unwrap_or(0).into())
    };
    same("dma_avail", LIMIT, avail(&bed)?)?;
    let one_more = || map(100..101, Protection::READ_WRITE);
    for tracking in [false, true] {
        for i in 0..LIMIT {
            bed.map(2 * i..2 * i + 1)?;
        }
        for _ in 0..2 {
            bed.refused(Errno::ENOSPC, one_more())?;
            bed.check()?;
        }
        // Each way to unmap gives back what it took.
        bed.pin(2..3)?;
        bed.unmap(2..3)?;
        bed.must(one_more())?;
        bed.refused(Errno::ENOSPC, map(2..3, Protection::READ_WRITE))?;
        if tracking {
            bed.unmap_reports(4..7, &[])?;
        } else {
            bed.unmap(4..7)?;
        }
        bed.map(2..3)?;
        bed.map(5..6)?;
        bed.refused(Errno::ENOSPC, map(4..5, Protection::READ_WRITE))?;
        bed.refused(Errno::EINVAL, Op::unmap(at(5, 0), PAGE / 2))?;
        bed.refused(Errno::ENOSPC, map(4..5, Protection::READ_WRITE))?;
        bed.must(Op::unmap_all())?;
        bed.check()?;
        if !tracking {
            bed.start()?;
        }
    }
    // One that can't be tracked takes nothing.
    bed.refused(Errno::EINVAL, beyond_bitmaps())?;
    bed.check()?;
    // Others have the limit that there is now.
    let other = Testbed::on(context, 1)?;
    same("dma_avail of another container", usual, avail(&other)?)
}

/// A mapping that is too large to be tracked.
fn beyond_bitmaps() -> Op {
    let flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;
    Op::Map { iova: 1 << 45, size: (BITMAP_PAGES_MAX + 1) * PAGE, backed: PAGE, flags }
}

fn failing_start(context: &Context<'_>) -> Result<()> {
    // Each START allocates bitmaps of 2 MiB and of 16 bytes before it comes to the one that is too
    // large.
    const LARGE: u64 = 64 << 30;
    const STARTS: u64 = 256;
    const BITMAP: u64 = LARGE / PAGE / 8;
    let mut bed = Testbed::with_pages(context, 16)?;
    bed.pin(3..4)?;
    let flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;
    bed.must(Op::Map { iova: 1 << 40, size: LARGE, backed: PAGE, flags })?;
    bed.must(beyond_bitmaps())?;
    let start = || -> Result<()> {
        let started = status(bed.container().dirty_start())?;
        ensure!(started == Err(Errno::EINVAL), "START: {started:?}");
        Ok(())
    };
    let lost = taken(STARTS, || Ok(-(memory_available()? as i64)), start)?;
    ensure!(
        lost < (STARTS * BITMAP / 8) as i64,
        "{STARTS} START that failed took {} KiB of memory, bitmaps have {} KiB",
        lost >> 10,
        BITMAP >> 10
    );
    bed.must(Op::unmap(1 << 45, (BITMAP_PAGES_MAX + 1) * PAGE))?;
    bed.start()?;
    bed.reports(&[3..4]).or_else(|_| bed.each_reports(&[3..4]))?;
    bed.check_counters()
}

fn come_and_go(context: &Context<'_>) -> Result<()> {
    const PAGES: u64 = 300;
    let (iova, size) = (at(0, 0), PAGES * PAGE);
    // An IOMMU unmaps each by itself.
    let fixture = scattered(context, PAGES)?;
    fixture.map(0..PAGES)?;
    // What type1 has of each is no smaller.
    leaves_nothing("pins of 300 pages", 128, PAGES * 48, || {
        fixture.pin(0..PAGES)?;
        succeeded("UNPIN", fixture.device().unpin(iova, size)?)
    })?;
    leaves_nothing("mappings", 10_000, 96, || {
        fixture.map_at(0..1, PAGES)?;
        fixture.unmap(PAGES..PAGES + 1)
    })?;
    // Two, of 300 bits and 64 more each.
    fixture.map_at(0..PAGES, PAGES)?;
    leaves_nothing("bitmaps that STOP ended", 10_000, 2 * 48, || {
        fixture.container.dirty_start()?;
        Ok(fixture.container.dirty_stop()?)
    })?;
    fixture.unmap(PAGES..2 * PAGES)?;
    fixture.container.dirty_start()?;
    leaves_nothing("bitmaps of mappings that were unmapped", 10_000, 48, || {
        fixture.map_at(0..PAGES, PAGES)?;
        fixture.unmap(PAGES..2 * PAGES)
    })?;
    fixture.container.dirty_stop()?;
    let node = edu(context)?;
    // What type1 has of a container is no smaller, and a domain with what the IOMMU's driver has of it. That many, since
    // tables of an IOMMU that are freed later weigh as much as some.
    leaves_nothing("containers", 2_000, 200, || {
        drop(Container::new(Group::open(&node)?)?);
        Ok(())
    })?;
    leaves_nothing("domains", 512, 1024, || {
        fixture.container.attach(Group::open(&node)?)?;
        Ok(fixture.container.detach(node.group(), Leave::Unset)?)
    })?;
    fixture.container.attach(Group::open(&node)?)?;
    leaves_nothing("mappings of 300 pages for an IOMMU", 64, PAGES * 40, || {
        fixture.map_at(0..PAGES, PAGES)?;
        fixture.unmap(PAGES..2 * PAGES)
    })
}

fn iommu_come_and_go(context: &Context<'_>) -> Result<()> {
    const PAGES: u64 = 4;
    let last = ((PAGES - 1) * PAGE) as usize..(PAGES * PAGE) as usize;
    let fixture = scattered(context, PAGES)?;
    fixture.map(0..PAGES)?;
    let (container, node) = (&fixture.container, edu(context)?);
    let join =
        |expected| same_end("a join", expected, status(container.attach(Group::open(&node)?))?);
    let map = |expected| {
        same_end("a MAP", expected, status(container.map(&fixture.mapping(0..PAGES, PAGES)))?)
    };
    leaves_no_pages(context, "groups that joined", || {
        join(Ok(()))?;
        Ok(container.detach(node.group(), Leave::Unset)?)
    })?;
    fixture.memory.set_access(last.clone(), Access::None)?;
    leaves_no_pages(context, "groups that could not join", || join(Err(Errno::EFAULT)))?;
    fixture.memory.set_access(last.clone(), Access::ReadWrite)?;
    join(Ok(()))?;
    leaves_no_pages(context, "mappings for an IOMMU", || {
        map(Ok(()))?;
        fixture.unmap(PAGES..2 * PAGES)
    })?;
    fixture.memory.set_access(last, Access::None)?;
    leaves_no_pages(context, "mappings for an IOMMU that failed", || map(Err(Errno::EFAULT)))
}

fn memlock_of_iommu(context: &Context<'_>) -> Result<()> {
    const PAGES: u64 = 64;
    let (fixture, node) = (scattered(context, PAGES)?, edu(context)?);
    let (container, before) = (&fixture.container, locked_memory()?);
    let rights = Rights::now()?;
    let map = || status(container.map(&fixture.mapping(0..PAGES, 0)));
    let join = || status(container.attach(Group::open(&node)?));
    let locks = |pages| same("VmLck", before + pages * PAGE, locked_memory()?);
    for (allowed, ends, locked) in
        [(Some(before + 8 * PAGE), Err(Errno::ENOMEM), 0), (None, Ok(()), PAGES)]
    {
        rights.limit(allowed)?;
        // Who has CAP_IPC_LOCK isn't limited.
        rights.set_memlock(Some(before + 8 * PAGE))?;
        same_end("a MAP, which an IOMMU has nothing to do with yet", Ok(()), map()?)?;
        locks(0)?;
        same_end("a join", ends, join()?)?;
        locks(locked)?;
        fixture.unmap(0..PAGES)?;
        if ends.is_err() {
            same_end("a join without mappings", Ok(()), join()?)?;
        }
        same_end("a MAP for an IOMMU", ends, map()?)?;
        locks(locked)?;
        container.detach(node.group(), Leave::Unset)?;
        locks(0)?;
        if ends.is_ok() {
            fixture.unmap(0..PAGES)?;
        }
    }
    Ok(())
}

/// Fails unless something ends so.
fn same_end(what: &str, expected: Result<(), Errno>, found: Result<(), Errno>) -> Result<()> {
    ensure!(found == expected, "{what}: {found:?}, not {expected:?}");
    Ok(())
}

/// Does something so many times that a page of each would be missed, and fails if one is gone.
fn leaves_no_pages(
    context: &Context<'_>,
    what: &str,
    once: impl FnMut() -> Result<()>,
) -> Result<()> {
    // Some MiB come and go by themselves.
    const TIMES: u64 = 4096;
    // What is slabs is for others to count: a kernel that looks for uses after free keeps those for a while.
    let used = || Ok(-((memory_available()? + slab_unreclaimable()?) as i64));
    let lost = taken(TIMES, used, once)?;
    context.note(format_args!("{TIMES} {what}: {} KiB less", lost >> 10));
    ensure!(
        lost < (TIMES * PAGE / 2) as i64,
        "{TIMES} {what} have taken {} KiB of memory for good, a page of each has {} KiB",
        lost >> 10,
        (TIMES * PAGE) >> 10
    );
    Ok(())
}

/// Does something so many times, each of which takes so much memory while it lasts, and fails if half of it
/// is gone afterwards.
fn leaves_nothing(
    what: &str,
    times: u64,
    bytes: u64,
    once: impl FnMut() -> Result<()>,
) -> Result<()> {
    let lost = taken(times, || Ok(slab_unreclaimable()? as i64), once)?;
    ensure!(
        lost < (times * bytes / 2) as i64,
        "{times} {what} have taken {} KiB for good, of {} KiB at least that they had",
        lost >> 10,
        (times * bytes) >> 10
    );
    Ok(())
}

/// How many bytes more are in use, as `used` has it, when something was done so many times.
fn taken(
    times: u64,
    used: impl Fn() -> Result<i64>,
    mut once: impl FnMut() -> Result<()>,
) -> Result<i64> {
    // Once before, for what the kernel keeps to use it again.
    once()?;
    let before = used()?;
    for _ in 0..times {
        once()?;
    }
    Ok(used()? - before)
}

fn end_of_iova(context: &Context<'_>) -> Result<()> {
    const PAGES: u64 = 70;
    let begin = (PAGES * PAGE).wrapping_neg();
    let iova = |page: u64| begin + page * PAGE;
    let last = iova(PAGES - 1);
    let mut bed = Testbed::with_pages(context, 1)?;
    bed.must(Op::map(begin, PAGES * PAGE, Protection::READ_WRITE))?;
    bed.refused(Errno::EEXIST, Op::map(last, PAGE, Protection::READ_WRITE))?;
    let dirty = |bed: &mut Testbed<'_>, from: u64| -> Result<Vec<_>> {
        let answer = bed.apply(Op::get_bitmap(from, from.wrapping_neg()))?;
        let runs = answer.bitmap.map(|bitmap| bitmap.runs()).unwrap_or_default();
        let skipped = (begin - from) / PAGE;
        Ok(runs.into_iter().map(|run| run.start - skipped..run.end - skipped).collect())
    };
    for _ in 0..2 {
        bed.must(command(0, Opcode::Pin, iova(60)..last))?;
        // A range whose end is no IOVA is none for the device.
        let pin =
            Op::Command { device: 0, op: Opcode::Pin as u32, iova: last, length: PAGE, seed: 0 };
        bed.refused(Errno::EOVERFLOW, pin)?;
        bed.start()?;
        bed.must(command(0, Opcode::DmaWrite, last + 7..u64::MAX))?;
        bed.must(command(0, Opcode::DmaRead, iova(68) + 1..u64::MAX))?;
        ensure!(dirty(&mut bed, begin)? == [60..PAGES], "what is dirty");
        ensure!(dirty(&mut bed, begin)? == [60..PAGES - 1], "what is dirty afterwards");
        // With a hole of 70 pages before it.
        bed.must(command(0, Opcode::DmaWrite, last..u64::MAX))?;
        ensure!(
            dirty(&mut bed, iova(0) - 128 * PAGE)? == [60..PAGES],
            "what is dirty behind a hole"
        );
        bed.refused(Errno::EOVERFLOW, Op::get_bitmap(begin, (PAGES + 1) * PAGE))?;
        bed.refused(Errno::EINVAL, Op::get_bitmap(begin, (PAGES - 1) * PAGE))?;
        bed.refused(Errno::EINVAL, Op::unmap(last, PAGE))?;
        bed.refused(Errno::EOVERFLOW, Op::unmap(begin, (PAGES + 1) * PAGE))?;
        bed.check_memory()?;
        bed.has_pins(9)?;
        let unmapped = bed.apply(Op::unmap_bitmap(begin, PAGES * PAGE))?;
        let runs = unmapped.bitmap.map(|bitmap| bitmap.runs());
        ensure!(runs == Some(vec![60..PAGES - 1]), "what is dirty when it is unmapped: {runs:?}");
        bed.has_pins(0)?;
        bed.stop()?;
        bed.must(Op::map(begin, PAGES * PAGE, Protection::READ_WRITE))?;
    }
    bed.must(command(0, Opcode::Pin, iova(60)..last))?;
    bed.pin(0..1)?;
    bed.must(Op::unmap_all())?;
    bed.refused(Errno::EINVAL, command(0, Opcode::DmaRead, last..last + 8))?;
    bed.refused(Errno::EINVAL, command(0, Opcode::DmaRead, pages(0..1)))?;
    bed.has_pins(0)?;
    bed.check()
}
