// SPDX-License-Identifier: GPL-2.0-only

//! Defects of type1 that devices with an IOMMU show: see `Documentation/findings/`.

use anyhow::Result;
use dirty_model::{Errno, Protection};
use harness::{Context, Failure, Scenario, Shows, Signature, defect};
use std::time::{Duration, Instant};
use testbed::{Op, PAGE, Testbed, slots::EDU};
use vfio_client::uapi::{VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE};

/// A defect that shows as a difference without pages.
const fn shows(defect: &'static str, what: &'static str) -> Signature {
    let shows = Shows::Difference { what, lost: &[], spurious: &[] };
    Signature { defect, shows, complaints: &[] }
}

pub const SCENARIOS: &[Scenario] = &[
    defect(
        "type1/defect/D20-join-aperture",
        "the first IOMMU doesn't join if something is mapped that it can't reach",
        join_aperture,
        shows("D20", "device 2 JOIN: errno 34, but must be: EINVAL"),
    ),
    defect(
        "type1/defect/D21-join-unwind",
        "a join that fails takes as long as what it has mapped, not as what was to be mapped",
        join_unwind,
        shows("D21", "a join that fails takes * with 16 GiB mapped, * with 1 MiB"),
    ),
];

fn join_aperture(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pin(context)?;
    let beyond = bed.contract().aperture_end() + 1;
    bed.must(Op::map(beyond, PAGE, Protection::READ_WRITE))?;
    bed.refused(Errno::EINVAL, Op::Join { device: EDU[0] })?;
    bed.must(Op::unmap(beyond, PAGE))?;
    bed.has_only_pin()
}

fn join_unwind(context: &Context<'_>) -> Result<()> {
    // Two pages are there, so that something has to be unmapped and unpinned.
    let best = |size| -> Result<Duration> {
        let mut best = Duration::MAX;
        for _ in 0..3 {
            let mut bed = Testbed::new(context)?;
            let flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;
            bed.must(Op::Map { iova: 1 << 32, size, backed: 2 * PAGE, flags })?;
            bed.count_locked_memory()?;
            let start = Instant::now();
            bed.refused(Errno::EFAULT, Op::Join { device: EDU[0] })?;
            best = best.min(start.elapsed());
            bed.check()?;
        }
        Ok(best)
    };
    let small = best(1 << 20)?;
    let large = best(16 << 30)?;
    Failure::unless_none((large >= 8 * small).then(|| {
        format!("a join that fails takes {large:.0?} with 16 GiB mapped, {small:.0?} with 1 MiB")
    }))
}
