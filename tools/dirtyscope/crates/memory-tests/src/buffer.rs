// SPDX-License-Identifier: GPL-2.0-only

//! Buffers of the user that aren't as usual: for bitmaps, and for what GET_INFO says.

use anyhow::{Context as _, Result, ensure};
use dirty_model::{Bitmap, Errno};
use harness::{Context, Failure, Scenario, Shows, Signature, defect, scenario};
use testbed::{
    PAGE, at,
    fixture::{Fixture, is_dirty, succeeded},
    same, status,
};
use vfio_client::{
    Access, BitmapArgs, Container, Group, Memory, UnmapArgs,
    uapi::{
        VFIO_IOMMU_INFO_CAPS, VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE,
        VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION, VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL,
    },
};

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "type1/buffer/dirty",
        "a bitmap buffer that isn't zeroed hides no dirty page, and is left alone behind the bitmap",
        dirty,
    ),
    scenario(
        "type1/buffer/unaligned",
        "a bitmap buffer may be at any address, and bytes beside it are left alone",
        unaligned,
    ),
    scenario(
        "type1/buffer/kernel-space",
        "a bitmap buffer at an address of the kernel is refused, and nothing is forgotten",
        kernel_space,
    ),
    scenario(
        "type1/buffer/info",
        "what GET_INFO gives back is what it says, zero, or what was there before",
        info,
    ),
    scenario("type1/buffer/info-iommu", "so it is with what an IOMMU can map", info_iommu),
    defect(
        "type1/defect/D6-shift-dirty-buffer",
        "what was in a buffer that wasn't zeroed isn't in the next bitmap",
        dirty_then_clean,
        Signature {
            defect: "D6",
            shows: Shows::Difference {
                what: "pages 0..160: the bitmap is wrong",
                lost: &[],
                spurious: &[(at(90, 0), at(128, 0))],
            },
            complaints: &[],
        },
    ),
    defect(
        "type1/defect/D6-shift-fault-dirty-buffer",
        "nor is it if the buffer can't be written",
        dirty_then_fault,
        Signature {
            defect: "D6",
            shows: Shows::Difference {
                what: "pages 0..160: the bitmap is wrong",
                lost: &[],
                spurious: &[(at(70, 0), at(128, 0))],
            },
            complaints: &[],
        },
    ),
];

/// Pages of the range that these scenarios read, and the bytes of its bitmap.
const PAGES: u64 = 160;
const BYTES: usize = 24;
const ARGS: BitmapArgs = BitmapArgs { pgsize: PAGE, size: BYTES as u64 };

/// A fixture with three mappings, the second behind a hole, at an odd place of a bitmap; with a page of
/// each dirty, the last one because it is pinned. The second one has enough pages behind its dirty one
/// for the stock kernel: see the module `map` of type1-tests.
fn three_mappings(context: &Context<'_>) -> Result<Fixture> {
    let fixture = Fixture::without_mapping(context, 0, PAGES)?;
    for pages in [0..64, 70..90, 128..160] {
        fixture.map(pages)?;
    }
    fixture.container.dirty_start()?;
    for page in [3, 71] {
        let written = fixture.device().dma_write(at(page, 0), PAGE, page)?;
        succeeded("DMA_WRITE", written)?;
    }
    fixture.pin(130..131)?;
    Ok(fixture)
}

/// Memory for a bitmap, full of ones.
fn ones() -> Result<Memory> {
    let memory = Memory::new(PAGE as usize)?;
    memory.write(0, &[0xff; PAGE as usize]);
    Ok(memory)
}

/// Reads into `memory` at `offset`, and takes the bitmap from there.
fn read_into(fixture: &Fixture, memory: &Memory, offset: usize) -> Result<Bitmap> {
    let (iova, size) = (at(0, 0), PAGES * PAGE);
    fixture.container.dirty_bitmap_into(iova, size, &ARGS, memory, offset)?;
    Ok(bitmap_at(memory, offset))
}

fn bitmap_at(memory: &Memory, offset: usize) -> Bitmap {
    let mut bytes = [0; BYTES];
    memory.read(offset, &mut bytes);
    let word = |word: &[u8]| word.try_into().map_or(0, u64::from_ne_bytes);
    Bitmap::from_words(bytes.chunks_exact(8).map(word).collect(), PAGES)
}

/// Fails unless all bytes but `BYTES` at `offset` are `fill`.
fn left_alone(memory: &Memory, offset: usize, fill: u8) -> Result<()> {
    let mut bytes = vec![0; memory.len()];
    memory.read(0, &mut bytes);
    let beside = (0..offset).chain(offset + BYTES..bytes.len());
    let written = beside.into_iter().find(|&at| bytes[at] != fill);
    Failure::unless_none(written.map(|at| {
        format!("a bitmap at byte {offset} of a page: byte {at} is {:#04x} now", bytes[at])
    }))
}

fn dirty(context: &Context<'_>) -> Result<()> {
    let fixture = three_mappings(context)?;
    let memory = ones()?;
    let found = read_into(&fixture, &memory, 64)?;
    left_alone(&memory, 64, 0xff)?;
    // In words that a mapping doesn't share, there is what is dirty of it.
    is_dirty(&(0..64), &part(&found, 0..64), &[3..4])?;
    is_dirty(&(128..160), &part(&found, 128..160), &[130..131])?;
    ensure!(found.get(71), "page 71 is lost");
    Ok(())
}

/// Some pages of a bitmap, by themselves.
fn part(bitmap: &Bitmap, pages: std::ops::Range<u64>) -> Bitmap {
    let mut part = Bitmap::new(pages.end - pages.start);
    for page in pages.clone().filter(|&page| bitmap.get(page)) {
        part.set(page - pages.start..page - pages.start + 1);
    }
    part
}

fn dirty_then_clean(context: &Context<'_>) -> Result<()> {
    let fixture = three_mappings(context)?;
    read_into(&fixture, &ones()?, 0)?;
    fixture.reports(0..PAGES, &[130..131])
}

fn dirty_then_fault(context: &Context<'_>) -> Result<()> {
    let fixture = Fixture::without_mapping(context, 0, PAGES)?;
    // The first one to be copied is at an odd place.
    for pages in [70..90, 128..160] {
        fixture.map(pages)?;
    }
    fixture.container.dirty_start()?;
    let memory = ones()?;
    memory.set_access(0..memory.len(), Access::Read)?;
    let (iova, size) = (at(0, 0), PAGES * PAGE);
    let read = status(fixture.container.dirty_bitmap_into(iova, size, &ARGS, &memory, 0))?;
    ensure!(read == Err(Errno::EFAULT), "GET_BITMAP into memory that can only be read: {read:?}");
    fixture.reports(0..PAGES, &[])
}

fn unaligned(context: &Context<'_>) -> Result<()> {
    for offset in [1, 4, 7, 8 * 17 + 3, PAGE as usize - BYTES] {
        let fixture = three_mappings(context)?;
        let memory = Memory::new(PAGE as usize)?;
        let found = read_into(&fixture, &memory, offset)?;
        is_dirty(&(0..PAGES), &found, &[3..4, 71..72, 130..131])?;
        left_alone(&memory, offset, 0)?;
        let memory = Memory::new(PAGE as usize)?;
        let unmap = UnmapArgs { iova: at(0, 0), size: PAGES * PAGE, ..Default::default() };
        let size = fixture.container.unmap_dirty_into(&unmap, &ARGS, &memory, offset)?;
        same("bytes unmapped", 116 * PAGE, size)?;
        is_dirty(&(0..PAGES), &bitmap_at(&memory, offset), &[130..131])?;
        left_alone(&memory, offset, 0)?;
    }
    Ok(())
}

fn kernel_space(context: &Context<'_>) -> Result<()> {
    let fixture = three_mappings(context)?;
    let (iova, size) = (at(0, 0), PAGES * PAGE);
    let unmap = UnmapArgs { iova, size, ..Default::default() };
    // No address at all, the kernel's memory, its code, and where an address and a size overflow.
    for address in [1 << 63, 0xffff_8880_0000_0000, 0xffff_ffff_8100_0000, u64::MAX - 7] {
        for (what, answer) in [
            (
                "GET_BITMAP",
                status(fixture.container.dirty_bitmap_into_kernel(iova, size, &ARGS, address))?,
            ),
            (
                "UNMAP",
                status(
                    fixture.container.unmap_dirty_into_kernel(&unmap, &ARGS, address).map(drop),
                )?,
            ),
        ] {
            ensure!(
                answer == Err(Errno::EINVAL) || answer == Err(Errno::EFAULT),
                "{what} into {address:#x}: {answer:?}"
            );
        }
    }
    same("PINS", 1, fixture.device().pins()?)?;
    fixture.reports(0..PAGES, &[3..4, 71..72, 130..131])?;
    fixture.reports(0..PAGES, &[130..131])
}

/// The bytes that `VFIO_IOMMU_GET_INFO` gives a meaning to, without capabilities.
const HEAD: usize = 20;

fn info(context: &Context<'_>) -> Result<()> {
    info_of(&Fixture::new(context, 16)?.container)
}

fn info_iommu(context: &Context<'_>) -> Result<()> {
    let edu = &context.edus()?.singles[0];
    edu.bind("vfio-pci")?;
    let fixture = Fixture::new(context, 16)?;
    fixture.container.attach(Group::open(&edu.node()?)?)?;
    let ranges = fixture.container.info()?.iova_ranges;
    ensure!(ranges.is_some(), "GET_INFO doesn't say what the IOMMU can map");
    info_of(&fixture.container)
}

fn info_of(container: &Container) -> Result<()> {
    let needed = number(&container.info_bytes(24, 0)?, 0)? as usize;
    ensure!((24..4096).contains(&needed), "GET_INFO needs {needed} bytes");
    for argsz in [16, 20, 23, 24, 25, needed - 1, needed, needed + 1, 4096] {
        for fill in [0x5a, 0xa5, 0xff] {
            let bytes = container.info_bytes(argsz as u32, fill)?;
            let meant = meant(&bytes, argsz, needed)
                .with_context(|| format!("GET_INFO with argsz {argsz}"))?;
            let strange = (0..bytes.len()).find(|&at| {
                let may_be_zero = at < argsz && at < needed;
                !meant[at] && bytes[at] != fill && !(may_be_zero && bytes[at] == 0)
            });
            Failure::unless_none(strange.map(|at| {
                format!("GET_INFO with argsz {argsz}: byte {at} is {:#04x}", bytes[at])
            }))?;
        }
    }
    Ok(())
}

/// Which bytes have a meaning.
fn meant(bytes: &[u8], argsz: usize, needed: usize) -> Result<Vec<bool>> {
    let mut meant = vec![false; bytes.len()];
    let mut mean = |at: usize, size: usize| meant[at..at + size].fill(true);
    mean(0, HEAD.min(argsz));
    same("the argsz that comes back", needed.max(argsz) as u64, number(bytes, 0)?.into())?;
    if argsz < needed || number(bytes, 4)? & VFIO_IOMMU_INFO_CAPS == 0 {
        return Ok(meant);
    }
    let mut at = number(bytes, 16)? as usize;
    while at != 0 {
        // struct vfio_info_cap_header { __u16 id; __u16 version; __u32 next; }
        let id = number(bytes, at)?;
        same("the version of a capability", 1, (id >> 16).into())?;
        mean(at, 8);
        match id & 0xffff {
            VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION => {
                same("the flags of the capability", 0, number(bytes, at + 8)?.into())?;
                mean(at + 16, 16);
            }
            VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL => mean(at + 8, 4),
            VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE => {
                mean(at + 8, 4);
                mean(at + 16, 16 * number(bytes, at + 8)? as usize);
            }
            id => anyhow::bail!("there is a capability {id}"),
        }
        at = number(bytes, at + 4)? as usize;
    }
    Ok(meant)
}

/// The `__u32` at `at`.
fn number(bytes: &[u8], at: usize) -> Result<u32> {
    let four = bytes.get(at..).and_then(|rest| rest.first_chunk());
    Ok(u32::from_ne_bytes(*four.with_context(|| format!("nothing at byte {at}"))?))
}
