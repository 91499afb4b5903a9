// SPDX-License-Identifier: GPL-2.0-only

//! What happens while an unmap has devices unpin, with `iommu->lock` dropped.

use crate::{OneCpu, PANIC_ON_OOPS};
use anyhow::{Result, anyhow, bail, ensure};
use dirty_model::Errno;
use harness::{
    Context, Failure, Scenario, Setting, Shows, Signature, Stuck, count_blocked, defect, stacks,
};
use mdev_dma::MdevDma;
use std::{
    process,
    sync::{
        Arc, Barrier,
        mpsc::{RecvTimeoutError, channel},
    },
    thread,
    time::Duration,
};
use testbed::{PAGE, at, status};
use vfio_client::{
    BitmapArgs, Container, Group, MapArgs, Memory, UnmapArgs,
    uapi::{VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE},
};

pub const SCENARIOS: &[Scenario] = &[
    defect(
        "type1/killer/D2-unmap-deadlock",
        "two threads that unmap pinned ranges of one container don't block one another",
        unmap_deadlock,
        Signature {
            defect: "D2",
            shows: Shows::Hang(&["vfio_iommu_type1_unpin_pages+", "vfio_iommu_type1_ioctl+"]),
            complaints: &[],
        },
    ),
    defect(
        "type1/killer/D10-stop-in-unmap",
        "STOP while an UNMAP with bitmap waits for devices makes it fail, no more",
        stop_in_unmap,
        Signature {
            defect: "D10",
            shows: Shows::Hang(&["UNMAP with bitmap does not return"]),
            complaints: &[
                "usercopy: Kernel memory exposure attempt detected from *",
                "kernel BUG at mm/usercopy.c:*",
                "Oops: invalid opcode: *",
            ],
        },
    ),
];

fn unmap_deadlock(context: &Context<'_>) -> Result<()> {
    const ROUNDS: u32 = 10;
    // So many that others get a turn while they are unpinned.
    const SIZE: u64 = 4096 * PAGE;
    let nodes = [context.device(0)?.node()?, context.device(1)?.node()?];
    let container = Container::new(Group::open(&nodes[0])?)?;
    container.attach(Group::open(&nodes[1])?)?;
    let memory = Arc::new(Memory::new(SIZE as usize)?);
    let pinned = Arc::new(Barrier::new(nodes.len()));
    let (send, progress) = channel();
    let _one_cpu = OneCpu::new()?;
    let mut threads = Vec::new();
    for (node, iova) in nodes.iter().zip([at(0, 0), at(1 << 20, 0)]) {
        let device = MdevDma::open(&container, node)?;
        let (container, memory) = (container.clone(), memory.clone());
        let (pinned, send) = (pinned.clone(), send.clone());
        threads.push(thread::spawn(move || -> Result<()> {
            let flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;
            let map = MapArgs { memory: &memory, offset: 0, iova, size: SIZE, flags, argsz: None };
            for _ in 0..ROUNDS {
                container.map(&map)?;
                ensure!(device.pin(iova, SIZE)?.status == 0, "pages can't be pinned");
                pinned.wait();
                container.unmap(&UnmapArgs { iova, size: SIZE, ..Default::default() })?;
                send.send(())?;
            }
            Ok(())
        }));
    }
    drop(send);
    for _ in 0..nodes.len() as u32 * ROUNDS {
        while let Err(error) = progress.recv_timeout(Duration::from_secs(1)) {
            if error == RecvTimeoutError::Disconnected {
                break;
            }
            // Nobody else uses the container: who waits for these two, if not each other?
            if count_blocked(process::id()) == nodes.len() {
                std::mem::forget(container);
                return Err(Stuck(stacks(process::id())).into());
            }
        }
    }
    for thread in threads {
        thread.join().map_err(|_| anyhow!("a thread panicked"))??;
    }
    Ok(())
}

fn stop_in_unmap(context: &Context<'_>) -> Result<()> {
    const ROUNDS: u64 = 4;
    // So many that STOP gets a turn while they are unpinned.
    const SIZE: u64 = 32768 * PAGE;
    let node = context.device(0)?.node()?;
    let container = Container::new(Group::open(&node)?)?;
    let device = MdevDma::open(&container, &node)?;
    let memory = Arc::new(Memory::new(SIZE as usize)?);
    let (iova, size) = (at(0, 0), SIZE);
    let flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;
    let map = MapArgs { memory: &memory, offset: 0, iova, size, flags, argsz: None };
    let unmap = UnmapArgs { iova, size, ..Default::default() };
    let _no_panic = Setting::new(PANIC_ON_OOPS, "0")?;
    let _one_cpu = OneCpu::new()?;
    for round in 0..ROUNDS {
        container.map(&map)?;
        container.dirty_start()?;
        ensure!(device.pin(iova, SIZE)?.status == 0, "pages can't be pinned");
        let (send, unmapped) = channel();
        let its = container.clone();
        thread::spawn(move || {
            let bitmap = BitmapArgs { pgsize: PAGE, size: SIZE / PAGE / 8 };
            send.send(status(its.unmap_dirty(&unmap, &bitmap).map(drop)))
        });
        thread::sleep(Duration::from_millis(10 * (round + 1)));
        container.dirty_stop()?;
        match unmapped.recv_timeout(Duration::from_secs(2)) {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(Errno::EINVAL))) => drop(container.unmap(&unmap)?),
            Ok(other) => Failure::unless_none(Some(format!("UNMAP with bitmap: {:?}", other?)))?,
            Err(RecvTimeoutError::Disconnected) => bail!("the thread that unmaps panicked"),
            Err(RecvTimeoutError::Timeout) => {
                // The kernel killed the thread, with a lock that closing these waits for.
                std::mem::forget((device, container));
                return Err(Stuck("UNMAP with bitmap does not return".into()).into());
            }
        }
    }
    Ok(())
}
