// SPDX-License-Identifier: GPL-2.0-only

//! Memory of another process, and huge pages, that an IOMMU maps.

use anyhow::{Context as _, Result, ensure};
use dirty_model::Errno;
use edu_client::Edu;
use harness::{
    Context, Failure, HUGE_PAGE, HugePages, Scenario, Shows, Signature, defect, locked_memory,
    locked_memory_of, pages_pinned, scenario,
};
use mdev_dma::{Opcode, pattern};
use testbed::{
    PAGE, at,
    fixture::{Fixture, LONG, refused, succeeded},
    same, status,
};
use vfio_client::{DeviceNode, Group, Leave, Mapper};

/// A defect that shows as a difference without pages.
const fn shows(defect: &'static str, what: &'static str) -> Signature {
    let shows = Shows::Difference { what, lost: &[], spurious: &[] };
    Signature { defect, shows, complaints: &[] }
}

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "type1/iommu/mapper-died",
        "what a process mapped for an IOMMU stays mapped when it dies, until it is unmapped",
        mapper_died,
    ),
    scenario(
        "type1/iommu/unmapped",
        "a device reaches nothing any more of what was unmapped, though it had done DMA there",
        unmapped,
    ),
    scenario(
        "type1/iommu/huge-pages",
        "huge pages are mapped for an IOMMU, beside pins, and are free again afterwards",
        huge_pages,
    ),
    defect(
        "type1/defect/D30-join-other-process",
        "an IOMMU that joins reaches the memory that was mapped, not that of the process that joins it",
        join_other_process,
        shows("D30", "DMA wrote to page 1 of the process that joined, which has mapped nothing"),
    ),
    defect(
        "type1/defect/D30-join-dead-process",
        "an IOMMU can't join if the process has died whose memory is mapped",
        join_dead_process,
        shows("D30", "an IOMMU joins with memory mapped of a process that has died"),
    ),
];

const PAGES: u64 = 16;

/// An edu that may join.
pub(crate) fn edu(context: &Context<'_>) -> Result<DeviceNode> {
    let edu = &context.edus()?.singles[0];
    edu.bind("vfio-pci")?;
    edu.node()
}

/// A fixture whose memory, not mapped, is filled page by page.
fn filled(context: &Context<'_>) -> Result<Fixture> {
    let fixture = Fixture::without_mapping(context, 0, PAGES)?;
    for page in 0..PAGES {
        fixture.memory.write((page * PAGE) as usize, &[page as u8; PAGE as usize]);
    }
    Ok(fixture)
}

/// Fails unless the mapped page is as page `other` was at first, as `vfio_dma_rw()` sees it for whom
/// it belongs to.
fn page_is(fixture: &Fixture, page: u64, other: u64) -> Result<()> {
    fixture.device().run_in_background(Opcode::DmaRead, at(page, 0), PAGE, 0)?;
    let read = fixture.device().wait(LONG)?;
    succeeded("DMA_READ in the background", read)?;
    let expected = pattern::digest(&[other as u8; PAGE as usize], at(page, 0));
    same(&format!("the digest of page {page}"), expected, read.digest)
}

fn mapper_died(context: &Context<'_>) -> Result<()> {
    let node = edu(context)?;
    let (locked, pinned) = (locked_memory()?, pages_pinned()?);
    for closes in [false, true] {
        let fixture = filled(context)?;
        let container = &fixture.container;
        container.attach(Group::open(&node)?)?;
        let mut mapper = Mapper::new(container, &[], &fixture.mapping(0..PAGES, 0))?;
        same("VmLck of who mapped", PAGES * PAGE, locked_memory_of(mapper.pid())?)?;
        same("VmLck", locked, locked_memory()?)?;
        container.dirty_start()?;
        fixture.pin(3..5)?;
        let edu = Edu::open(container, &node)?;
        edu.copy(at(5, 0), at(1, 0), PAGE)?;
        page_is(&fixture, 1, 5)?;
        mapper.kill();
        // The IOMMU has the pages, and so has who pinned them.
        same("pages pinned", pinned + PAGES + 2, pages_pinned()?)?;
        edu.copy(at(6, 0), at(3, 0), PAGE)?;
        let read = fixture.device().read_pinned(at(3, 0), PAGE)?;
        succeeded("READ", read)?;
        same("the digest of page 3", pattern::digest(&[6; PAGE as usize], at(3, 0)), read.digest)?;
        refused("PIN", Errno::ENODEV, fixture.device().pin(at(6, 0), PAGE)?)?;
        fixture.reports(0..PAGES, &[0..PAGES])?;
        drop(edu);
        if closes {
            drop(fixture);
        } else {
            container.detach(node.group(), Leave::Unset)?;
            same("pages pinned without an IOMMU", pinned + 2, pages_pinned()?)?;
            fixture.reports(0..PAGES, &[0..PAGES])?;
            fixture.reports(0..PAGES, &[3..5])?;
            fixture.unmap(0..PAGES)?;
        }
        same("pages pinned at the end", pinned, pages_pinned()?)?;
        same("VmLck at the end", locked, locked_memory()?)?;
    }
    Ok(())
}

fn unmapped(context: &Context<'_>) -> Result<()> {
    let node = edu(context)?;
    let fixture = filled(context)?;
    let container = &fixture.container;
    container.attach(Group::open(&node)?)?;
    let edu = Edu::open(container, &node)?;
    fixture.map(0..8)?;
    fixture.map(8..PAGES)?;
    // What it has translated once, the IOMMU remembers.
    edu.copy(at(5, 0), at(9, 0), PAGE)?;
    edu.copy(at(9, 0), at(6, 0), PAGE)?;
    let has = |page: u64, other: u8| {
        let differs =
            fixture.memory.first_difference((page * PAGE) as usize, &[other; PAGE as usize]);
        ensure!(differs.is_none(), "page {page} isn't what page {other} was, at byte {differs:x?}");
        Ok(())
    };
    has(9, 5)?;
    has(6, 5)?;
    fixture.unmap(8..PAGES)?;
    edu.copy(at(1, 0), at(9, 0), PAGE)?;
    has(9, 5)?;
    // It does, where the same IOVA is other memory.
    container.map(&fixture.mapping(10..12, 8))?;
    edu.copy(at(1, 0), at(9, 0), PAGE)?;
    has(9, 5)?;
    has(11, 1)
}

fn huge_pages(context: &Context<'_>) -> Result<()> {
    const ALL: u64 = 2 * HUGE_PAGE / PAGE;
    const SEAM: std::ops::Range<u64> = HUGE_PAGE / PAGE - 1..HUGE_PAGE / PAGE + 1;
    // Several of what an IOMMU maps as one, with some on either side in type1's tree.
    const PINS: [u64; 5] = [30, 10, 50, 20, 40];
    const ALL_PINS: u64 = PINS.len() as u64 + SEAM.end - SEAM.start;
    let node = edu(context)?;
    let (mut huge, memory) = HugePages::new()?;
    let (locked, pinned) = (locked_memory()?, pages_pinned()?);
    let fixture = Fixture::with_memory(context.device(0)?, memory)?;
    let container = &fixture.container;
    fixture.map(0..ALL)?;
    for page in PINS {
        fixture.pin(page..page + 1)?;
    }
    fixture.pin(SEAM)?;
    container.dirty_start()?;
    for _ in 0..2 {
        container.attach(Group::open(&node)?)?;
        same("VmLck with an IOMMU", locked + ALL * PAGE, locked_memory()?)?;
        same("pages pinned with an IOMMU", pinned + ALL + ALL_PINS, pages_pinned()?)?;
        {
            let edu = Edu::open(container, &node)?;
            fixture.memory.write(0, &[9; PAGE as usize]);
            edu.copy(at(0, 0), at(SEAM.end, 0) - PAGE - 8, 16)?;
        }
        let mut seam = [0; 16];
        fixture.memory.read((HUGE_PAGE - 8) as usize, &mut seam);
        ensure!(seam == [9; 16], "DMA over the seam of two huge pages wrote {seam:x?}");
        fixture.reports(0..ALL, &[0..ALL])?;
        container.detach(node.group(), Leave::Unset)?;
        same("VmLck without an IOMMU", locked + ALL_PINS * PAGE, locked_memory()?)?;
        same("pages pinned without an IOMMU", pinned + ALL_PINS, pages_pinned()?)?;
        fixture.reports(0..ALL, &[0..ALL])?;
        fixture.reports(0..ALL, &[10..11, 20..21, 30..31, 40..41, 50..51, SEAM])?;
    }
    container.attach(Group::open(&node)?)?;
    fixture.memory.remove(0..fixture.memory.len())?;
    huge.close();
    huge.used("with an IOMMU and pins", 2)?;
    drop(fixture);
    huge.used("after everything was closed", 0)?;
    same("VmLck after everything was closed", locked, locked_memory()?)?;
    same("pages pinned after everything was closed", pinned, pages_pinned()?)
}

fn join_other_process(context: &Context<'_>) -> Result<()> {
    let node = edu(context)?;
    let (locked, pinned) = (locked_memory()?, pages_pinned()?);
    let fixture = filled(context)?;
    let container = &fixture.container;
    let mapper = Mapper::new(container, &[], &fixture.mapping(0..PAGES, 0))?;
    container.attach(Group::open(&node)?)?;
    same("VmLck of who mapped", PAGES * PAGE, locked_memory_of(mapper.pid())?)?;
    same("VmLck of who joined", locked, locked_memory()?)?;
    {
        let edu = Edu::open(container, &node)?;
        edu.copy(at(5, 0), at(1, 0), PAGE)?;
    }
    let own = fixture.memory.first_difference(PAGE as usize, &[1; PAGE as usize]);
    Failure::unless_none(own.map(|_| {
        "DMA wrote to page 1 of the process that joined, which has mapped nothing".into()
    }))?;
    page_is(&fixture, 1, 5)?;
    container.detach(node.group(), Leave::Unset)?;
    same("VmLck of who mapped, without an IOMMU", 0, locked_memory_of(mapper.pid())?)?;
    same("pages pinned without an IOMMU", pinned, pages_pinned()?)
}

fn join_dead_process(context: &Context<'_>) -> Result<()> {
    let node = edu(context)?;
    let pinned = pages_pinned()?;
    let fixture = filled(context)?;
    let container = &fixture.container;
    let mut mapper = Mapper::new(container, &[], &fixture.mapping(0..PAGES, 0))?;
    fixture.pin(3..5)?;
    mapper.kill();
    let joined = status(container.attach(Group::open(&node)?))?;
    Failure::unless_none(
        joined
            .is_ok()
            .then(|| "an IOMMU joins with memory mapped of a process that has died".into()),
    )?;
    same("pages pinned", pinned + 2, pages_pinned()?)?;
    fixture.unmap(0..PAGES)?;
    same("pages pinned with nothing mapped", pinned, pages_pinned()?)?;
    fixture.map(0..PAGES)?;
    container.attach(Group::open(&node)?).context("join without that memory")
}
