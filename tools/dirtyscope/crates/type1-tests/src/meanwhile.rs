// SPDX-License-Identifier: GPL-2.0-only

//! What one thread does while another one's unmap waits for devices.

use anyhow::{Result, anyhow, ensure};
use dirty_model::Errno;
use harness::{Context, Scenario, Shows, Signature, defect};
use mdev_dma::MdevDma;
use std::{sync::Arc, thread, time::Instant};
use testbed::{PAGE, at, busy, fixture::LONG, same, status};
use vfio_client::{
    Container, Group, MapArgs, Memory, UnmapArgs,
    uapi::{VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE},
};

pub const SCENARIOS: &[Scenario] = &[defect(
    "type1/defect/D25-unmap-again",
    "an unmap leaves alone what is mapped while it waits for devices",
    unmap_again,
    Signature {
        defect: "D25",
        shows: Shows::Difference {
            what: "bytes unmapped is 0x3000, not 0x2000",
            lost: &[],
            spurious: &[],
        },
        complaints: &[],
    },
)];

/// A range of two mappings, of which the second is pinned. When the first one has been unmapped, another
/// one takes its place.
fn unmap_again(context: &Context<'_>) -> Result<()> {
    let nodes = [context.device(0)?.node()?, context.device(1)?.node()?];
    let container = Container::new(Group::open(&nodes[0])?)?;
    container.attach(Group::open(&nodes[1])?)?;
    let memory = &Arc::new(Memory::new(PAGE as usize)?);
    let (size, flags) = (PAGE, VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE);
    let map = |page| {
        let iova = at(page, 0);
        status(container.map(&MapArgs { memory, offset: 0, iova, size, flags, argsz: None }))
    };
    for page in 0..2 {
        ensure!(map(page)? == Ok(()), "nothing can be mapped");
    }
    let busy = busy(&container, &nodes[0])?;
    let device = MdevDma::open(&container, &nodes[1])?;
    ensure!(device.pin(at(1, 0), PAGE)?.status == 0, "a page can't be pinned");
    let its = container.clone();
    let unmap = thread::spawn(move || {
        its.unmap(&UnmapArgs { iova: at(0, 0), size: 2 * PAGE, ..Default::default() })
    });
    let start = Instant::now();
    while let Err(errno) = map(0)? {
        ensure!(errno == Errno::EEXIST, "MAP: {errno:?}");
        ensure!(start.elapsed() < LONG, "the mapping stays");
    }
    let unmapped = unmap.join().map_err(|_| anyhow!("a thread panicked"))??;
    busy.stop()?;
    same("bytes unmapped", 2 * PAGE, unmapped)?;
    ensure!(device.pin(at(0, 0), PAGE)?.status == 0, "what was mapped meanwhile isn't there");
    Ok(())
}
