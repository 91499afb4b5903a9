// SPDX-License-Identifier: GPL-2.0-only

//! Type1's first version, `VFIO_TYPE1_IOMMU`, which unmaps what begins in a range, all of it, and nothing
//! if the range begins inside of a mapping.

use anyhow::{Result, ensure};
use dirty_model::Errno;
use harness::{Context, Failure, Scenario, scenario};
use mdev_dma::MdevDma;
use std::{ops::Range, sync::Arc};
use testbed::{
    PAGE, at,
    fixture::{refused, succeeded},
    same, status,
};
use vfio_client::{
    BitmapArgs, Container, Group, MapArgs, Memory, UnmapArgs,
    uapi::{
        VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_DMA_UNMAP_FLAG_ALL, VFIO_TYPE1_IOMMU,
    },
};

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "type1/v1/unmap",
        "v1 unmaps all of a mapping from its begin on, and from inside nothing",
        unmap,
    ),
    scenario(
        "type1/v1/unmap-dirty",
        "v1 refuses an UNMAP with bitmap, and writes nothing, however small the buffer",
        unmap_dirty,
    ),
    scenario("type1/v1/pin", "v1 refuses pins, and serves vfio_dma_rw()", pin),
];

/// A container of v1 with two mappings of 100 pages, with a hole between them.
struct V1 {
    device: MdevDma,
    container: Arc<Container>,
    memory: Arc<Memory>,
}

const MAPPINGS: [Range<u64>; 2] = [0..100, 120..220];

impl V1 {
    fn new(context: &Context<'_>) -> Result<Self> {
        let node = context.device(0)?.node()?;
        let container = Container::with_iommu(Group::open(&node)?, VFIO_TYPE1_IOMMU)?;
        let device = MdevDma::open(&container, &node)?;
        let this = Self { device, container, memory: Arc::new(Memory::new(220 * PAGE as usize)?) };
        this.map()?;
        Ok(this)
    }

    /// Maps what isn't mapped any more.
    fn map(&self) -> Result<()> {
        for pages in MAPPINGS {
            let args = MapArgs {
                memory: &self.memory,
                offset: (pages.start * PAGE) as usize,
                iova: at(pages.start, 0),
                size: 100 * PAGE,
                flags: VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
                argsz: None,
            };
            let mapped = status(self.container.map(&args))?;
            ensure!(mapped.is_ok() || mapped == Err(Errno::EEXIST), "MAP of {pages:?}: {mapped:?}");
        }
        self.has(&MAPPINGS)
    }

    /// Unmaps `pages`, which is to end with so many pages unmapped.
    fn unmap(&self, pages: Range<u64>, expected: u64) -> Result<()> {
        let size = (pages.end - pages.start) * PAGE;
        let args = UnmapArgs { iova: at(pages.start, 0), size, ..Default::default() };
        let what = format!("bytes unmapped by UNMAP of {pages:?}");
        same(&what, expected * PAGE, self.container.unmap(&args)?)
    }

    /// Fails unless these are mapped, and no other.
    fn has(&self, mappings: &[Range<u64>]) -> Result<()> {
        for pages in MAPPINGS {
            for page in [pages.start, pages.end - 1] {
                let read = self.device.dma_read(at(page, 0), PAGE)?;
                if mappings.contains(&pages) {
                    succeeded("DMA_READ", read)?;
                } else {
                    refused("DMA_READ", Errno::EINVAL, read)?;
                }
            }
        }
        let avail = self.container.info()?.dma_avail.unwrap_or(0);
        let all = u64::from(u16::MAX);
        same("dma_avail", all - mappings.len() as u64, avail.into())
    }
}

fn unmap(context: &Context<'_>) -> Result<()> {
    let v1 = V1::new(context)?;
    let [first, second] = MAPPINGS;
    for (pages, unmapped, left) in [
        // From the begin of one, a part.
        (0..1, 100, vec![second.clone()]),
        (0..99, 100, vec![second.clone()]),
        (120..121, 100, vec![first.clone()]),
        // From before it.
        (110..121, 100, vec![first.clone()]),
        // Over both, with a part of the second.
        (0..121, 200, vec![]),
        (0..300, 200, vec![]),
        // From inside, even if another one follows.
        (1..2, 0, MAPPINGS.to_vec()),
        (99..100, 0, MAPPINGS.to_vec()),
        (99..220, 0, MAPPINGS.to_vec()),
        (219..300, 0, MAPPINGS.to_vec()),
        // Where nothing is.
        (100..120, 0, MAPPINGS.to_vec()),
        (220..221, 0, MAPPINGS.to_vec()),
    ] {
        v1.unmap(pages, unmapped)?;
        v1.has(&left)?;
        v1.map()?;
    }
    for (size, iova) in [(0, at(0, 0)), (PAGE / 2, at(0, 0)), (PAGE, at(0, 8))] {
        let args = UnmapArgs { iova, size, ..Default::default() };
        let answer = status(v1.container.unmap(&args))?;
        ensure!(answer == Err(Errno::EINVAL), "UNMAP of {size:#x} bytes: {answer:?}");
    }
    let all = UnmapArgs { flags: VFIO_DMA_UNMAP_FLAG_ALL, ..Default::default() };
    same("bytes unmapped by UNMAP of all", 200 * PAGE, v1.container.unmap(&all)?)?;
    v1.has(&[])
}

fn unmap_dirty(context: &Context<'_>) -> Result<()> {
    // The bitmap of the range may have a word less than that of the mapping, all of which is unmapped.
    const OFFSET: usize = 64;
    let v1 = V1::new(context)?;
    let start = status(v1.container.dirty_start())?;
    let untouched = [0xa5; PAGE as usize];
    let memory = Memory::new(PAGE as usize)?;
    memory.write(0, &untouched);
    for pages in [1, 64, 100] {
        let unmap = UnmapArgs { iova: at(0, 0), size: pages * PAGE, ..Default::default() };
        let bitmap = BitmapArgs { pgsize: PAGE, size: pages.div_ceil(64) * 8 };
        let answer = status(v1.container.unmap_dirty_into(&unmap, &bitmap, &memory, OFFSET))?;
        let end = OFFSET + bitmap.size as usize;
        let beyond = memory.first_difference(end, &untouched[end..]);
        Failure::unless_none(beyond.map(|at| {
            format!(
                "UNMAP of {pages} pages writes {at} bytes beyond the bitmap that has room for them"
            )
        }))?;
        let written = memory.first_difference(0, &untouched);
        ensure!(written.is_none(), "UNMAP with bitmap wrote at {written:x?} of a page");
        ensure!(answer == Err(Errno::EINVAL), "UNMAP of {pages} pages with bitmap: {answer:?}");
        v1.has(&MAPPINGS)?;
    }
    ensure!(start == Err(Errno::EACCES), "START: {start:?}");
    Ok(())
}

fn pin(context: &Context<'_>) -> Result<()> {
    let v1 = V1::new(context)?;
    refused("PIN", Errno::EACCES, v1.device.pin(at(0, 0), PAGE)?)?;
    refused("PIN", Errno::EACCES, v1.device.pin(at(110, 0), PAGE)?)?;
    same("PINS", 0, v1.device.pins()?)?;
    succeeded("DMA_WRITE", v1.device.dma_write(at(3, 5), 2 * PAGE, 1)?)?;
    refused("DMA_WRITE", Errno::EINVAL, v1.device.dma_write(at(119, 0), 2 * PAGE, 1)?)?;
    v1.unmap(0..1, 100)?;
    v1.has(&MAPPINGS[1..])
}
