// SPDX-License-Identifier: GPL-2.0-only

//! Defects of type1 that pins as real drivers make them show: see `Documentation/findings/`, and
//! [`crate::defect`] for those that our own pins show.

use crate::{
    process::Rights,
    raw_pin::{RW, bed, pin},
};
use anyhow::Result;
use harness::{Context, Scenario, Shows, Signature, defect, locked_memory};
use testbed::{PAGE, at, program};

macro_rules! program {
    ($file:literal) => {
        |context| replay(context, include_str!(concat!("defects/", $file, ".ops")))
    };
}

/// A defect that shows as a difference, which isn't about dirty pages.
const fn shows(defect: &'static str, what: &'static str) -> Signature {
    let shows = Shows::Difference { what, lost: &[], spurious: &[] };
    Signature { defect, shows, complaints: &[] }
}

pub const SCENARIOS: &[Scenario] = &[
    defect(
        "type1/defect/D11-before-the-first",
        "a page just before a mapping can't be pinned, whatever the offset",
        program!("D11-before-the-first"),
        shows("D11", "device 0 RAW_PIN 0x3ffff001+0x1000 prot 0x3: ok*, but must be: EINVAL"),
    ),
    defect(
        "type1/defect/D11-seam-descending",
        "the last page of a mapping is pinned, not the one before the next mapping's memory",
        program!("D11-seam-descending"),
        shows("D11", "memory: what is before that of the mapping at 0x40004000 was written*"),
    ),
    defect(
        "type1/defect/D11-seam-of-three",
        "the same if the next mapping is the root of the tree, because there are three",
        program!("D11-seam-of-three"),
        shows("D11", "memory: what is before that of the mapping at 0x40004000 was written*"),
    ),
    defect(
        "type1/defect/D11-unpin-misses",
        "what was pinned is found by its unpin, whatever was mapped since",
        program!("D11-unpin-misses"),
        Signature {
            complaints: &["WARNING: drivers/vfio/vfio_iommu_type1.c:*vfio_remove_dma*"],
            ..shows("D11", "VmLck is *")
        },
    ),
    defect(
        "type1/defect/D12-locked-twice",
        "one page that is pinned at two offsets is locked once",
        program!("D12-locked-twice"),
        shows("D12", "VmLck is *"),
    ),
    defect(
        "type1/defect/D12-limit",
        "a page that is locked can be pinned at another offset, however little more may be locked",
        limit,
        shows("D12", "device 0 RAW_PIN 0x40001800+0x1000 prot 0x3: ENOMEM, but must be: ok*"),
    ),
    defect(
        "type1/defect/D12-last-page",
        "the last page of the address space can be pinned at any offset",
        program!("D12-last-page"),
        shows(
            "D12",
            "device 0 RAW_PIN 0xfffffffffffff800+0x1000 prot 0x3: EOVERFLOW, but must be: ok*",
        ),
    ),
];

fn limit(context: &Context<'_>) -> Result<()> {
    let mut bed = bed(context)?;
    let _rights = Rights::limit(locked_memory()? + PAGE)?;
    bed.limit_locked_pages(Some(1));
    bed.map(0..4)?;
    bed.pin(1..2)?;
    bed.must(pin(at(1, 0x800), 1, RW))
}

fn replay(context: &Context<'_>, text: &str) -> Result<()> {
    drop(bed(context)?);
    program::run(context, &program::parse(text)?)?.map_err(|failed| failed.error)
}
