// SPDX-License-Identifier: GPL-2.0-only

//! Pins of what isn't mapped, and unpins that miss, with one thread.

use crate::{PANIC_ON_OOPS, or_stuck};
use anyhow::{Result, ensure};
use dirty_model::Errno;
use harness::{Context, Failure, Scenario, Setting, Shows, Signature, Skip, defect};
use mdev_dma::{MdevDma, Opcode};
use std::sync::Arc;
use testbed::{PAGE, at};
use vfio_client::{
    Container, Group, MapArgs, Memory, UnmapArgs,
    uapi::{VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE},
};

pub const SCENARIOS: &[Scenario] = &[
    defect(
        "type1/killer/D11-bit-astray",
        "a page just before a mapping can't be pinned, and no bit before its bitmap is set",
        bit_astray,
        Signature {
            defect: "D11",
            shows: Shows::Hang(&["RAW_PIN does not return"]),
            complaints: &["BUG: unable to handle page fault for address: *", "Oops: Oops: *"],
        },
    ),
    defect(
        "type1/killer/D11-unmap-missed",
        "a page can be unmapped whose unpin came when other mappings had been made",
        unmap_missed,
        Signature {
            defect: "D11",
            shows: Shows::Hang(&["UNMAP does not return"]),
            complaints: &[
                "kernel BUG at drivers/vfio/vfio_iommu_type1.c:*",
                "Oops: invalid opcode: *",
            ],
        },
    ),
];

/// A device with raw pins in a container with `mappings` of 4 pages each, one behind the other.
struct Mapped {
    device: MdevDma,
    container: Arc<Container>,
}

impl Mapped {
    fn new(context: &Context<'_>) -> Result<Self> {
        let node = context.device(0)?.node()?;
        let container = Container::new(Group::open(&node)?)?;
        let device = MdevDma::open(&container, &node)?;
        let raw_pins = device.limits()?.raw_pins;
        ensure!(raw_pins, Skip("load rust_mdev_dma with raw_pins=1".into()));
        Ok(Self { device, container })
    }

    /// Maps 4 pages.
    fn map(&self, page: u64) -> Result<()> {
        let (size, flags) = (4 * PAGE, VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE);
        let memory = &Arc::new(Memory::new(size as usize)?);
        let (offset, iova, argsz) = (0, at(page, 0), None);
        Ok(self.container.map(&MapArgs { memory, offset, iova, size, flags, argsz })?)
    }
}

fn bit_astray(context: &Context<'_>) -> Result<()> {
    let mapped = Mapped::new(context)?;
    mapped.map(0)?;
    mapped.container.dirty_start()?;
    let _no_panic = Setting::new(PANIC_ON_OOPS, "0")?;
    let (op, before) = (Opcode::RawPin as u32, at(0, 0) - PAGE + 8);
    let outcome = or_stuck("RAW_PIN", mapped, move |it| it.device.run(op, before, PAGE, 3))??;
    let refused = outcome.status == Errno::EINVAL.0 as u32;
    Failure::unless_none((!refused).then(|| format!("RAW_PIN before a mapping: {outcome:?}")))
}

fn unmap_missed(context: &Context<'_>) -> Result<()> {
    let mapped = Mapped::new(context)?;
    let raw = |op: Opcode| mapped.device.run(op as u32, at(3, 0x800), PAGE, 3);
    mapped.map(0)?;
    ensure!(raw(Opcode::RawPin)?.status == 0, "a page can't be pinned");
    mapped.map(4)?;
    mapped.map(8)?;
    ensure!(raw(Opcode::RawUnpin)?.status == 0, "a page can't be unpinned");
    let _no_panic = Setting::new(PANIC_ON_OOPS, "0")?;
    let args = UnmapArgs { iova: at(0, 0), size: 4 * PAGE, ..Default::default() };
    let unmapped = or_stuck("UNMAP", mapped, move |it| it.container.unmap(&args))??;
    testbed::same("bytes unmapped", args.size, unmapped)
}
