// SPDX-License-Identifier: GPL-2.0-only

//! Containers and groups: how they end.

use anyhow::{Result, ensure};
use dirty_model::Errno;
use harness::{Context, Scenario, locked_memory, scenario};
use mdev_dma::Opcode;
use testbed::{Op, PAGE, Testbed, at, command, pages, same, status};
use vfio_client::{Group, Leave};

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "type1/container/closed",
        "a container closed while tracking, with pins, leaves nothing behind",
        container_closed,
    ),
    scenario(
        "type1/container/group-busy",
        "a group that is open can't be opened again, until it is closed",
        group_busy,
    ),
    scenario(
        "type1/container/groups-take-turns",
        "of two groups either may leave, the one that joined first or last, and only that one has left",
        groups_take_turns,
    ),
    scenario(
        "type1/container/bad-ioctl",
        "an ioctl that type1 doesn't know is ENOTTY, and one whose argument can't be read EFAULT",
        bad_ioctl,
    ),
];

fn container_closed(context: &Context<'_>) -> Result<()> {
    let before = locked_memory()?;
    for _ in 0..3 {
        same("VmLck", before, locked_memory()?)?;
        let mut bed = Testbed::with_pages(context, 64)?;
        bed.refused(Errno::EINVAL, Op::get_bitmap(at(0, 0), 64 * PAGE))?;
        bed.check()?;
        bed.add_device()?;
        bed.start()?;
        bed.pin(0..64)?;
        bed.must(command(1, Opcode::Pin, pages(32..64)))?;
        bed.dma_write(pages(5..6))?;
    }
    Ok(())
}

fn group_busy(context: &Context<'_>) -> Result<()> {
    let node = context.device(0)?.node()?;
    let bed = Testbed::new(context)?;
    let open = || status(Group::open(&node).map(drop));
    let while_open = open()?;
    ensure!(while_open == Err(Errno::EBUSY), "opening it twice: {while_open:?}");
    drop(bed);
    let closed = open()?;
    ensure!(closed.is_ok(), "opening it after it was closed: {closed:?}");
    Ok(())
}

fn groups_take_turns(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 16)?;
    bed.add_device()?;
    bed.start()?;
    // Each is the first to have joined once.
    for device in [0, 1, 0] {
        let other = 1 - device;
        bed.must(command(other, Opcode::Pin, pages(3..4)))?;
        bed.must(Op::Close { device })?;
        bed.must(Op::Leave { device, by: Leave::Unset })?;
        bed.reports(&[3..4])?;
        bed.must(Op::Join { device })?;
        bed.must(Op::Open { device })?;
        bed.must(command(device, Opcode::DmaWrite, pages(7..8)))?;
        bed.must(command(other, Opcode::Unpin, pages(3..4)))?;
        bed.reports(&[3..4, 7..8])?;
        bed.check()?;
    }
    Ok(())
}

fn bad_ioctl(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 1)?;
    for open in [true, false] {
        // VFIO_IOMMU_ENABLE and VFIO_IOMMU_DISABLE are of another driver; nothing has the last. Behind them are
        // GET_INFO, MAP_DMA, UNMAP_DMA and DIRTY_PAGES.
        let unknown = [15, 16, 99].map(|nr| (nr, Errno::ENOTTY));
        let known = [12, 13, 14, 17].map(|nr| (nr, Errno::EFAULT));
        for (nr, errno) in unknown.into_iter().chain(known) {
            let answer = status(bed.container().ioctl_null(nr))?;
            ensure!(answer == Err(errno), "ioctl VFIO_BASE + {nr}: {answer:?}, not {errno}");
        }
        if open {
            bed.must(Op::Close { device: 0 })?;
        }
    }
    bed.check()
}
