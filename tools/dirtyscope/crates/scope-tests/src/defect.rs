// SPDX-License-Identifier: GPL-2.0-only

//! Defects of type1 that devices with an IOMMU show: see `Documentation/findings/`.

use crate::promotion::needs_driver;
use anyhow::Result;
use dirty_model::{Errno, Protection};
use harness::{Context, Failure, Scenario, Shows, Signature, defect};
use mdev_dma::Opcode;
use std::time::{Duration, Instant};
use testbed::{
    Op, PAGE, Testbed, at, command, pages,
    slots::{EDU, PAIR, PINNING_PAIR},
};
use vfio_client::uapi::{VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE};

/// A defect that shows as a difference without pages.
const fn shows(defect: &'static str, what: &'static str) -> Signature {
    let shows = Shows::Difference { what, lost: &[], spurious: &[] };
    Signature { defect, shows, complaints: &[] }
}

/// A defect of which only the kernel's complaints say something.
pub const fn shows_complaint(
    defect: &'static str,
    complaints: &'static [&'static str],
) -> Signature {
    Signature { defect, shows: Shows::Complaint, complaints }
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
    defect(
        "type1/defect/D22-shared-promotion",
        "a device that pins doesn't speak for the other one of its group, whose DMA is dirty",
        shared_promotion,
        Signature {
            defect: "D22",
            shows: Shows::Difference {
                what: "GET_BITMAP 0x40000000+0x46000: the bitmap is wrong",
                lost: &[(0x4000_0000, 0x4000_1000), (0x4000_2000, 0x4004_6000)],
                spurious: &[],
            },
            complaints: &[],
        },
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

fn shared_promotion(context: &Context<'_>) -> Result<()> {
    needs_driver()?;
    let other = PAIR[1];
    let mut bed = Testbed::with_pages(context, 70)?;
    bed.user_write(pages(0..1))?;
    bed.must(Op::Join { device: PINNING_PAIR })?;
    for device in [PINNING_PAIR, other] {
        bed.must(Op::Open { device })?;
    }
    bed.start()?;
    bed.must(command(PINNING_PAIR, Opcode::Pin, pages(1..2)))?;
    bed.must(Op::Copy { device: other, from: at(0, 0), to: at(40, 0), length: PAGE })?;
    bed.check_memory()?;
    bed.reports(&[0..70])
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
