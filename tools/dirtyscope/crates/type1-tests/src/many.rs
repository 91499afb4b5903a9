// SPDX-License-Identifier: GPL-2.0-only

//! What holds for every mapping of a container, not just for the first one, or the last.
//!
//! Mappings begin at multiples of 64 pages, so that no bitmap has to be shifted: see
//! `Documentation/findings/` on D6.

use anyhow::{Result, ensure};
use dirty_model::{BITMAP_PAGES_MAX, Errno, Protection};
use harness::{Context, Scenario, scenario};
use mdev_dma::Opcode;
use std::ops::Range;
use testbed::{Op, PAGE, Testbed, at, command, map, pages};
use vfio_client::uapi::{VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE};

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "type1/many/start",
        "START reports what is pinned in each of many mappings, and nothing of the others",
        start,
    ),
    scenario(
        "type1/many/start-again",
        "STOP forgets what was dirty in each mapping, START reports what is pinned in each",
        start_again,
    ),
    scenario(
        "type1/many/start-fails",
        "START fails wherever the mapping is that is too large, and then begins clean without it",
        start_fails,
    ),
    scenario(
        "type1/many/read",
        "a read of all forgets what was written in each mapping, and repeats what is pinned in each",
        read,
    ),
    scenario(
        "type1/many/read-some",
        "a read of some mappings forgets nothing of those before and behind them",
        read_some,
    ),
    scenario(
        "type1/many/read-holes",
        "a read of each mapping with much that isn't mapped behind it forgets nothing of the others",
        read_holes,
    ),
    scenario(
        "type1/many/unmap-dirty",
        "UNMAP with bitmap of all reports what is dirty in each mapping, and revokes all pins",
        unmap_dirty,
    ),
    scenario(
        "type1/many/unmap-some",
        "UNMAP of some mappings leaves account and pins of those before and behind them",
        unmap_some,
    ),
    scenario(
        "type1/many/unmap-all",
        "UNMAP of everything revokes the pins of each mapping",
        unmap_all,
    ),
    scenario(
        "type1/many/close",
        "closing a device unpins in each mapping; what was pinned is reported once more",
        close,
    ),
];

const RW: u32 = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;

/// Mappings in the order in which they are made: neither ascending nor descending, some adjacent.
const MAPPINGS: [Range<u64>; 7] =
    [192..256, 0..64, 448..512, 64..128, 256..320, 640..704, 128..130];

/// A container with [`MAPPINGS`], of which each but the one at 256 has a pinned page of its own.
fn bed<'a>(context: &'a Context<'a>) -> Result<Testbed<'a>> {
    let mut bed = Testbed::new(context)?;
    for range in MAPPINGS {
        bed.map(range)?;
    }
    for page in PINNED {
        bed.pin(page..page + 1)?;
    }
    Ok(bed)
}

/// Pages that are pinned.
const PINNED: [u64; 6] = [3, 70, 129, 200, 511, 640];

/// The same as runs.
const PINNED_RUNS: [Range<u64>; 6] = [3..4, 70..71, 129..130, 200..201, 511..512, 640..641];

/// Has device 0 write a page in each mapping, one behind its first page.
fn write_each(bed: &mut Testbed<'_>) -> Result<()> {
    for Range { start, .. } in MAPPINGS {
        bed.dma_write(at(start, 8)..at(start, 9))?;
    }
    Ok(())
}

/// What is dirty then.
const WRITTEN_OR_PINNED: [Range<u64>; 11] = [
    0..1,
    3..4,
    64..65,
    70..71,
    128..130,
    192..193,
    200..201,
    256..257,
    448..449,
    511..512,
    640..641,
];

fn start(context: &Context<'_>) -> Result<()> {
    let mut bed = bed(context)?;
    bed.start()?;
    bed.each_reports(&PINNED_RUNS)?;
    bed.reports(&PINNED_RUNS)?;
    for page in PINNED {
        bed.unpin(page..page + 1)?;
    }
    bed.reports(&PINNED_RUNS)?;
    bed.reports(&[])?;
    bed.check()
}

fn start_again(context: &Context<'_>) -> Result<()> {
    let mut bed = bed(context)?;
    bed.start()?;
    write_each(&mut bed)?;
    bed.stop()?;
    bed.pin(257..258)?;
    bed.unpin(3..4)?;
    bed.start()?;
    bed.reports(&[70..71, 129..130, 200..201, 257..258, 511..512, 640..641])?;
    bed.check()
}

fn start_fails(context: &Context<'_>) -> Result<()> {
    const HUGE: u64 = (BITMAP_PAGES_MAX + 1) * PAGE;
    const BEHIND: u64 = 1 << 46;
    let small = [PAGE, 2 * PAGE, 3 * PAGE];
    for (huge, others) in [
        (0, [BEHIND, BEHIND + HUGE, 2 * BEHIND]),
        (1 << 44, [at(0, 0), at(64, 0), BEHIND]),
        (BEHIND, [at(0, 0), at(64, 0), at(640, 0)]),
    ] {
        let mut bed = Testbed::new(context)?;
        for (iova, size) in others.into_iter().zip(small) {
            bed.must(Op::map(iova, size, Protection::READ_WRITE))?;
            bed.must(command(0, Opcode::Pin, iova..iova + PAGE))?;
        }
        bed.must(Op::Map { iova: huge, size: HUGE, backed: PAGE, flags: RW })?;
        for _ in 0..2 {
            bed.refused(Errno::EINVAL, Op::Start)?;
            for (iova, size) in others.into_iter().zip(small) {
                bed.refused(Errno::EINVAL, Op::get_bitmap(iova, size))?;
            }
        }
        bed.must(Op::unmap(huge, HUGE))?;
        bed.must(command(0, Opcode::DmaWrite, others[1] + PAGE..others[1] + PAGE + 1))?;
        bed.start()?;
        let dirty = bed.read_each()?;
        ensure!(dirty == others.map(|iova| iova..iova + PAGE), "dirty is {dirty:x?}");
        bed.check_counters()?;
    }
    Ok(())
}

fn read(context: &Context<'_>) -> Result<()> {
    let mut bed = bed(context)?;
    bed.start()?;
    for _ in 0..2 {
        write_each(&mut bed)?;
        bed.reports(&WRITTEN_OR_PINNED)?;
        bed.reports(&PINNED_RUNS)?;
    }
    bed.check()
}

fn read_some(context: &Context<'_>) -> Result<()> {
    let mut bed = bed(context)?;
    bed.start()?;
    write_each(&mut bed)?;
    bed.must(Op::get_bitmap(at(128, 0), (320 - 128) * PAGE))?;
    bed.reports(&[0..1, 3..4, 64..65, 70..71, 129..130, 200..201, 448..449, 511..512, 640..641])?;
    bed.reports(&PINNED_RUNS)?;
    bed.check()
}

fn read_holes(context: &Context<'_>) -> Result<()> {
    // Bitmaps of so few pages lie side by side in the kernel's memory.
    const MAPPINGS: u64 = 64;
    let iova = |mapping: u64| (1 << 40) + mapping * (1 << 30);
    let mut bed = Testbed::with_pages(context, 1)?;
    for i in 0..MAPPINGS {
        bed.must(Op::Map { iova: iova(i), size: 64 * PAGE, backed: PAGE, flags: RW })?;
    }
    bed.start()?;
    for _ in 0..2 {
        for i in 0..MAPPINGS {
            bed.must(command(0, Opcode::DmaWrite, iova(i)..iova(i) + PAGE))?;
        }
        for i in 0..MAPPINGS {
            bed.must(Op::get_bitmap(iova(i), (64 + 1024) * PAGE))?;
        }
    }
    bed.check_counters()
}

fn unmap_dirty(context: &Context<'_>) -> Result<()> {
    let mut bed = bed(context)?;
    bed.start()?;
    write_each(&mut bed)?;
    bed.unmap_reports(0..704, &WRITTEN_OR_PINNED)?;
    bed.has_pins(0)?;
    bed.check()
}

fn unmap_some(context: &Context<'_>) -> Result<()> {
    let mut bed = bed(context)?;
    bed.start()?;
    write_each(&mut bed)?;
    bed.unmap_reports(64..256, &[64..65, 70..71, 128..130, 192..193, 200..201])?;
    bed.has_pins(3)?;
    bed.reports(&[0..1, 3..4, 256..257, 448..449, 511..512, 640..641])?;
    bed.unmap(256..512)?;
    bed.has_pins(2)?;
    bed.reports(&[3..4, 640..641])?;
    bed.check()
}

fn unmap_all(context: &Context<'_>) -> Result<()> {
    let mut bed = bed(context)?;
    bed.add_device()?;
    for page in PINNED {
        bed.must(command(1, Opcode::Pin, pages(page..page + 1)))?;
    }
    bed.start()?;
    bed.must(Op::unmap_all())?;
    bed.has_pins(0)?;
    bed.must(map(0..64, Protection::READ_WRITE))?;
    bed.reports(&[])?;
    bed.check()
}

fn close(context: &Context<'_>) -> Result<()> {
    let mut bed = bed(context)?;
    bed.start()?;
    bed.reports(&PINNED_RUNS)?;
    bed.must(Op::Close { device: 0 })?;
    bed.reports(&PINNED_RUNS)?;
    bed.reports(&[])?;
    bed.check()
}
