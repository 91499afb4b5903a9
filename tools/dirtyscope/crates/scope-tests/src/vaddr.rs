// SPDX-License-Identifier: GPL-2.0-only

//! `VFIO_DMA_UNMAP_FLAG_VADDR` and `VFIO_DMA_MAP_FLAG_VADDR`: the process gives mappings another
//! address, which containers allow that have no device without an IOMMU.

use crate::{defect::shows_complaint, promotion::needs_driver};
use anyhow::{Context as _, Result, ensure};
use dirty_model::{BitmapBuffer, Errno};
use edu_client::Function;
use harness::{Context, Scenario, defect, locked_memory, locked_memory_of, scenario};
use mdev_dma::MdevDma;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::{
    fs::{self, File},
    sync::Arc,
};
use testbed::{PAGE, Rights, at, fixture::succeeded, same, status};
use vfio_client::{
    Access, BitmapArgs, Container, Group, Leave, MapArgs, Mapper, Memory, UnmapArgs,
    uapi::{
        VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_VADDR, VFIO_DMA_MAP_FLAG_WRITE,
        VFIO_DMA_UNMAP_FLAG_ALL, VFIO_DMA_UNMAP_FLAG_VADDR,
    },
};

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "type1/vaddr/update",
        "mappings lose their address and get another one, each once; meanwhile no group joins",
        update,
    ),
    scenario(
        "type1/vaddr/owner",
        "who gives a mapping its address locks its memory from then on, until it is unmapped or they die",
        owner,
    ),
    scenario(
        "type1/vaddr/limit-of-owner",
        "what is pinned of a mapping counts for who gave it its address last, and is limited as they are",
        limit_of_owner,
    ),
    defect(
        "type1/defect/D23-pin-without-vaddr",
        "a pin while a mapping has no address is EBUSY, and no reason to warn",
        pin_without_vaddr,
        shows_complaint("D23", &["WARNING: *vfio_iommu_type1.c:* at vfio_iommu_type1_pin_pages*"]),
    ),
];

/// Pages of the mappings, which are one file.
const FIRST: u64 = 8;
const SECOND: u64 = 2;
const PAGES: u64 = FIRST + SECOND;

/// Where the second one is.
const SECOND_PAGE: u64 = 64;

/// A container with one group, which has an IOMMU, and two mappings.
struct Mapped {
    container: Arc<Container>,
    file: File,
    old: Arc<Memory>,
}

impl Mapped {
    fn new(function: &Function, driver: &str) -> Result<Self> {
        function.bind(driver)?;
        let container = Container::new(Group::open(&function.node()?)?)?;
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).context("memfd_create")?);
        ftruncate(&file, PAGES * PAGE).context("ftruncate")?;
        let old = Arc::new(Memory::of_file(&file, (PAGES * PAGE) as usize)?);
        let this = Self { container, file, old };
        let flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;
        for (page, first, pages) in [(0, 0, FIRST), (SECOND_PAGE, FIRST, SECOND)] {
            let mapped = this.map(&this.old, page, first, pages, flags)?;
            ensure!(mapped == Ok(()), "MAP: {mapped:?}");
        }
        Ok(this)
    }

    /// Maps pages from number `first` on of a memory at `page`, or gives them that address.
    fn map(
        &self,
        memory: &Arc<Memory>,
        page: u64,
        first: u64,
        pages: u64,
        flags: u32,
    ) -> Result<Result<(), Errno>> {
        let (iova, size) = (at(page, 0), pages * PAGE);
        let offset = (first * PAGE) as usize;
        status(self.container.map(&MapArgs { memory, offset, iova, size, flags, argsz: None }))
    }

    fn update(&self, memory: &Arc<Memory>, page: u64, pages: u64) -> Result<Result<(), Errno>> {
        let first = if page == SECOND_PAGE { FIRST } else { 0 };
        self.map(memory, page, first, pages, VFIO_DMA_MAP_FLAG_VADDR)
    }

    /// Takes the address of mappings in so many pages, or of all. Returns how many bytes.
    fn invalidate(&self, page: u64, pages: u64) -> Result<Result<u64, Errno>> {
        let (iova, size) = (at(page, 0), pages * PAGE);
        let flags = VFIO_DMA_UNMAP_FLAG_VADDR;
        status(self.container.unmap(&UnmapArgs { iova, size, flags, argsz: None }))
    }

    fn invalidate_all(&self) -> Result<Result<u64, Errno>> {
        let flags = VFIO_DMA_UNMAP_FLAG_VADDR | VFIO_DMA_UNMAP_FLAG_ALL;
        status(self.container.unmap(&UnmapArgs { iova: 0, size: 0, flags, argsz: None }))
    }

    /// Fails unless all pages of the first mapping are dirty.
    fn all_is_dirty(&self) -> Result<()> {
        let BitmapBuffer { pgsize, size, .. } = BitmapBuffer::covering(FIRST * PAGE, PAGE);
        let args = BitmapArgs { pgsize, size };
        let words = self.container.dirty_bitmap(at(0, 0), FIRST * PAGE, &args)?;
        same("the bitmap", (1 << FIRST) - 1, words[0])
    }
}

/// Fails unless a call ended so.
fn is<T: std::fmt::Debug + PartialEq>(
    what: &str,
    expected: Result<T, Errno>,
    found: Result<T, Errno>,
) -> Result<()> {
    ensure!(found == expected, "{what}: {found:?}, not {expected:?}");
    Ok(())
}

fn update(context: &Context<'_>) -> Result<()> {
    let edus = context.edus()?;
    let bed = Mapped::new(&edus.singles[0], "vfio-pci")?;
    let new = Arc::new(Memory::of_file(&bed.file, (PAGES * PAGE) as usize)?);
    bed.container.dirty_start()?;
    bed.all_is_dirty()?;
    is("an update of what has an address", Err(Errno::EINVAL), bed.update(&new, 0, FIRST)?)?;
    is("an update of nothing", Err(Errno::ENOENT), bed.update(&new, 32, 1)?)?;

    is("half a mapping", Err(Errno::EINVAL), bed.invalidate(0, FIRST / 2)?)?;
    is("the first mapping", Ok(FIRST * PAGE), bed.invalidate(0, FIRST)?)?;
    is("the first mapping again", Err(Errno::EINVAL), bed.invalidate(0, FIRST)?)?;
    is("all, one of them again", Err(Errno::EINVAL), bed.invalidate_all()?)?;
    bed.all_is_dirty()?;
    edus.singles[1].bind("vfio-pci")?;
    for node in [edus.singles[1].node()?, context.device(0)?.node()?] {
        let joined = status(bed.container.attach(Group::open(&node)?))?;
        is("another group joins meanwhile", Err(Errno::EBUSY), joined)?;
    }
    // That of all changed nothing.
    let second = bed.update(&new, SECOND_PAGE, SECOND)?;
    is("an update of the second mapping", Err(Errno::EINVAL), second)?;
    is("an update of a part", Err(Errno::EINVAL), bed.update(&new, 0, FIRST - 1)?)?;
    is("an update", Ok(()), bed.update(&new, 0, FIRST)?)?;
    is("the update again", Err(Errno::EINVAL), bed.update(&new, 0, FIRST)?)?;

    is("all", Ok(PAGES * PAGE), bed.invalidate_all()?)?;
    is("an update", Ok(()), bed.update(&new, 0, FIRST)?)?;
    is("an update", Ok(()), bed.update(&new, SECOND_PAGE, SECOND)?)?;
    bed.all_is_dirty()?;

    is("the second mapping", Ok(SECOND * PAGE), bed.invalidate(SECOND_PAGE, SECOND)?)?;
    is("all, the second one again", Err(Errno::EINVAL), bed.invalidate_all()?)?;
    let first = bed.update(&new, 0, FIRST)?;
    is("an update of the first, which has its address back", Err(Errno::EINVAL), first)?;
    is("an update", Ok(()), bed.update(&new, SECOND_PAGE, SECOND)?)?;

    // A device without an IOMMU uses the address: at the old one the process has nothing any more.
    bed.old.set_access(0..(PAGES * PAGE) as usize, Access::None)?;
    let node = context.device(0)?.node()?;
    bed.container.attach(Group::open(&node)?)?;
    is("with a mediated device", Err(Errno::EBUSY), bed.invalidate_all()?)?;
    let device = MdevDma::open(&bed.container, &node)?;
    for page in [0, SECOND_PAGE] {
        let outcome = device.dma_write(at(page, 0), PAGE, 7)?;
        ensure!(outcome.status == 0, "DMA_WRITE at the new address: {outcome:?}");
    }
    let mut bytes = [0; 8];
    new.read((FIRST * PAGE) as usize, &mut bytes);
    ensure!(bytes != [0; 8], "the write is not in the file");
    Ok(())
}

fn owner(context: &Context<'_>) -> Result<()> {
    let before = locked_memory()?;
    let locks = |whose: &str, pages, found| same(&format!("VmLck of {whose}"), pages * PAGE, found);
    let ours = |pages| locks("this process", pages, locked_memory()? - before);
    let bed = Mapped::new(&context.edus()?.singles[0], "vfio-pci")?;
    ours(PAGES)?;
    is("all", Ok(PAGES * PAGE), bed.invalidate_all()?)?;
    ours(PAGES)?;
    let new = Arc::new(Memory::of_file(&bed.file, (PAGES * PAGE) as usize)?);
    let (iova, size, flags) = (at(0, 0), FIRST * PAGE, VFIO_DMA_MAP_FLAG_VADDR);
    let args = MapArgs { memory: &new, offset: 0, iova, size, flags, argsz: None };
    let mut child = Mapper::new(&bed.container, &[], &args)?;
    ours(SECOND)?;
    locks("the child", FIRST, locked_memory_of(child.pid())?)?;
    is("an update", Ok(()), bed.update(&new, SECOND_PAGE, SECOND)?)?;
    ours(SECOND)?;

    // It is the child's to lose, and to find back: nothing of it counts here.
    child.kill();
    is("the first mapping", Ok(size), bed.invalidate(0, FIRST)?)?;
    {
        let rights = Rights::now()?;
        rights.limit(Some(locked_memory()? + (FIRST - 1) * PAGE))?;
        let refused = bed.update(&new, 0, FIRST)?;
        is("an update by who may lock a page less", Err(Errno::ENOMEM), refused)?;
    }
    ours(SECOND)?;
    is("an update", Ok(()), bed.update(&new, 0, FIRST)?)?;
    ours(PAGES)?;
    let unmap = UnmapArgs { iova, size, ..Default::default() };
    is("an unmap", Ok(size), status(bed.container.unmap(&unmap))?)?;
    ours(SECOND)?;

    // Nobody waits for the address of what is gone.
    let (iova, size) = (at(SECOND_PAGE, 0), SECOND * PAGE);
    is("the second mapping", Ok(size), bed.invalidate(SECOND_PAGE, SECOND)?)?;
    let unmap = UnmapArgs { iova, size, ..Default::default() };
    is("an unmap", Ok(size), status(bed.container.unmap(&unmap))?)?;
    let joined = status(bed.container.attach(Group::open(&context.device(0)?.node()?)?))?;
    is("another group joins", Ok(()), joined)?;
    drop(bed);
    ours(0)
}

fn limit_of_owner(context: &Context<'_>) -> Result<()> {
    let before = locked_memory()?;
    let (function, mdev) = (&context.edus()?.singles[0], context.device(0)?.node()?);
    let bed = Mapped::new(function, "vfio-pci")?;
    is("all", Ok(PAGES * PAGE), bed.invalidate_all()?)?;
    let rights = Rights::now()?;
    rights.limit(Some(before + 2 * PAGES * PAGE))?;
    let new = Arc::new(Memory::of_file(&bed.file, (PAGES * PAGE) as usize)?);
    let (iova, size, flags) = (at(0, 0), FIRST * PAGE, VFIO_DMA_MAP_FLAG_VADDR);
    let args = MapArgs { memory: &new, offset: 0, iova, size, flags, argsz: None };
    let child = Mapper::new(&bed.container, &[], &args)?;
    is("an update", Ok(()), bed.update(&new, SECOND_PAGE, SECOND)?)?;

    // Without an IOMMU it is pins that count.
    bed.container.attach(Group::open(&mdev)?)?;
    bed.container.detach(function.node()?.group(), Leave::Unset)?;
    same("VmLck of the child", 0, locked_memory_of(child.pid())?)?;
    same("VmLck", before, locked_memory()?)?;
    rights.limit(Some(before))?;
    let device = MdevDma::open(&bed.container, &mdev)?;
    succeeded("PIN of the child's memory", device.pin(at(1, 0), 2 * PAGE)?)?;
    same("VmLck of the child with two pages pinned", 2 * PAGE, locked_memory_of(child.pid())?)?;
    same("VmLck with none of ours pinned", before, locked_memory()?)
}

fn pin_without_vaddr(context: &Context<'_>) -> Result<()> {
    needs_driver()?;
    // It warns once.
    let path = "/sys/kernel/debug/clear_warn_once";
    fs::write(path, "1").with_context(|| format!("write 1 to {path}"))?;
    let function = &context.edus()?.singles[0];
    let bed = Mapped::new(function, "rust_vfio_edu")?;
    let device = MdevDma::open(&bed.container, &function.node()?)?;
    is("the second mapping", Ok(SECOND * PAGE), bed.invalidate(SECOND_PAGE, SECOND)?)?;
    let outcome = device.pin(at(0, 0), PAGE)?;
    same("STATUS", Errno::EBUSY.0 as u64, outcome.status.into())?;
    is("an update", Ok(()), bed.update(&bed.old, SECOND_PAGE, SECOND)?)?;
    let outcome = device.pin(at(0, 0), PAGE)?;
    same("STATUS", 0, outcome.status.into())
}
