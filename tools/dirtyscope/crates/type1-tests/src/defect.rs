// SPDX-License-Identifier: GPL-2.0-only

//! Defects of type1 that sequences of operations show, each with the shortest one that does: see
//! `Documentation/findings/`.
//!
//! They state what the contract says, as all scenarios do. What kernels with the defect show instead
//! stands beside it, exactly: anything else is a failure.

use anyhow::{Result, anyhow, ensure};
use dirty_model::Errno;
use harness::{Context, Failure, Scenario, Shows, Signature, defect};
use std::{
    thread,
    time::{Duration, Instant},
};
use testbed::{
    Op, PAGE, Testbed, at,
    fixture::{Fixture, is_awaited, succeeded},
    program, status,
};
use vfio_client::BitmapArgs;

/// A program that the fuzzer found and shrank; but D4's, which no compiler known breaks.
macro_rules! found {
    ($file:literal) => {
        |context| replay(context, include_str!(concat!("defects/", $file, ".ops")))
    };
}

/// A defect that shows as a difference.
const fn shows(
    defect: &'static str,
    what: &'static str,
    lost: &'static [(u64, u64)],
    spurious: &'static [(u64, u64)],
) -> Signature {
    let shows = Shows::Difference { what, lost, spurious };
    Signature { defect, shows, complaints: &[] }
}

/// What lockdep says once in a boot, and then no more of anything: it has to be the first scenario that
/// unmaps what is pinned, and says nothing where there is no lockdep.
pub const LOCK_ORDER: Scenario = defect(
    "type1/defect/D2-lock-order",
    "an unmap of what is pinned takes locks in the order that everybody does",
    lock_order,
    Signature {
        defect: "D2",
        shows: Shows::Complaint,
        complaints: &["WARNING: possible circular locking dependency detected"],
    },
);

pub const SCENARIOS: &[Scenario] = &[
    defect(
        "type1/defect/D1-pgsize-0",
        "GET_BITMAP with a page size of 0 is refused without undefined behaviour",
        pgsize_0,
        Signature {
            defect: "D1",
            shows: Shows::Complaint,
            complaints: &["UBSAN: shift-out-of-bounds in *drivers/vfio/vfio_iommu_type1.c:*"],
        },
    ),
    defect(
        "type1/defect/D3-read-cost",
        "reading the last of many mappings costs about as much as reading the first",
        read_cost,
        shows("D3", "the last of 4000 mappings takes * to read, the first *", &[], &[]),
    ),
    defect(
        "type1/defect/D4-no-flag",
        "DIRTY_PAGES without a flag is refused, and changes nothing",
        found!("D4-no-flag"),
        shows("D4", "DIRTY_PAGES flags 0x0: ok, but must be: EINVAL", &[], &[]),
    ),
    defect(
        "type1/defect/D5-pin-unwind",
        "a batch of pins that fails in the middle leaves nothing dirty",
        found!("D5-pin-unwind"),
        shows(
            "D5",
            "GET_BITMAP 0x40023000+0xf000: the bitmap is wrong",
            &[],
            &[(0x4002_f000, 0x4003_2000)],
        ),
    ),
    defect(
        "type1/defect/D15-fault-under-lock",
        "memory is mapped while a device's copy waits for other memory, which nobody serves",
        fault_under_lock,
        shows("D15", "MAP_DMA waits for as long as the page fault of another task does", &[], &[]),
    ),
    defect(
        "type1/defect/D6-shift-stale",
        "a mapping that was read at an odd place of a bitmap has no pages after its end",
        found!("D6-shift-stale"),
        shows(
            "D6",
            "GET_BITMAP 0x400bb000+0x4000: the bitmap is wrong",
            &[],
            &[(0x400c_8000, 0x400c_9000)],
        ),
    ),
    defect(
        "type1/defect/D6-shift-fault",
        "a read at an odd place that faults leaves the mapping's dirty pages where they are",
        found!("D6-shift-fault"),
        shows(
            "D6",
            "GET_BITMAP 0x400c1000+0x8a000: the bitmap is wrong",
            &[(0x400c_3000, 0x400c_4000)],
            &[(0x400c_4000, 0x400c_5000)],
        ),
    ),
    defect(
        "type1/defect/D6-shift-merge",
        "a mapping that was read behind another one in a word has no pages of that one",
        found!("D6-shift-merge"),
        shows(
            "D6",
            "GET_BITMAP 0x4006a000+0xc000: the bitmap is wrong",
            &[],
            &[(0x4007_8000, 0x4007_d000)],
        ),
    ),
    defect(
        "type1/defect/D7-read-consumes",
        "a read of two mappings that faults in the second forgets nothing of the first",
        found!("D7-read-consumes"),
        shows(
            "D7",
            "GET_BITMAP 0x40049000+0x8b000: the bitmap is wrong",
            &[(0x4004_9000, 0x4004_a000)],
            &[],
        ),
    ),
    defect(
        "type1/defect/D8-unmap-partial",
        "an unmap with bitmap that faults in the second mapping unmaps nothing",
        found!("D8-unmap-partial"),
        shows("D8", "dma_avail is 0xfffe, not 0xfffd", &[], &[]),
    ),
    defect(
        "type1/defect/D9-dma-rw-partial",
        "what a vfio_dma_rw() wrote before it faulted is dirty",
        found!("D9-dma-rw-partial"),
        shows(
            "D9",
            "GET_BITMAP 0x400bc000+0x4000: the bitmap is wrong",
            &[(0x400b_d000, 0x400b_e000)],
            &[],
        ),
    ),
];

fn lock_order(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 4)?;
    bed.pin(0..2)?;
    bed.must(Op::unmap_all())?;
    bed.check()
}

fn pgsize_0(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 1)?;
    bed.start()?;
    let bitmap = BitmapArgs { pgsize: 0, size: 8 };
    let refused = status(bed.container().dirty_bitmap(at(0, 0), PAGE, &bitmap))?;
    ensure!(refused == Err(Errno::EINVAL), "GET_BITMAP with pgsize 0: {refused:?}");
    Ok(())
}

fn read_cost(context: &Context<'_>) -> Result<()> {
    const MAPPINGS: u64 = 4000;
    const READS: u32 = 20;
    let mut bed = Testbed::new(context)?;
    for i in 0..MAPPINGS {
        bed.map(2 * i..2 * i + 1)?;
    }
    bed.start()?;
    let mut time = |page: u64| -> Result<Duration> {
        let start = Instant::now();
        for _ in 0..READS {
            bed.must(Op::get_bitmap(at(page, 0), PAGE))?;
        }
        Ok(start.elapsed())
    };
    // The best of some: other work on the machine only ever adds. In turns, or it adds to one of them only.
    let (mut first, mut last) = (Duration::MAX, Duration::MAX);
    for _ in 0..10 {
        first = first.min(time(0)?);
        last = last.min(time(2 * (MAPPINGS - 1))?);
    }
    Failure::unless_none((last >= 4 * first).then(|| {
        format!(
            "the last of {MAPPINGS} mappings takes {:.0?} to read, the first {:.0?}",
            last / READS,
            first / READS
        )
    }))
}

fn replay(context: &Context<'_>, text: &str) -> Result<()> {
    program::run(context, &program::parse(text)?)?.map_err(|failed| failed.error)
}

fn fault_under_lock(context: &Context<'_>) -> Result<()> {
    const PAGES: u64 = 16;
    const A_WHILE: Duration = Duration::from_secs(1);
    let fixture = Fixture::without_mapping(context, 0, 2 * PAGES)?;
    fixture.map(0..PAGES)?;
    let waits = fixture.memory.unserved()?;
    let held_up = thread::scope(|scope| -> Result<bool> {
        let copy = scope.spawn(|| fixture.device().dma_write(at(0, 0), PAGES * PAGE, 1));
        is_awaited(&waits)?;
        let map = scope.spawn(|| fixture.map(PAGES..2 * PAGES));
        let begin = Instant::now();
        while !map.is_finished() && begin.elapsed() < A_WHILE {
            thread::sleep(Duration::from_millis(1));
        }
        let held_up = !map.is_finished();
        ensure!(!copy.is_finished(), "the copy has ended, and nobody has served its memory");
        drop(waits);
        map.join().map_err(|_| anyhow!("a thread panicked"))??;
        let outcome = copy.join().map_err(|_| anyhow!("a thread panicked"))??;
        succeeded("DMA_WRITE", outcome)?;
        Ok(held_up)
    })?;
    let what = || "MAP_DMA waits for as long as the page fault of another task does".into();
    Failure::unless_none(held_up.then(what))
}
