// SPDX-License-Identifier: GPL-2.0-only

//! Memory of a device, mapped for other devices: BAR 0 of an edu, which has no `struct page`, and the firmware,
//! which has, but is reserved.

use anyhow::{Context as _, Result, ensure};
use dirty_model::Errno;
use edu_client::Edu;
use harness::{Context, Scenario, Skip, locked_memory, pages_pinned, scenario};
use mdev_dma::pattern;
use std::{
    fs::{self, File},
    io::ErrorKind,
    sync::Arc,
};
use testbed::{
    PAGE, at,
    fixture::{Fixture, refused, succeeded},
    same, status,
};
use vfio_client::{
    Access, BitmapArgs, Container, DeviceNode, Group, Leave, MapArgs, Memory, RegionInfo,
    uapi::{
        VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_PCI_BAR0_REGION_INDEX,
        VFIO_PCI_CONFIG_REGION_INDEX,
    },
};

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "type1/region/emulated",
        "a device's memory can be mapped: PIN is EINVAL, vfio_dma_rw() gets at the device",
        emulated,
    ),
    scenario(
        "type1/region/iommu",
        "an IOMMU maps a device's memory, which isn't locked, for DMA from device to device",
        iommu,
    ),
    scenario(
        "type1/region/joins",
        "an IOMMU joins with a device's memory mapped, and leaves, with pins beside it",
        joins,
    ),
    scenario(
        "type1/region/within-memory",
        "of a mapping with a device's memory in its middle, what is beside it is locked and pinned, and no more",
        within_memory,
    ),
    scenario(
        "type1/region/read-only",
        "a device's memory that the process can only read isn't mapped for an IOMMU to write",
        read_only,
    ),
    scenario(
        "type1/region/reserved",
        "reserved memory, of the firmware, is pinned and mapped for an IOMMU, and isn't locked",
        reserved,
    ),
];

/// Pages of memory, which are mapped from page 0 on, and behind them the BAR.
const RAM: u64 = 16;
const BAR: u64 = RAM;

/// A register of edu of 8 bytes that keeps what is written: where DMA is to begin.
const SOURCE: u64 = 0x80;

/// An edu that is open in a container of its own, with its BAR, and beside it a container with a
/// mediated device, memory and that BAR.
struct Scene {
    fixture: Fixture,
    edu: Edu,
    bar: RegionInfo,
    /// The other edu, which may join.
    other: DeviceNode,
    locked: u64,
    pinned: u64,
}

impl Scene {
    fn new(context: &Context<'_>) -> Result<Self> {
        let edus = context.edus()?.singles;
        for edu in &edus {
            edu.bind("vfio-pci")?;
        }
        let (node, other) = (edus[0].node()?, edus[1].node()?);
        let edu = Edu::open(&Container::new(Group::open(&node)?)?, &node)?;
        let bar = edu.device().region_info(VFIO_PCI_BAR0_REGION_INDEX, None)?;
        let fixture = Fixture::new(context, RAM)?;
        let (locked, pinned) = (locked_memory()?, pages_pinned()?);
        Ok(Self { fixture, edu, bar, other, locked, pinned })
    }

    /// Maps the BAR.
    fn map_bar(&self) -> Result<()> {
        let memory: Arc<Memory> = Arc::new(self.edu.device().map_region(&self.bar)?);
        Ok(self.fixture.container.map(&MapArgs {
            memory: &memory,
            offset: 0,
            iova: at(BAR, 0),
            size: self.bar.size,
            flags: VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
            argsz: None,
        })?)
    }

    fn bar_pages(&self) -> u64 {
        self.bar.size / PAGE
    }

    fn unmap_bar(&self) -> Result<()> {
        self.fixture.unmap(BAR..BAR + self.bar_pages())
    }

    /// What the register has.
    fn source(&self) -> Result<[u8; 8]> {
        let mut bytes = [0; 8];
        let n = self.edu.device().read_at(self.bar.offset + SOURCE, &mut bytes)?;
        same("bytes of a register that were read", 8, n as u64)?;
        Ok(bytes)
    }

    /// Fails unless so many pages are locked and pinned.
    fn locks(&self, what: &str, pages: u64) -> Result<()> {
        self.locks_and_pins(what, pages, pages)
    }

    /// Fails unless so many pages are locked, and so many pinned: more, if some are pinned twice.
    fn locks_and_pins(&self, what: &str, locked: u64, pinned: u64) -> Result<()> {
        same(&format!("VmLck {what}"), self.locked + locked * PAGE, locked_memory()?)?;
        same(&format!("pages pinned {what}"), self.pinned + pinned, pages_pinned()?)
    }

    /// The BAR can't be pinned, nor together with memory, of which nothing stays pinned then.
    fn bar_is_refused(&self) -> Result<()> {
        let device = self.fixture.device();
        let (pins, pinned) = (device.pins()?, pages_pinned()?);
        for page in [BAR, BAR + 1, BAR + self.bar_pages() - 1] {
            refused("PIN of a BAR", Errno::EINVAL, device.pin(at(page, 0), PAGE)?)?;
        }
        let both = device.pin(at(BAR - 4, 0), 6 * PAGE)?;
        refused("PIN of memory and a BAR", Errno::EINVAL, both)?;
        same("PINS", pins, device.pins()?)?;
        same("pages pinned", pinned, pages_pinned()?)
    }

    /// Reads the dirty bitmap of the BAR, which must say that these pages of it are dirty.
    fn bar_reports(&self, dirty: std::ops::Range<u64>) -> Result<()> {
        let dirty = BAR + dirty.start..BAR + dirty.end;
        self.fixture.reports(BAR..BAR + self.bar_pages(), &[dirty])
    }
}

/// Whether the kernel copies 8 bytes to the user at once, as edu wants its registers written: CPUs whose
/// `rep movsb` is fast may do it byte by byte.
fn copies_words() -> Result<bool> {
    let info = fs::read_to_string("/proc/cpuinfo")?;
    Ok(!info.split_whitespace().any(|flag| flag == "erms" || flag == "fsrm"))
}

fn emulated(context: &Context<'_>) -> Result<()> {
    let scene = Scene::new(context)?;
    let device = scene.fixture.device();
    scene.map_bar()?;
    scene.fixture.container.dirty_start()?;
    scene.bar_is_refused()?;
    scene.locks("with a BAR mapped", 0)?;
    scene.bar_reports(0..0)?;

    let iova = at(BAR, SOURCE);
    succeeded("DMA_WRITE", device.dma_write(iova, 8, 3)?)?;
    scene.bar_reports(0..1)?;
    scene.bar_reports(0..0)?;
    if copies_words()? {
        let register = scene.source()?;
        ensure!(pattern::matches(&register, 3, iova), "the register has {register:x?}");
        let read = device.dma_read(iova, 8)?;
        succeeded("DMA_READ", read)?;
        same("the digest of a register", pattern::digest(&register, iova), read.digest)?;
    }

    // A device that doesn't decode its memory has none: accesses fault.
    let config = scene.edu.device().region_info(VFIO_PCI_CONFIG_REGION_INDEX, None)?;
    const COMMAND: u64 = 4;
    scene.edu.device().write_at(config.offset + COMMAND, &[0, 0])?;
    refused("DMA_WRITE", Errno::EFAULT, device.dma_write(iova, 8, 4)?)?;
    refused("DMA_READ", Errno::EFAULT, device.dma_read(iova, 8)?)?;
    refused("PIN", Errno::EFAULT, device.pin(at(BAR, 0), PAGE)?)?;
    scene.bar_reports(0..0)?;
    scene.edu.enable_dma()?;
    succeeded("DMA_WRITE", device.dma_write(iova, 8, 5)?)?;
    scene.bar_reports(0..1)?;
    scene.fixture.pin(0..2)?;
    scene.unmap_bar()?;
    scene.locks("with the BAR unmapped and 2 pages pinned", 2)
}

fn iommu(context: &Context<'_>) -> Result<()> {
    let scene = Scene::new(context)?;
    let container = &scene.fixture.container;
    container.attach(Group::open(&scene.other)?)?;
    scene.locks("with an IOMMU", RAM)?;
    scene.map_bar()?;
    scene.locks("with an IOMMU and a BAR", RAM)?;
    container.dirty_start()?;
    scene.bar_is_refused()?;
    scene.bar_reports(0..scene.bar_pages())?;
    {
        // From memory to the register of another device, by the IOMMU.
        let other = Edu::open(container, &scene.other)?;
        scene.fixture.memory.write(0, b"register");
        other.copy(at(0, 0), at(BAR, SOURCE), 8)?;
        let register = scene.source()?;
        ensure!(&register == b"register", "the register has {register:x?}");
    }
    let iova = at(BAR, SOURCE);
    succeeded("DMA_WRITE", scene.fixture.device().dma_write(iova, 8, 3)?)?;
    // Unmapped with its bitmap.
    let size = scene.bar_pages().div_ceil(64) * 8;
    let unmap =
        vfio_client::UnmapArgs { iova: at(BAR, 0), size: scene.bar.size, ..Default::default() };
    let (unmapped, words) = container.unmap_dirty(&unmap, &BitmapArgs { pgsize: PAGE, size })?;
    same("bytes unmapped", scene.bar.size, unmapped)?;
    ensure!(words.iter().all(|&word| word == u64::MAX), "pages of the BAR are lost: {words:x?}");
    scene.locks("with the BAR unmapped", RAM)?;
    for pinned in [0, 3] {
        scene.map_bar()?;
        if pinned > 0 {
            scene.fixture.pin(0..pinned)?;
        }
        scene.locks_and_pins("with the BAR mapped again", RAM, RAM + pinned)?;
        container.detach(scene.other.group(), Leave::Unset)?;
        scene.locks("without an IOMMU", pinned)?;
        scene.unmap_bar()?;
        scene.locks("without an IOMMU and a BAR", pinned)?;
        container.attach(Group::open(&scene.other)?)?;
    }
    Ok(())
}

fn joins(context: &Context<'_>) -> Result<()> {
    let scene = Scene::new(context)?;
    let container = &scene.fixture.container;
    scene.map_bar()?;
    scene.fixture.pin(2..5)?;
    container.dirty_start()?;
    for _ in 0..2 {
        scene.locks("without an IOMMU", 3)?;
        container.attach(Group::open(&scene.other)?)?;
        // What was pinned is pinned twice now, and counts once.
        scene.locks_and_pins("with an IOMMU", RAM, RAM + 3)?;
        scene.bar_is_refused()?;
        scene.bar_reports(0..scene.bar_pages())?;
        container.detach(scene.other.group(), Leave::Unset)?;
        scene.bar_reports(0..scene.bar_pages())?;
        scene.bar_reports(0..0)?;
    }
    container.attach(Group::open(&scene.other)?)?;
    let Scene { fixture, pinned, locked, .. } = scene;
    drop(fixture);
    same("VmLck after everything was closed", locked, locked_memory()?)?;
    same("pages pinned after everything was closed", pinned, pages_pinned()?)
}

fn within_memory(context: &Context<'_>) -> Result<()> {
    // Pages in front of the BAR, so many that some follow each other in memory, and behind it.
    const FRONT: u64 = 1024;
    const BEHIND: u64 = 8;
    const FIRST: u64 = 1000;
    let scene = Scene::new(context)?;
    let container = &scene.fixture.container;
    // All of the BAR but its last page: who takes it in steps of two or more doesn't come to its end.
    let behind = FRONT + scene.bar_pages() - 1;
    let count = behind + BEHIND;
    let memory = Arc::new(Memory::new((count * PAGE) as usize)?);
    scene.edu.device().map_region_over(&scene.bar, &memory, (FRONT * PAGE) as usize)?;
    memory.replace((behind * PAGE) as usize..((behind + 1) * PAGE) as usize)?;
    let map = || {
        let (iova, size) = (at(FIRST, 0), count * PAGE);
        let flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;
        container.map(&MapArgs { memory: &memory, offset: 0, iova, size, flags, argsz: None })
    };
    let whole = FIRST..FIRST + count;
    let pin = |pages: std::ops::Range<u64>| {
        scene.fixture.device().pin(at(FIRST + pages.start, 0), (pages.end - pages.start) * PAGE)
    };
    for pinned in [0, 3] {
        map()?;
        scene.locks("without an IOMMU", 0)?;
        container.dirty_start()?;
        if pinned > 0 {
            succeeded("PIN in front of the BAR", pin(FRONT - 2..FRONT)?)?;
            succeeded("PIN behind the BAR", pin(behind..behind + 1)?)?;
            refused("PIN of both and the BAR", Errno::EINVAL, pin(FRONT - 2..behind + 1)?)?;
            scene.locks("with pins beside the BAR", pinned)?;
            let dirty = [FIRST + FRONT - 2..FIRST + FRONT, FIRST + behind..FIRST + behind + 1];
            scene.fixture.reports(whole.clone(), &dirty)?;
        }
        container.attach(Group::open(&scene.other)?)?;
        let mapped = RAM + FRONT + BEHIND;
        scene.locks_and_pins("with an IOMMU that joined", mapped, mapped + pinned)?;
        scene.fixture.reports(whole.clone(), &[whole.clone()])?;
        container.detach(scene.other.group(), Leave::Unset)?;
        scene.locks("with an IOMMU that has left", pinned)?;

        container.attach(Group::open(&scene.other)?)?;
        scene.fixture.unmap(whole.clone())?;
        scene.locks("with the mapping gone", RAM)?;
        map()?;
        scene.locks("with the mapping made for an IOMMU", mapped)?;
        scene.fixture.unmap(whole.clone())?;
        scene.locks("with that gone", RAM)?;
        container.dirty_stop()?;
        container.detach(scene.other.group(), Leave::Unset)?;
    }
    Ok(())
}

fn read_only(context: &Context<'_>) -> Result<()> {
    let scene = Scene::new(context)?;
    let container = &scene.fixture.container;
    container.attach(Group::open(&scene.other)?)?;
    let memory = Arc::new(scene.edu.device().map_region(&scene.bar)?);
    memory.set_access(0..memory.len(), Access::Read)?;
    let map = |page, flags| {
        let (iova, size) = (at(page, 0), scene.bar.size);
        status(container.map(&MapArgs {
            memory: &memory,
            offset: 0,
            iova,
            size,
            flags,
            argsz: None,
        }))
    };
    let writable = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;
    // Before the process has touched it, and afterwards.
    for _ in 0..2 {
        let mapped = map(2 * BAR + scene.bar_pages(), writable)?;
        ensure!(mapped == Err(Errno::EFAULT), "mapping it for writing: {mapped:?}");
        scene.locks("with an IOMMU", RAM)?;
        let mapped = map(BAR, VFIO_DMA_MAP_FLAG_READ)?;
        ensure!(mapped == Ok(()), "mapping it for reading: {mapped:?}");
        let mapped = map(2 * BAR + scene.bar_pages(), writable)?;
        ensure!(mapped == Err(Errno::EFAULT), "mapping it for writing, too: {mapped:?}");
        scene.locks("with an IOMMU and a BAR", RAM)?;
        scene.unmap_bar()?;
    }
    Ok(())
}

fn reserved(context: &Context<'_>) -> Result<()> {
    // Where a PC has its BIOS.
    const FIRMWARE: u64 = 0xf_0000;
    const FIRST: u64 = 1000;
    const PAGES: u64 = 4;
    let scene = Scene::new(context)?;
    let container = &scene.fixture.container;
    let file = match File::options().read(true).write(true).open("/dev/mem") {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Err(Skip("needs /dev/mem (CONFIG_DEVMEM)".into()).into());
        }
        opened => opened.context("/dev/mem")?,
    };
    let memory = Arc::new(Memory::of_region(&file, FIRMWARE, (PAGES * PAGE) as usize)?);
    let (iova, size) = (at(FIRST, 0), PAGES * PAGE);
    let flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;
    container.map(&MapArgs { memory: &memory, offset: 0, iova, size, flags, argsz: None })?;
    let all = FIRST..FIRST + PAGES;
    container.dirty_start()?;
    scene.fixture.reports(all.clone(), &[])?;
    for pinned in [0, 3] {
        if pinned > 0 {
            scene.fixture.pin(FIRST..FIRST + pinned)?;
            scene.fixture.pin(2..3)?;
        }
        let ram = pinned.min(1);
        for _ in 0..2 {
            scene.locks("without an IOMMU", ram)?;
            container.attach(Group::open(&scene.other)?)?;
            scene.locks_and_pins("with an IOMMU", RAM, RAM + ram)?;
            scene.fixture.reports(all.clone(), &[all.clone()])?;
            container.detach(scene.other.group(), Leave::Unset)?;
            scene.fixture.reports(all.clone(), &[all.clone()])?;
            scene.fixture.reports(all.clone(), &[FIRST..FIRST + pinned])?;
        }
    }
    let unpinned = scene.fixture.device().unpin(at(FIRST, 0), PAGE)?;
    succeeded("UNPIN of reserved memory", unpinned)?;
    scene.locks("with one of it unpinned", 1)?;
    scene.fixture.unmap(all)?;
    scene.locks("with it unmapped", 1)
}
