// SPDX-License-Identifier: GPL-2.0-only

//! Who is charged for what a container takes of the kernel's memory, and what comes of it when no more can be
//! charged: so allocations fail on any kernel, and those of an IOMMU's tables among them.

use crate::process::edu;
use anyhow::{Result, bail, ensure};
use dirty_model::Errno;
use harness::{
    Cgroup, Context, Failure, Scenario, Shows, Signature, defect, in_file, locked_memory,
    pages_pinned, scenario,
};
use std::cell::RefCell;
use testbed::{
    Op, PAGE, Testbed, at,
    fixture::{Fixture, refused, succeeded},
    same, status,
};
use vfio_client::{
    Group, Leave, UnmapArgs,
    uapi::{VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE},
};

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "type1/charge/map",
        "a MAP for an IOMMU that gets no memory for a mapping or a table leaves nothing, whichever it is",
        map,
    ),
    scenario(
        "type1/charge/join",
        "an IOMMU joins with mappings, and so does one that gets no memory for a table: then nothing is left",
        join,
    ),
    scenario(
        "type1/charge/start",
        "a START that gets no memory for one of several bitmaps tracks nothing; until D16 is fixed, none fails",
        start,
    ),
    scenario(
        "type1/charge/pin",
        "a PIN of memory that isn't there yet, and that there is no memory for, pins nothing",
        pin,
    ),
    defect(
        "type1/defect/D16-not-charged",
        "the bitmaps that START allocates are charged to the cgroup of who starts",
        not_charged,
        Signature {
            defect: "D16",
            shows: Shows::Difference {
                what: "START allocates a bitmap of 8192 KiB, and its cgroup is charged less than 1024 KiB",
                lost: &[],
                spurious: &[],
            },
            complaints: &[],
        },
    ),
];

/// Pages of a mapping for which an IOMMU has three tables: it begins with the last page of one.
const FIRST: u64 = 511;
const LARGE: u64 = 1 + 512 + 1;
/// What is to fail doesn't take so many steps more.
const STEPS: u64 = 100;

/// What is left when something has failed.
#[derive(Debug, PartialEq, Eq)]
struct Taken {
    pages_pinned: u64,
    locked: u64,
    dma_avail: Option<u32>,
}

impl Taken {
    fn now(fixture: &Fixture) -> Result<Self> {
        let dma_avail = fixture.container.info()?.dma_avail;
        Ok(Self { pages_pinned: pages_pinned()?, locked: locked_memory()?, dma_avail })
    }

    /// Fails if it is not the same after `what`.
    fn is_unchanged(&self, fixture: &Fixture, what: &str) -> Result<()> {
        let now = Self::now(fixture)?;
        let changed =
            (now != *self).then(|| format!("{what} leaves {now:?}, before it were {self:?}"));
        Failure::unless_none(changed)
    }
}

/// Does something that may be charged for so many steps of so many pages: none, one, until it succeeds. Each
/// failure before must be one of memory, and leave nothing. Says how many there were.
fn with_more_and_more(
    cgroup: &Cgroup,
    step: u64,
    mut attempt: impl FnMut() -> vfio_client::Result<()>,
    mut unchanged: impl FnMut() -> Result<()>,
) -> Result<u64> {
    for steps in 0..STEPS {
        match status(cgroup.limited(steps * step * PAGE, &mut attempt)?)? {
            Ok(()) => return Ok(steps),
            Err(Errno::ENOMEM) => unchanged()?,
            Err(errno) => {
                let pages = steps * step;
                let what = format!("with memory for {pages} pages it is {errno}, not ENOMEM");
                return Err(Failure::new(what).into());
            }
        }
    }
    bail!("it fails with memory for {} pages", STEPS * step)
}

/// A device with so many pages of memory, which are there, none of them side by side.
pub(crate) fn scattered(context: &Context<'_>, pages: u64) -> Result<Fixture> {
    // That of a file has no huge pages.
    let (memory, between) = (in_file(pages * PAGE)?.1, in_file(pages * PAGE)?.1);
    for page in 0..pages {
        memory.write((page * PAGE) as usize, &[1]);
        between.write((page * PAGE) as usize, &[1]);
    }
    Fixture::with_memory(context.device(0)?, memory)
}

fn map(context: &Context<'_>) -> Result<()> {
    let fixture = scattered(context, LARGE)?;
    let container = &fixture.container;
    container.attach(Group::open(&edu(context)?)?)?;
    let cgroup = Cgroup::new()?;
    // The second time where the first has left no tables.
    for (tracking, first) in [(false, FIRST), (true, FIRST + (1 << 18))] {
        if tracking {
            container.dirty_start()?;
        }
        let all = UnmapArgs { iova: at(first, 0), size: LARGE * PAGE, ..Default::default() };
        let before = Taken::now(&fixture)?;
        let failed = with_more_and_more(
            &cgroup,
            1,
            || container.map(&fixture.mapping(0..LARGE, first)),
            || {
                same("bytes unmapped after a MAP that failed", 0, container.unmap(&all)?)?;
                before.is_unchanged(&fixture, "a MAP that failed")
            },
        )?;
        context.note(format_args!("{failed} times there was no memory"));
        ensure!(failed > 0, "no MAP failed");
        same("VmLck", before.locked + LARGE * PAGE, locked_memory()?)?;
        same("bytes unmapped", LARGE * PAGE, container.unmap(&all)?)?;
        before.is_unchanged(&fixture, "an UNMAP")?;
    }
    Ok(())
}

fn join(context: &Context<'_>) -> Result<()> {
    let fixture = scattered(context, LARGE)?;
    fixture.map_at(0..LARGE, FIRST)?;
    let container = &fixture.container;
    let node = edu(context)?;
    fixture.pin(FIRST..FIRST + 2)?;
    let cgroup = Cgroup::new()?;
    let before = Taken::now(&fixture)?;
    // Opened before, since a file is charged, too.
    let group = RefCell::new(Some(Group::open(&node)?));
    let failed = with_more_and_more(
        &cgroup,
        1,
        || container.attach(group.take().expect("it was opened")),
        || {
            before.is_unchanged(&fixture, "an IOMMU that couldn't join")?;
            fixture.pin(FIRST + 7..FIRST + 8)?;
            same("VmLck with a pin more", before.locked + PAGE, locked_memory()?)?;
            succeeded("UNPIN", fixture.device().unpin(at(FIRST + 7, 0), PAGE)?)?;
            group.replace(Some(Group::open(&node)?));
            Ok(())
        },
    )?;
    context.note(format_args!("{failed} times there was no memory"));
    ensure!(failed > 0, "no join failed");
    container.detach(node.group(), Leave::Unset)?;
    before.is_unchanged(&fixture, "an IOMMU that has left")
}

fn start(context: &Context<'_>) -> Result<()> {
    // Bitmaps of 16 pages.
    const SIZE: u64 = 16 * PAGE * 8 * PAGE;
    const MAPPINGS: u64 = 3;
    let mut bed = Testbed::with_pages(context, 16)?;
    let flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;
    for number in 0..MAPPINGS {
        bed.must(Op::Map { iova: (1 << 40) + number * SIZE, size: SIZE, backed: PAGE, flags })?;
    }
    bed.pin(3..4)?;
    let cgroup = Cgroup::new()?;
    let container = bed.container().clone();
    let failed = with_more_and_more(
        &cgroup,
        10,
        || container.dirty_start(),
        || bed.refused(Errno::EINVAL, Op::get_bitmap(at(0, 0), 16 * PAGE)),
    )?;
    context.note(format_args!("{failed} times there was no memory"));
    container.dirty_stop()?;
    drop(cgroup);
    bed.start()?;
    bed.each_reports(&[3..4])?;
    bed.check_counters()
}

fn pin(context: &Context<'_>) -> Result<()> {
    const PAGES: u64 = 64;
    const THERE: u64 = 5;
    let fixture = Fixture::with_memory(context.device(0)?, in_file(PAGES * PAGE)?.1)?;
    fixture.map(0..PAGES)?;
    for page in 0..THERE {
        fixture.memory.write((page * PAGE) as usize, &[1]);
    }
    let cgroup = Cgroup::new()?;
    let before = Taken::now(&fixture)?;
    // For less than the driver takes to remember pins, and for that and some pages.
    for room in [0, 16] {
        let all = || fixture.device().pin(at(1, 0), (PAGES - 1) * PAGE);
        let what = format!("PIN with memory for {room} pages of those that aren't there");
        refused(&what, Errno::ENOMEM, cgroup.limited(room * PAGE, all)??)?;
        before.is_unchanged(&fixture, "a PIN that failed")?;
    }
    fixture.container.dirty_start()?;
    fixture.reports(0..PAGES, &[])?;
    fixture.pin(1..PAGES)?;
    fixture.reports(0..PAGES, &[1..PAGES])
}

fn not_charged(context: &Context<'_>) -> Result<()> {
    const LARGE: u64 = 256 << 30;
    const BITMAP: u64 = LARGE / PAGE / 8;
    const FEW: u64 = BITMAP / 8;
    let mut bed = Testbed::new(context)?;
    let flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;
    bed.must(Op::Map { iova: 1 << 40, size: LARGE, backed: PAGE, flags })?;
    let cgroup = Cgroup::new()?;
    let before = cgroup.charged()?;
    bed.start()?;
    let charged = cgroup.charged()?.saturating_sub(before);
    context.note(format_args!("{charged} bytes are charged"));
    let wrong = match charged {
        BITMAP.. => None,
        0..FEW => Some(format!(
            "START allocates a bitmap of {} KiB, and its cgroup is charged less than {} KiB",
            BITMAP >> 10,
            FEW >> 10
        )),
        _ => Some(format!("START allocates {BITMAP} bytes, {charged} are charged")),
    };
    Failure::unless_none(wrong)
}
