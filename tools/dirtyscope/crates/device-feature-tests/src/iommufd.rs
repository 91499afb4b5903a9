// SPDX-License-Identifier: GPL-2.0-only

//! The device by iommufd, without group and container: that it does the same.

use anyhow::{Result, ensure};
use dirty_model::Errno;
use harness::{Context, Failure, Scenario, Shows, Signature, defect, scenario};
use mdev_dma::{
    GeneratorConfig, IN_PROGRESS, MdevDma, Opcode,
    uapi::{
        RUST_MDEV_DMA_GEN_DMA_RW as DMA_RW, RUST_MDEV_DMA_GEN_PIN as PIN,
        RUST_MDEV_DMA_GEN_PINNED as PINNED,
    },
};
use std::{thread, time::Duration};
use testbed::{
    PAGE, at,
    direct::Direct,
    fixture::{Fixture, LONG, check_generated, succeeded},
    same,
};
use vfio_client::{Container, Leave};

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "device/iommufd/commands",
        "commands pin, write and read memory, in the foreground and in the background",
        commands,
    ),
    scenario(
        "device/iommufd/unmap",
        "parts of what was pinned can be unpinned; what is unmapped is, and can't be written",
        unmap,
    ),
    scenario(
        "device/iommufd/generator",
        "the generator writes in all ways, and stops when its memory is unmapped",
        generator,
    ),
    defect(
        "device/iommufd/D17-group-reopened",
        "a group whose device is open can't be opened by another, who would have that write its memory",
        |context| group_reopened(context, Leave::Close),
        WRITES_ANOTHERS,
    ),
    defect(
        "device/iommufd/D17-group-unset",
        "a group whose device is open can't be taken out of its container, and into another's",
        |context| group_reopened(context, Leave::Unset),
        WRITES_ANOTHERS,
    ),
];

const PAGES: u64 = 200;

const ANOTHERS: &str = "who has the group of an open device next has it write another's memory";

const WRITES_ANOTHERS: Signature = Signature {
    defect: "D17",
    shows: Shows::Difference { what: ANOTHERS, lost: &[], spurious: &[] },
    complaints: &[],
};

fn commands(context: &Context<'_>) -> Result<()> {
    let opened = Direct::new(context, PAGES)?;
    let device = &opened.device;
    succeeded("PIN", device.pin(at(0, 0), 100 * PAGE)?)?;
    same("PINS", 100, device.pins()?)?;
    succeeded("WRITE", device.write_pinned(at(3, 5), 20 * PAGE, 1)?)?;
    opened.has(at(3, 5)..at(23, 5), 1)?;
    succeeded("DMA_WRITE", device.dma_write(at(90, 1), 50 * PAGE, 2)?)?;
    opened.has(at(90, 1)..at(140, 1), 2)?;
    let (iova, length) = (at(120, 3), 60 * PAGE);
    device.run_in_background(Opcode::DmaWrite, iova, length, 3)?;
    succeeded("DMA_WRITE in the background", device.wait(LONG)?)?;
    opened.has(iova..iova + length, 3)?;
    let digest = device.dma_read(at(0, 0), 100 * PAGE)?.digest;
    same("digest", digest, device.read_pinned(at(0, 0), 100 * PAGE)?.digest)?;
    succeeded("UNPIN", device.unpin(at(0, 0), 100 * PAGE)?)?;
    same("PINS", 0, device.pins()?)?;
    let outcome = device.pin(at(PAGES, 0), PAGE)?;
    ensure!(outcome.status != 0, "PIN of what isn't mapped: {outcome:?}");
    device.device().reset()?;
    Ok(())
}

fn unmap(context: &Context<'_>) -> Result<()> {
    let opened = Direct::new(context, PAGES)?;
    let device = &opened.device;
    for _ in 0..2 {
        succeeded("PIN", device.pin(at(0, 0), PAGES * PAGE)?)?;
        succeeded("PIN", device.pin(at(5, 0), PAGE)?)?;
        // iommufd wants ranges back as they were pinned, the device's user doesn't care.
        succeeded("UNPIN of a part", device.unpin(at(10, 0), 20 * PAGE)?)?;
        succeeded("PIN across parts", device.pin(at(40, 0), 60 * PAGE)?)?;
        succeeded("UNPIN across parts", device.unpin(at(35, 0), 30 * PAGE)?)?;
        opened.unmap()?;
        same("PINS", 0, device.pins()?)?;
        let outcome = device.write_pinned(at(0, 0), PAGE, 1)?;
        same("STATUS of WRITE", Errno::ENXIO.0 as u64, outcome.status.into())?;
        let outcome = device.dma_write(at(0, 0), PAGE, 1)?;
        ensure!(outcome.status != 0, "DMA_WRITE to what isn't mapped: {outcome:?}");
        opened.ioas.map(&opened.memory, at(0, 0))?;
    }
    // Closing unpins the rest.
    succeeded("PIN", device.pin(at(0, 0), PAGES * PAGE)?)
}

fn generator(context: &Context<'_>) -> Result<()> {
    let opened = Direct::new(context, PAGES)?;
    let device = &opened.device;
    succeeded("PIN", device.pin(at(0, 0), PAGES * PAGE)?)?;
    let config = GeneratorConfig {
        iova: at(0, 0),
        length: PAGES * PAGE,
        seed: 9,
        limit: 0,
        rate: 0,
        mode: PINNED | DMA_RW | PIN,
    };
    let check = |counter| -> Result<()> {
        let mut memory = vec![0; opened.memory.len()];
        opened.memory.read(0, &mut memory);
        check_generated(&memory, &config, counter)
    };
    device.start_generator(&config)?;
    while device.generator()?.counter < 2 * PAGES {
        same("GEN_STATUS", IN_PROGRESS.into(), device.generator()?.status.into())?;
        thread::sleep(Duration::from_millis(1));
    }
    check(device.stop_generator()?.counter)?;
    device.continue_generator(&config)?;
    opened.unmap()?;
    while device.generator()?.status == IN_PROGRESS {
        thread::sleep(Duration::from_millis(1));
    }
    check(device.generator()?.counter)
}

fn group_reopened(context: &Context<'_>, by: Leave) -> Result<()> {
    // By type1, an open device keeps the group, and its file.
    let by_type1 = Fixture::new(context, 1)?;
    ensure!(by_type1.reopen_group(by)?.is_none(), "a group of type1 was opened again");
    drop(by_type1);

    let fixture = Fixture::by_iommufd(context, 1)?;
    let Some(group) = fixture.reopen_group(by)? else { return Ok(()) };
    let container = Container::by_iommufd(group)?;
    let other = MdevDma::open(&container, &context.device(0)?.node()?)?;
    let outcome = other.dma_write(at(0, 0), PAGE, 1)?;
    let written = fixture.page(0).iter().any(|&byte| byte != 0);
    ensure!(outcome.status == 0 && written, "it was opened, and then {outcome:?}");
    Failure::unless_none(Some(ANOTHERS.into()))
}
