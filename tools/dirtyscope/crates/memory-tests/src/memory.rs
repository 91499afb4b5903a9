// SPDX-License-Identifier: GPL-2.0-only

//! What is mapped isn't always anonymous memory that stays: files, huge pages, memory that is mapped
//! twice, and memory that is replaced or taken away while devices have it pinned.

use crate::process::edu;
use anyhow::{Context as _, Result, ensure};
use dirty_model::Errno;
use harness::{
    Context, HUGE_PAGE, HugePages, Scenario, in_file, locked_memory, pages_pinned, scenario,
};
use mdev_dma::pattern;
use rustix::fs::{FallocateFlags, fallocate};
use std::{fs::File, ops::Range, os::unix::fs::FileExt};
use testbed::{
    PAGE, at,
    fixture::{Fixture, refused, succeeded},
    same,
};
use vfio_client::{
    Group, MapArgs, Memory,
    uapi::{VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE},
};

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "type1/memory/mapped-twice",
        "of memory that is mapped twice, what a device pins or writes is dirty where it did so",
        mapped_twice,
    ),
    scenario(
        "type1/memory/file",
        "what devices write to the mapped memory of a file is in the file, and dirty",
        file,
    ),
    scenario(
        "type1/memory/dirty-for-the-kernel",
        "a page that could be written is dirty for the kernel once it is unpinned, one that could only be read isn't",
        dirty_for_the_kernel,
    ),
    scenario(
        "type1/memory/huge-pages",
        "pages of 4 KiB in huge pages are pinned and dirty each by itself, and huge pages are free again",
        huge_pages,
    ),
    scenario(
        "type1/memory/huge-pages-closed",
        "huge pages are free again after a close with pins held",
        huge_pages_closed,
    ),
    scenario(
        "type1/memory/replaced",
        "pins stay good for the old memory when other memory is mapped there, all else gets the new",
        replaced,
    ),
    scenario(
        "type1/memory/discarded",
        "so they do when memory is dropped by MADV_DONTNEED",
        discarded,
    ),
    scenario("type1/memory/punched", "so they do when a hole is punched in the file", punched),
    scenario(
        "type1/memory/removed",
        "so they do when memory is unmapped from the process, and all else faults",
        removed,
    ),
];

/// What devices write.
const SEED: u64 = 0x5eed;

/// The commands of a fixture's device, on pages.
struct On<'a>(&'a Fixture);

fn bytes(pages: &Range<u64>) -> (u64, u64) {
    (at(pages.start, 0), (pages.end - pages.start) * PAGE)
}

impl On<'_> {
    fn write(&self, pages: Range<u64>) -> Result<()> {
        let (iova, length) = bytes(&pages);
        succeeded("WRITE", self.0.device().write_pinned(iova, length, SEED)?)
    }

    fn dma_write(&self, pages: Range<u64>) -> Result<()> {
        let (iova, length) = bytes(&pages);
        succeeded("DMA_WRITE", self.0.device().dma_write(iova, length, SEED)?)
    }

    fn unpin(&self, pages: Range<u64>) -> Result<()> {
        let (iova, length) = bytes(&pages);
        succeeded("UNPIN", self.0.device().unpin(iova, length)?)
    }

    /// Reads through pins, which must be what the device has written, or else what is in the memory
    /// now.
    fn read_is(&self, what: &str, pages: Range<u64>, written: bool) -> Result<()> {
        let (iova, length) = bytes(&pages);
        let read = self.0.device().read_pinned(iova, length)?;
        succeeded("READ", read)?;
        let mut expected = vec![0; length as usize];
        if written {
            pattern::fill(&mut expected, SEED, iova);
        }
        same(&format!("the digest of {what}"), pattern::digest(&expected, iova), read.digest)
    }

    /// Fails unless of the memory, which is mapped from page 0 on, these pages have what the device
    /// writes, and the others are zero.
    fn has_written(&self, pages: &[Range<u64>]) -> Result<()> {
        for page in 0..self.0.memory.len() as u64 / PAGE {
            let mut expected = vec![0; PAGE as usize];
            if pages.iter().any(|run| run.contains(&page)) {
                pattern::fill(&mut expected, SEED, at(page, 0));
            }
            let differs = self.0.memory.first_difference((page * PAGE) as usize, &expected);
            ensure!(differs.is_none(), "page {page} differs at byte {differs:?}");
        }
        Ok(())
    }
}

/// What is locked and pinned, to be compared.
struct Held {
    locked: u64,
    pinned: u64,
}

impl Held {
    fn now() -> Result<Self> {
        Ok(Self { locked: locked_memory()?, pinned: pages_pinned()? })
    }

    /// Fails unless so many pages more are locked and pinned.
    fn more(&self, what: &str, pages: u64) -> Result<()> {
        same(&format!("VmLck {what}"), self.locked + pages * PAGE, locked_memory()?)?;
        same(&format!("pages pinned {what}"), self.pinned + pages, pages_pinned()?)
    }
}

fn mapped_twice(context: &Context<'_>) -> Result<()> {
    let fixture = Fixture::new(context, 16)?;
    let device = On(&fixture);
    fixture.map_at(0..16, 100)?;
    let held = Held::now()?;
    fixture.pin(2..4)?;
    fixture.container.dirty_start()?;
    fixture.pin(103..106)?;
    // Both have page 3, and each counts it.
    held.more("with 2 and 3 pages", 5)?;
    for _ in 0..2 {
        fixture.reports(0..16, &[2..4])?;
        fixture.reports(100..116, &[103..106])?;
    }
    device.write(2..4)?;
    device.dma_write(8..9)?;
    fixture.reports(0..16, &[2..4, 8..9])?;
    fixture.reports(100..116, &[103..106])?;
    device.has_written(&[2..4, 8..9])?;
    device.read_is("what was written there", 2..4, true)?;
    let (iova, length) = bytes(&(112..113));
    succeeded("DMA_WRITE", fixture.device().dma_write(iova, length, 7)?)?;
    let there = fixture.page(12);
    ensure!(pattern::matches(&there, 7, iova), "page 12 isn't what was written to page 112");
    fixture.reports(0..16, &[2..4])?;
    fixture.reports(100..116, &[103..106, 112..113])?;
    fixture.unmap(0..16)?;
    held.more("with the first one unmapped", 3)?;
    device.write(103..104)?;
    fixture.reports(100..116, &[103..106])?;
    device.unpin(103..106)?;
    held.more("with all unpinned", 0)
}

/// Fails unless page `page` of the file is what the device wrote there, or is zero.
fn file_has(file: &File, page: u64, written: bool) -> Result<()> {
    let mut found = vec![0; PAGE as usize];
    file.read_exact_at(&mut found, page * PAGE)?;
    let mut expected = vec![0; PAGE as usize];
    if written {
        pattern::fill(&mut expected, SEED, at(page, 0));
    }
    ensure!(found == expected, "page {page} of the file isn't as it was written");
    Ok(())
}

fn file(context: &Context<'_>) -> Result<()> {
    let (file, memory) = in_file(16 * PAGE)?;
    let fixture = Fixture::with_memory(context.device(0)?, memory)?;
    let device = On(&fixture);
    fixture.map(0..16)?;
    let held = Held::now()?;
    fixture.container.dirty_start()?;
    fixture.pin(2..4)?;
    held.more("with 2 pages", 2)?;
    device.write(3..4)?;
    device.dma_write(7..9)?;
    for page in 0..16 {
        file_has(&file, page, [3, 7, 8].contains(&page))?;
    }
    // What others write to the file is not the device's doing, and it sees it.
    let mut page = vec![0; PAGE as usize];
    pattern::fill(&mut page, SEED, at(2, 0));
    file.write_all_at(&page, 2 * PAGE)?;
    device.read_is("what was written to the file", 2..4, true)?;
    file.write_all_at(&page, 12 * PAGE)?;
    fixture.reports(0..16, &[2..4, 7..9])?;
    fixture.reports(0..16, &[2..4])?;
    drop(fixture);
    held.more("after everything was closed", 0)?;
    file_has(&file, 3, true)
}

/// The last and the first page of two huge pages.
const SEAM: Range<u64> = HUGE_PAGE / PAGE - 1..HUGE_PAGE / PAGE + 1;

fn dirty_for_the_kernel(context: &Context<'_>) -> Result<()> {
    const PAGES: u64 = 8;
    let node = edu(context)?;
    for (by_iommu, flags, expected) in [
        (true, VFIO_DMA_MAP_FLAG_READ, 0),
        (true, VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE, PAGES),
        (false, VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE, PAGES),
    ] {
        let fixture = Fixture::with_small_pages(context, PAGES)?;
        let container = &fixture.container;
        if by_iommu {
            container.attach(Group::open(&node)?)?;
        }
        same("pages that are dirty", 0, fixture.dirty_for_the_kernel()?)?;
        container.map(&MapArgs { flags, ..fixture.mapping(0..PAGES, 0) })?;
        if !by_iommu {
            fixture.pin(0..PAGES)?;
        }
        fixture.unmap(0..PAGES)?;
        same("pages that are dirty", expected, fixture.dirty_for_the_kernel()?)?;
    }
    Ok(())
}

fn huge_pages(context: &Context<'_>) -> Result<()> {
    let (mut huge, memory) = HugePages::new()?;
    let fixture = Fixture::with_memory(context.device(0)?, memory)?;
    let device = On(&fixture);
    let all = 0..2 * HUGE_PAGE / PAGE;
    fixture.map(all.clone())?;
    let held = Held::now()?;
    fixture.container.dirty_start()?;
    fixture.pin(SEAM)?;
    held.more("with 2 pages", 2)?;
    huge.used("with a page of each", 2)?;
    fixture.pin(100..200)?;
    held.more("with 102 pages", 102)?;
    device.write(SEAM)?;
    device.write(150..160)?;
    device.dma_write(300..303)?;
    fixture.reports(all.clone(), &[100..200, 300..303, SEAM])?;
    device.unpin(100..200)?;
    fixture.reports(all.clone(), &[100..200, SEAM])?;
    fixture.reports(all, &[SEAM])?;
    device.has_written(&[150..160, 300..303, SEAM])?;
    file_has(huge.file()?, SEAM.start, true)?;
    // The process gives it back, and so does the file; the device has not.
    fixture.memory.remove(0..fixture.memory.len())?;
    huge.close();
    huge.used("with a page of each pinned", 2)?;
    device.read_is("what it wrote", SEAM, true)?;
    device.unpin(SEAM.start..SEAM.start + 1)?;
    huge.used("with a page of one pinned", 1)?;
    device.unpin(SEAM.start + 1..SEAM.end)?;
    huge.used("with nothing pinned", 0)?;
    held.more("with nothing pinned", 0)
}

fn huge_pages_closed(context: &Context<'_>) -> Result<()> {
    let (mut huge, memory) = HugePages::new()?;
    let held = Held::now()?;
    let fixture = Fixture::with_memory(context.device(0)?, memory)?;
    fixture.map(0..2 * HUGE_PAGE / PAGE)?;
    fixture.pin(0..300)?;
    fixture.pin(SEAM)?;
    fixture.container.dirty_start()?;
    held.more("with 302 pages", 302)?;
    huge.used("with pins", 2)?;
    fixture.memory.remove(0..fixture.memory.len())?;
    huge.close();
    huge.used("with pins of memory that the process hasn't any more", 2)?;
    drop(fixture);
    huge.used("after everything was closed", 0)?;
    held.more("after everything was closed", 0)
}

/// Has a fixture whose memory is filled, with pages 2 to 4 pinned and written through them, lose pages 2
/// to 6 by `take`, which leaves zeroes there.
fn loses_pages(
    fixture: &Fixture,
    take: impl FnOnce(&Memory, Range<usize>) -> Result<()>,
) -> Result<()> {
    let device = On(fixture);
    fixture.map(0..8)?;
    let held = Held::now()?;
    device.dma_write(0..8)?;
    fixture.pin(2..4)?;
    fixture.container.dirty_start()?;
    take(&fixture.memory, 2 * PAGE as usize..6 * PAGE as usize)?;
    held.more("with 2 pages that the process hasn't any more", 2)?;

    // The device has the old pages, and so has who pins once more.
    device.read_is("the old pages", 2..4, true)?;
    fixture.pin(2..4)?;
    held.more("with the same pinned twice", 2)?;
    device.write(2..4)?;
    device.has_written(&[0..2, 6..8])?;
    device.dma_write(5..6)?;
    device.has_written(&[0..2, 5..8])?;
    fixture.reports(0..8, &[2..4, 5..6])?;
    // Others get the new ones.
    fixture.pin(4..5)?;
    device.read_is("a new page", 4..5, false)?;
    device.write(4..5)?;
    device.has_written(&[0..2, 4..8])?;
    held.more("with an old page and a new one", 3)?;
    device.unpin(2..4)?;
    device.unpin(2..4)?;
    held.more("with the new one", 1)?;
    fixture.reports(0..8, &[2..5])?;
    fixture.pin(2..3)?;
    device.read_is("a page that is new now", 2..3, false)?;
    device.write(2..3)?;
    device.has_written(&[0..3, 4..8])?;
    fixture.reports(0..8, &[2..3, 4..5])?;
    // What is unmapped with pins is given back.
    fixture.unmap(0..8)?;
    same("PINS", 0, fixture.device().pins()?)?;
    held.more("with everything unmapped", 0)
}

fn replaced(context: &Context<'_>) -> Result<()> {
    let fixture = Fixture::without_mapping(context, 0, 8)?;
    loses_pages(&fixture, |memory, bytes| Ok(memory.replace(bytes)?))
}

fn discarded(context: &Context<'_>) -> Result<()> {
    let fixture = Fixture::without_mapping(context, 0, 8)?;
    loses_pages(&fixture, |memory, bytes| Ok(memory.discard(bytes)?))
}

fn punched(context: &Context<'_>) -> Result<()> {
    let (file, memory) = in_file(8 * PAGE)?;
    let fixture = Fixture::with_memory(context.device(0)?, memory)?;
    loses_pages(&fixture, |_, bytes| {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&file, flags, bytes.start as u64, bytes.len() as u64).context("fallocate")
    })?;
    file_has(&file, 2, true)?;
    file_has(&file, 3, false)
}

fn removed(context: &Context<'_>) -> Result<()> {
    for closes in [false, true] {
        let fixture = Fixture::new(context, 8)?;
        let device = On(&fixture);
        let held = Held::now()?;
        fixture.pin(2..4)?;
        device.write(2..4)?;
        fixture.container.dirty_start()?;
        fixture.memory.remove(2 * PAGE as usize..6 * PAGE as usize)?;
        let commands = fixture.device();
        for page in [2, 4] {
            let what = format!("of page {page}, which is gone");
            let (read, write) =
                (commands.dma_read(at(page, 0), 8)?, commands.dma_write(at(page, 0), 8, SEED)?);
            refused(&format!("DMA_READ {what}"), Errno::EFAULT, read)?;
            refused(&format!("DMA_WRITE {what}"), Errno::EFAULT, write)?;
        }
        refused("PIN of page 4, which is gone", Errno::EFAULT, commands.pin(at(4, 0), PAGE)?)?;
        fixture.pin(2..3)?;
        device.unpin(2..3)?;
        device.read_is("the old pages", 2..4, true)?;
        device.write(2..4)?;
        fixture.reports(0..8, &[2..4])?;
        held.more("with 2 pages that are gone", 2)?;
        device.unpin(2..3)?;
        refused("PIN of page 2, which is gone", Errno::EFAULT, commands.pin(at(2, 0), PAGE)?)?;
        fixture.reports(0..8, &[2..4])?;
        fixture.reports(0..8, &[3..4])?;
        held.more("with 1 page that is gone", 1)?;
        if closes {
            drop(fixture);
        } else {
            fixture.unmap(0..8)?;
            same("PINS", 0, fixture.device().pins()?)?;
        }
        held.more("with nothing pinned", 0)?;
    }
    Ok(())
}
