// SPDX-License-Identifier: GPL-2.0-only

//! Pins as real drivers make them: from any IOVA, with any protection, up to as many pages as
//! `vfio_pin_pages()` takes. The page is pinned that contains the IOVA, or there is an error; never
//! another page, never memory outside of a mapping.

use anyhow::Result;
use dirty_model::{Errno, Errnos, Protection};
use harness::{Context, Scenario, Skip, locked_memory as locked_bytes, scenario};
use mdev_dma::{Opcode, uapi::RUST_MDEV_DMA_COMMAND_BACKGROUND as BACKGROUND};
use testbed::{
    Op, PAGE, RAW_PAGES, Testbed, at, command,
    fixture::{Fixture, succeeded},
    map, pages, same,
};
use vfio_client::{
    MapArgs,
    uapi::{VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE},
};

/// `IOMMU_READ` and `IOMMU_WRITE`
const READ: u64 = 1;
const WRITE: u64 = 2;
pub const RW: u64 = READ | WRITE;

/// Offsets in a page: its ends, the halves that vfio_ccw's 2 KiB blocks have, and bytes around.
const OFFSETS: [u64; 7] = [0, 1, 8, 0x7ff, 0x800, 0xff8, 0xfff];

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "type1/raw-pin/offsets",
        "whatever the offset, the page is pinned that contains the IOVA, and those behind it",
        offsets,
    ),
    scenario(
        "type1/raw-pin/counts",
        "0 pages are EINVAL, 512 are pinned, 513 are E2BIG, from any offset",
        counts,
    ),
    scenario(
        "type1/raw-pin/protections",
        "a pin has the protection that the mapping has, or is EPERM; unknown bits are EPERM",
        protections,
    ),
    scenario(
        "type1/raw-pin/dirty-for-the-kernel",
        "a page that could be written is dirty for the kernel once it is unpinned, one that could only be read isn't",
        dirty_for_the_kernel,
    ),
    scenario(
        "type1/raw-pin/behind-the-last",
        "a page behind the last mapping is EINVAL, and so are pins that go on beyond it",
        behind_the_last,
    ),
    scenario(
        "type1/raw-pin/seam",
        "over the seam of two mappings, mapped in ascending order",
        seam,
    ),
    scenario(
        "type1/raw-pin/neighbours",
        "pins at other offsets of other pages nearby are other pins (as of 492d1e9f0df7)",
        neighbours,
    ),
    scenario(
        "type1/raw-pin/unpin-in-any-order",
        "each of many pins of two pages is returned by its own unpin, in any order",
        unpin_in_any_order,
    ),
    scenario(
        "type1/raw-pin/two-devices",
        "a page pinned by two devices, raw and not, is pinned until both have let go",
        two_devices,
    ),
    scenario(
        "type1/raw-pin/unmap-part",
        "an unmap of one page's mapping takes away all of a pin, and nothing else",
        unmap_part,
    ),
    scenario(
        "type1/raw-pin/tracking",
        "pins before and after START are dirty in every read until they are returned, and once more",
        tracking,
    ),
    scenario(
        "type1/raw-pin/unmap-bitmap",
        "an unmap with bitmap reports raw pins, and takes them away",
        unmap_bitmap,
    ),
    scenario(
        "type1/raw-pin/locked-memory",
        "VmLck counts each page of raw pins once, and is what it was after unpin, unmap and close",
        locked_memory,
    ),
    scenario(
        "type1/raw-pin/memlock-limit",
        "RLIMIT_MEMLOCK: a pin of more pages than the user may lock fails, and leaves none",
        memlock_limit,
    ),
    scenario(
        "type1/raw-pin/hidden",
        "memory that is taken away can't be pinned; what is pinned stays, and can be pinned again",
        hidden,
    ),
    scenario(
        "type1/raw-pin/limits",
        "what the device refuses: no such pin, no such protection, more than it may have",
        limits,
    ),
    scenario("type1/raw-pin/reset", "RESET and close return raw pins", reset),
];

/// A container with a device that has raw pins.
pub fn bed<'a>(context: &'a Context<'a>) -> Result<Testbed<'a>> {
    let bed = Testbed::new(context)?;
    bed.needs_raw_pins()?;
    Ok(bed)
}

/// As [`bed`], with so many pages.
fn bed_with<'a>(context: &'a Context<'a>, count: u64) -> Result<Testbed<'a>> {
    let mut bed = bed(context)?;
    bed.map(0..count)?;
    Ok(bed)
}

/// An operation of device 0 on the raw pin of `count` pages from `iova` on.
fn raw(op: Opcode, iova: u64, count: u64, seed: u64) -> Op {
    Op::Command { device: 0, op: op as u32, iova, length: count * PAGE, seed }
}

pub fn pin(iova: u64, count: u64, protection: u64) -> Op {
    raw(Opcode::RawPin, iova, count, protection)
}

fn unpin(iova: u64, count: u64, protection: u64) -> Op {
    raw(Opcode::RawUnpin, iova, count, protection)
}

/// Writes and reads through a raw pin, and compares memory.
fn accesses(bed: &mut Testbed<'_>, iova: u64, count: u64) -> Result<()> {
    bed.must(raw(Opcode::RawRead, iova, count, 0))?;
    bed.must(raw(Opcode::RawWrite, iova, count, iova ^ count.rotate_left(32)))?;
    bed.check_memory()?;
    bed.must(raw(Opcode::RawRead, iova, count, 0))
}

fn offsets(context: &Context<'_>) -> Result<()> {
    let mut bed = bed_with(context, 8)?;
    for offset in OFFSETS {
        for (page, count) in [(0, 1), (3, 1), (7, 1), (0, 8), (2, 3)] {
            let iova = at(page, offset);
            bed.must(pin(iova, count, RW))?;
            bed.has_pins(count)?;
            accesses(&mut bed, iova, count)?;
            bed.must(unpin(iova, count, RW))?;
        }
    }
    bed.check()
}

fn counts(context: &Context<'_>) -> Result<()> {
    let mut bed = bed_with(context, RAW_PAGES + 1)?;
    for offset in [0, 0x800] {
        let iova = at(0, offset);
        bed.refused(Errno::EINVAL, pin(iova, 0, RW))?;
        bed.refused(Errno::E2BIG, pin(iova, RAW_PAGES + 1, RW))?;
        bed.has_pins(0)?;
        bed.must(pin(iova, RAW_PAGES, RW))?;
        accesses(&mut bed, iova, RAW_PAGES)?;
        bed.must(unpin(iova, RAW_PAGES, RW))?;
    }
    bed.refused(Errno::EOVERFLOW, pin(PAGE.wrapping_neg(), 2, RW))?;
    bed.refused(Errno::EINVAL, pin(u64::MAX - 2 * PAGE, 1, RW))?;
    bed.check()
}

fn protections(context: &Context<'_>) -> Result<()> {
    let mut bed = bed_with(context, 2)?;
    bed.must(map(2..4, Protection::READ))?;
    bed.must(map(4..6, Protection::WRITE))?;
    for (page, allowed) in [(0, RW), (2, READ), (4, WRITE)] {
        for protection in 0..16 {
            for offset in [0, 0x10] {
                let iova = at(page, offset);
                if protection & !allowed != 0 {
                    bed.refused(Errno::EPERM, pin(iova, 1, protection))?;
                    continue;
                }
                bed.must(pin(iova, 1, protection))?;
                let read = raw(Opcode::RawRead, iova, 1, 0);
                let write = raw(Opcode::RawWrite, iova, 1, protection);
                for (op, needs) in [(read, READ), (write, WRITE)] {
                    match protection & needs {
                        0 => bed.refused(Errno::EACCES, op)?,
                        _ => bed.must(op)?,
                    }
                }
                bed.check_memory()?;
                bed.must(unpin(iova, 1, protection))?;
            }
        }
    }
    for protection in [1 << 5, 1 << 30, 1 << 31, u64::from(u32::MAX)] {
        bed.refused(Errno::EPERM, pin(at(0, 8), 1, protection))?;
    }
    // What the process reads and writes is what a device sees that may only read.
    bed.must(pin(at(2, 0x800), 2, READ))?;
    bed.user_write(at(2, 0)..at(4, 0))?;
    bed.must(raw(Opcode::RawRead, at(2, 0x800), 2, 0))?;
    // The second of these pages is mapped without the protection.
    bed.refused(Errno::EPERM, pin(at(1, 8), 2, WRITE))?;
    bed.check()
}

fn dirty_for_the_kernel(context: &Context<'_>) -> Result<()> {
    const COUNT: u64 = 8;
    for (protection, flags, expected) in [
        (READ, VFIO_DMA_MAP_FLAG_READ, 0),
        (RW, VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE, COUNT),
    ] {
        let fixture = Fixture::with_small_pages(context, COUNT)?;
        let device = fixture.device();
        if !device.limits()?.raw_pins {
            return Err(Skip("load rust_mdev_dma with raw_pins=1".into()).into());
        }
        fixture.container.map(&MapArgs { flags, ..fixture.mapping(0..COUNT, 0) })?;
        let (iova, length) = (at(0, 0), COUNT * PAGE);
        succeeded("RAW_PIN", device.run(Opcode::RawPin as u32, iova, length, protection)?)?;
        succeeded("RAW_UNPIN", device.run(Opcode::RawUnpin as u32, iova, length, protection)?)?;
        same("pages that are dirty", expected, fixture.dirty_for_the_kernel()?)?;
    }
    Ok(())
}

fn behind_the_last(context: &Context<'_>) -> Result<()> {
    let mut bed = bed_with(context, 4)?;
    for tracking in [false, true] {
        for offset in OFFSETS {
            bed.refused(Errno::EINVAL, pin(at(4, offset), 1, RW))?;
            bed.refused(Errno::EINVAL, pin(at(5, offset), 3, RW))?;
            if !tracking {
                // The stock kernel leaves the pages dirty that it could pin: D5.
                bed.refused(Errno::EINVAL, pin(at(3, offset), 2, RW))?;
                bed.refused(Errno::EINVAL, pin(at(0, offset), RAW_PAGES, RW))?;
            }
            bed.must(pin(at(3, offset), 1, RW))?;
            accesses(&mut bed, at(3, offset), 1)?;
            bed.must(unpin(at(3, offset), 1, RW))?;
            bed.has_pins(0)?;
        }
        bed.start()?;
    }
    bed.reports(&[3..4])?;
    bed.check()
}

fn seam(context: &Context<'_>) -> Result<()> {
    for tracking in [false, true] {
        // A word of the bitmap each: what shares one is D6's business.
        let mut bed = bed(context)?;
        bed.map(0..64)?;
        bed.map(64..128)?;
        if tracking {
            bed.start()?;
        }
        for offset in OFFSETS {
            for (page, count) in [(63, 1), (63, 2), (62, 4), (64, 1)] {
                bed.must(pin(at(page, offset), count, RW))?;
                accesses(&mut bed, at(page, offset), count)?;
                bed.must(unpin(at(page, offset), count, RW))?;
            }
        }
        bed.check()?;
    }
    Ok(())
}

/// A lookup of a page's worth of IOVA finds pins of the next page: it is how 492d1e9f0df7 broke vfio_ccw.
fn neighbours(context: &Context<'_>) -> Result<()> {
    let mut bed = bed_with(context, 8)?;
    bed.count_locked_memory()?;
    let (low, middle, high) = (at(2, 0x800), at(3, 0), at(4, 0x400));
    bed.must(pin(middle, 1, RW))?;
    bed.must(pin(low, 1, RW))?;
    bed.must(pin(high, 1, RW))?;
    bed.check_counters()?;
    for iova in [low, middle, high] {
        accesses(&mut bed, iova, 1)?;
    }
    bed.must(unpin(low, 1, RW))?;
    bed.check_counters()?;
    accesses(&mut bed, middle, 1)?;
    accesses(&mut bed, high, 1)?;
    bed.must(pin(at(3, 0xc00), 1, RW))?;
    bed.must(unpin(middle, 1, RW))?;
    accesses(&mut bed, at(3, 0xc00), 1)?;
    bed.must(unpin(high, 1, RW))?;
    bed.start()?;
    bed.reports(&[3..4])?;
    bed.must(unpin(at(3, 0xc00), 1, RW))?;
    bed.reports(&[3..4])?;
    bed.reports(&[])?;
    bed.unmap(0..8)?;
    bed.check()
}

fn unpin_in_any_order(context: &Context<'_>) -> Result<()> {
    for rotation in 0..OFFSETS.len() {
        let mut bed = bed_with(context, 4)?;
        bed.start()?;
        for offset in OFFSETS {
            bed.must(pin(at(1, offset), 2, RW))?;
        }
        bed.has_pins(2 * OFFSETS.len() as u64)?;
        let mut order = OFFSETS;
        order.rotate_left(rotation);
        if rotation % 2 == 1 {
            order.reverse();
        }
        for offset in order {
            bed.reports(&[1..3])?;
            accesses(&mut bed, at(1, offset), 2)?;
            bed.must(unpin(at(1, offset), 2, RW))?;
        }
        bed.reports(&[1..3])?;
        bed.reports(&[])?;
        bed.has_pins(0)?;
        bed.unmap(0..4)?;
    }
    Ok(())
}

fn two_devices(context: &Context<'_>) -> Result<()> {
    let mut bed = bed_with(context, 4)?;
    bed.add_device()?;
    bed.count_locked_memory()?;
    let on_two = |op: Op| match op {
        Op::Command { op, iova, length, seed, .. } => {
            Op::Command { device: 1, op, iova, length, seed }
        }
        other => other,
    };
    let iova = at(1, 0x800);
    bed.must(pin(iova, 2, READ))?;
    bed.must(on_two(pin(iova, 2, RW)))?;
    bed.must(on_two(pin(at(2, 0x800), 1, RW)))?;
    bed.check_counters()?;
    bed.must(on_two(raw(Opcode::RawWrite, iova, 2, 7)))?;
    bed.must(raw(Opcode::RawRead, iova, 2, 0))?;
    bed.start()?;
    bed.must(unpin(iova, 2, READ))?;
    bed.reports(&[1..3])?;
    bed.must(on_two(unpin(iova, 2, RW)))?;
    bed.reports(&[1..3])?;
    bed.reports(&[2..3])?;
    bed.must(Op::Close { device: 1 })?;
    bed.reports(&[2..3])?;
    bed.reports(&[])?;
    bed.check()
}

fn unmap_part(context: &Context<'_>) -> Result<()> {
    for second in [false, true] {
        let mut bed = bed(context)?;
        bed.map(0..4)?;
        bed.map(4..8)?;
        bed.count_locked_memory()?;
        bed.start()?;
        bed.must(pin(at(3, 0x800), 2, RW))?;
        bed.must(pin(at(1, 0x800), 1, RW))?;
        bed.must(pin(at(6, 0x800), 1, RW))?;
        accesses(&mut bed, at(3, 0x800), 2)?;
        let (gone, kept, stays) = if second { (4..8, 0..4, 1) } else { (0..4, 4..8, 6) };
        bed.unmap(gone.clone())?;
        bed.has_pins(1)?;
        bed.check_counters()?;
        bed.refused(Errno::ENXIO, raw(Opcode::RawRead, at(3, 0x800), 2, 0))?;
        bed.refused(Errno::ENXIO, unpin(at(3, 0x800), 2, RW))?;
        // Its page in the other mapping was pinned until then.
        let seam = if second { 3 } else { 4 };
        let mut expected = [seam..seam + 1, stays..stays + 1];
        expected.sort_by_key(|run| run.start);
        bed.reports(&expected)?;
        bed.reports(&expected[usize::from(!second)..][..1])?;
        if second {
            // In ascending order again, without which the stock kernel shows D11.
            bed.map(gone)?;
            bed.must(pin(at(3, 0x800), 2, RW))?;
            accesses(&mut bed, at(3, 0x800), 2)?;
        }
        bed.unmap(kept)?;
        bed.has_pins(0)?;
        bed.check()?;
    }
    Ok(())
}

fn tracking(context: &Context<'_>) -> Result<()> {
    let mut bed = bed_with(context, 70)?;
    bed.must(pin(at(63, 0x800), 2, RW))?;
    bed.must(pin(at(10, 0xfff), 1, READ))?;
    bed.start()?;
    bed.reports(&[10..11, 63..65])?;
    bed.reports(&[10..11, 63..65])?;
    bed.must(pin(at(69, 1), 1, RW))?;
    bed.reports(&[10..11, 63..65, 69..70])?;
    bed.must(unpin(at(63, 0x800), 2, RW))?;
    bed.reports(&[10..11, 63..65, 69..70])?;
    bed.reports(&[10..11, 69..70])?;
    bed.stop()?;
    bed.must(unpin(at(69, 1), 1, RW))?;
    bed.start()?;
    bed.reports(&[10..11])?;
    // In the background it is the same.
    let background = |op: Op| match op {
        Op::Command { device, op, iova, length, seed } => {
            Op::Command { device, op: op | BACKGROUND, iova, length, seed }
        }
        other => other,
    };
    bed.must(background(pin(at(30, 0x123), 3, RW)))?;
    bed.must(background(raw(Opcode::RawWrite, at(30, 0x123), 3, 9)))?;
    bed.must(background(raw(Opcode::RawRead, at(30, 0x123), 3, 0)))?;
    bed.must(background(unpin(at(30, 0x123), 3, RW)))?;
    bed.reports(&[10..11, 30..33])?;
    bed.check()
}

fn unmap_bitmap(context: &Context<'_>) -> Result<()> {
    let mut bed = bed(context)?;
    bed.map(0..4)?;
    bed.map(4..8)?;
    bed.start()?;
    bed.must(pin(at(3, 0x800), 2, RW))?;
    accesses(&mut bed, at(3, 0x800), 2)?;
    bed.unmap_reports(4..8, &[4..5])?;
    bed.has_pins(0)?;
    bed.reports(&[3..4])?;
    bed.reports(&[])?;
    bed.check()
}

fn locked_memory(context: &Context<'_>) -> Result<()> {
    let before = locked_bytes()?;
    let mut bed = bed(context)?;
    bed.map(0..100)?;
    bed.map(100..200)?;
    let holds = |what: &str, count| same(what, before + count * PAGE, locked_bytes()?);
    bed.must(pin(at(10, 0x800), 140, RW))?;
    holds("VmLck with 140 pages", 140)?;
    bed.must(pin(at(10, 0x800), 10, READ))?;
    holds("VmLck with 10 of them pinned twice", 140)?;
    bed.must(unpin(at(10, 0x800), 140, RW))?;
    holds("VmLck with these 10", 10)?;
    bed.refused(Errno::EINVAL, pin(at(180, 0x800), 21, RW))?;
    holds("VmLck after a RAW_PIN that failed", 10)?;
    bed.must(pin(at(95, 8), 10, RW))?;
    holds("VmLck with 10 over the seam", 20)?;
    bed.unmap(100..200)?;
    holds("VmLck with one side unmapped", 10)?;
    bed.must(Op::Reset { device: 0 })?;
    holds("VmLck after RESET", 0)?;
    bed.must(pin(at(5, 0x800), 7, 0))?;
    bed.must(Op::Close { device: 0 })?;
    holds("VmLck after close", 0)?;
    bed.must(Op::Open { device: 0 })?;
    bed.must(pin(at(5, 0x800), 7, RW))?;
    drop(bed);
    holds("VmLck after everything was closed", 0)
}

fn memlock_limit(context: &Context<'_>) -> Result<()> {
    let mut bed = bed(context)?;
    bed.count_locked_memory()?;
    bed.must(Op::Limit { pages: Some(10) })?;
    bed.map(0..64)?;
    bed.must(pin(at(3, 0x800), 8, RW))?;
    bed.refused(Errno::ENOMEM, pin(at(20, 0x800), 3, READ))?;
    bed.check()?;
    // What is pinned counts once.
    bed.must(pin(at(3, 0x800), 10, READ))?;
    bed.refused(Errno::ENOMEM, pin(at(20, 0), 1, 0))?;
    bed.must(unpin(at(3, 0x800), 10, READ))?;
    bed.must(pin(at(20, 0xfff), 2, RW))?;
    bed.check()?;
    bed.must(Op::Limit { pages: None })?;
    bed.must(Op::unmap_all())?;
    bed.check()
}

fn hidden(context: &Context<'_>) -> Result<()> {
    let mut bed = bed_with(context, 8)?;
    bed.must(pin(at(3, 0x800), 2, RW))?;
    let (iova, size) = (at(2, 0), 4 * PAGE);
    bed.must(Op::Hide { iova, size })?;
    bed.refused(Errno::EFAULT, pin(at(2, 0x800), 1, READ))?;
    bed.refused(Errno::EFAULT, pin(at(1, 0x800), 3, RW))?;
    bed.must(pin(at(3, 0x800), 1, READ))?;
    bed.must(raw(Opcode::RawWrite, at(3, 0x800), 2, 5))?;
    bed.must(Op::Show { iova, size })?;
    bed.must(pin(at(2, 0x800), 3, RW))?;
    accesses(&mut bed, at(2, 0x800), 3)?;
    bed.check()
}

fn limits(context: &Context<'_>) -> Result<()> {
    let mut bed = bed_with(context, RAW_PAGES)?;
    let mdev_dma::DeviceLimits { max_pins, max_length, .. } = bed.device(0).limits()?;
    let any = |op, iova, length, seed| Op::Command { device: 0, op: op as u32, iova, length, seed };
    for op in Opcode::RAW {
        bed.refused(Errno::EINVAL, any(op, at(0, 0), PAGE + 8, RW))?;
        bed.refused(Errno::E2BIG, any(op, at(0, 8), max_length + PAGE, RW))?;
        if op != Opcode::RawPin {
            bed.refused(Errno::ENXIO, any(op, at(0, 8), PAGE, RW))?;
            bed.refused(Errno::ENXIO, any(op, at(0, 8), 0, RW))?;
        }
    }
    let wide = 1 << 32;
    bed.refused(Errno::EINVAL, pin(at(0, 0), 1, wide))?;
    bed.refused(Errno::EINVAL, unpin(at(0, 0), 1, wide))?;
    bed.refused(Errno::EOVERFLOW, raw(Opcode::RawRead, u64::MAX, 1, 0))?;
    bed.must(pin(at(0, 8), 2, READ))?;
    for op in [unpin(at(0, 0), 2, READ), unpin(at(0, 8), 1, READ), unpin(at(0, 8), 2, RW)] {
        bed.refused(Errno::ENXIO, op)?;
    }
    bed.refused(Errno::EACCES, raw(Opcode::RawWrite, at(0, 8), 2, 1))?;
    // PIN and raw pins are counted together, and know nothing of each other's pages.
    bed.refused(Errno::ENXIO, command(0, Opcode::Unpin, pages(0..1)))?;
    bed.must(unpin(at(0, 8), 2, READ))?;
    let whole = max_pins / RAW_PAGES;
    for _ in 0..whole {
        bed.must(pin(at(0, 0x10), RAW_PAGES, RW))?;
    }
    let rest = max_pins - whole * RAW_PAGES;
    bed.refused(Errno::ENOSPC, pin(at(0, 0), rest + 1, RW))?;
    bed.refused(Errno::ENOSPC, command(0, Opcode::Pin, pages(0..rest + 1)))?;
    bed.has_pins(whole * RAW_PAGES)?;
    bed.must(unpin(at(0, 0x10), RAW_PAGES, RW))?;
    bed.must(pin(at(0, 0), rest + 1, RW))?;
    bed.must(Op::Reset { device: 0 })?;
    bed.check()
}

fn reset(context: &Context<'_>) -> Result<()> {
    let mut bed = bed_with(context, 8)?;
    bed.count_locked_memory()?;
    bed.start()?;
    for end in [Op::Reset { device: 0 }, Op::Close { device: 0 }] {
        bed.must(pin(at(2, 0x800), 3, RW))?;
        bed.must(command(0, Opcode::Pin, pages(6..7)))?;
        bed.reports(&[2..5, 6..7])?;
        bed.must(end.clone())?;
        bed.reports(&[2..5, 6..7])?;
        bed.reports(&[])?;
        bed.check()?;
        if end == (Op::Close { device: 0 }) {
            bed.must(Op::Open { device: 0 })?;
        }
        bed.refused(Errno::ENXIO, unpin(at(2, 0x800), 3, RW))?;
    }
    let gone: Errnos = Errno::ENXIO.into();
    bed.refused(gone, raw(Opcode::RawWrite, at(2, 0x800), 3, 1))
}
