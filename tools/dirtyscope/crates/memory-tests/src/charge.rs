// SPDX-License-Identifier: GPL-2.0-only

//! Who is charged for what a container takes of the kernel's memory.

use anyhow::Result;
use harness::{Cgroup, Context, Failure, Scenario, Shows, Signature, defect};
use testbed::{Op, PAGE, Testbed};
use vfio_client::uapi::{VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE};

pub const SCENARIOS: &[Scenario] = &[defect(
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
)];

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
