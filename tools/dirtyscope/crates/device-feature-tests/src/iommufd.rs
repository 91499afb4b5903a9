// SPDX-License-Identifier: GPL-2.0-only

//! The device by iommufd, without group and container: that it does the same.

use anyhow::{Result, ensure};
use dirty_model::Errno;
use harness::{Context, Scenario, Skip, scenario};
use mdev_dma::{
    GeneratorConfig, IN_PROGRESS, MdevDma, Opcode, pattern,
    uapi::{
        RUST_MDEV_DMA_GEN_DMA_RW as DMA_RW, RUST_MDEV_DMA_GEN_PIN as PIN,
        RUST_MDEV_DMA_GEN_PINNED as PINNED,
    },
};
use std::{ops::Range, sync::Arc, thread, time::Duration};
use testbed::fixture::{LONG, check_generated, succeeded};
use testbed::{PAGE, at, same, status};
use vfio_client::{Ioas, Memory};

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
];

const PAGES: u64 = 200;

/// The device in an address space with so many pages of memory, from page 0 on.
struct Opened {
    // Closed in this order.
    device: MdevDma,
    ioas: Arc<Ioas>,
    memory: Arc<Memory>,
}

impl Opened {
    fn new(context: &Context<'_>) -> Result<Self> {
        let skip = |what: &str| Skip(format!("this kernel has no {what}"));
        let ioas = match status(Ioas::new())? {
            Err(Errno::ENOENT) => return Err(skip("/dev/iommu").into()),
            ioas => ioas.map_err(|errno| anyhow::anyhow!("/dev/iommu: {errno}"))?,
        };
        let device = match MdevDma::open_in(&ioas, &context.device(0)?) {
            Err(error) if Errno(error.errno()) == Errno::ENOENT => {
                return Err(skip("/dev/vfio/devices").into());
            }
            device => device?,
        };
        let memory = Arc::new(Memory::new((PAGES * PAGE) as usize)?);
        ioas.map(&memory, at(0, 0))?;
        Ok(Self { device, ioas, memory })
    }

    fn unmap(&self) -> Result<()> {
        same("bytes unmapped", PAGES * PAGE, self.ioas.unmap(at(0, 0), PAGES * PAGE)?)
    }

    /// Whether bytes have the pattern of a seed.
    fn has(&self, bytes: Range<u64>, seed: u64) -> Result<()> {
        let mut found = vec![0; (bytes.end - bytes.start) as usize];
        let mut expected = found.clone();
        self.memory.read((bytes.start - at(0, 0)) as usize, &mut found);
        pattern::fill(&mut expected, seed, bytes.start);
        ensure!(found == expected, "{bytes:x?} haven't the pattern of {seed}");
        Ok(())
    }
}

fn commands(context: &Context<'_>) -> Result<()> {
    let opened = Opened::new(context)?;
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
    let opened = Opened::new(context)?;
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
    let opened = Opened::new(context)?;
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
