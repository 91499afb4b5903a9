// SPDX-License-Identifier: GPL-2.0-only

//! What is in progress on a container while its last group leaves.

use crate::{OneCpu, PANIC_ON_OOPS};
use anyhow::{Result, bail, ensure};
use dirty_model::Errno;
use harness::{Context, Scenario, Setting, Shows, Signature, Stuck, defect, stacks};
use std::{
    process,
    sync::{
        Arc,
        mpsc::{RecvTimeoutError, Sender, channel},
    },
    thread,
    time::Duration,
};
use testbed::{PAGE, at, status};
use vfio_client::{
    BitmapArgs, Container, Group, Leave, MapArgs, Memory,
    uapi::{VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE},
};

pub const SCENARIOS: &[Scenario] = &[defect(
    "type1/killer/D26-map-while-leaving",
    "a MAP that waits while the last group leaves is answered, or refused",
    map_while_leaving,
    Signature { defect: "D26", shows: Shows::Hang(&["vfio_iommu_type1_ioctl+"]), complaints: &[] },
)];

/// So that a thread is where it waits.
const A_WHILE: Duration = Duration::from_millis(20);

/// Does something in a thread of its own, and sends what came of it.
fn spawn(
    container: &Arc<Container>,
    send: &Sender<Result<Result<(), Errno>>>,
    f: impl FnOnce(&Container) -> vfio_client::Result<()> + Send + 'static,
) {
    let (container, send) = (container.clone(), send.clone());
    thread::spawn(move || send.send(status(f(&container))));
    thread::sleep(A_WHILE);
}

/// A read of the bitmap holds `iommu->lock` while nobody serves its buffer. First the group's leave waits
/// for that, then MAPs do. When the read goes on, the group leaves, and another one comes.
fn map_while_leaving(context: &Context<'_>) -> Result<()> {
    const ROUNDS: u64 = 5;
    const MAPS: u64 = 8;
    let nodes = [context.device(0)?.node()?, context.device(1)?.node()?];
    let memory = Arc::new(Memory::new(PAGE as usize)?);
    let flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;
    let _no_panic = Setting::new(PANIC_ON_OOPS, "0")?;
    let _one_cpu = OneCpu::new()?;
    for _ in 0..ROUNDS {
        let container = Container::new(Group::open(&nodes[0])?)?;
        let map = move |container: &Container, memory: &Arc<Memory>, page| {
            let (offset, iova, size) = (0, at(page, 0), PAGE);
            container.map(&MapArgs { memory, offset, iova, size, flags, argsz: None })
        };
        map(&container, &memory, 0)?;
        container.dirty_start()?;
        let buffer = Arc::new(Memory::new(PAGE as usize)?);
        let waits = buffer.unserved()?;

        let (send, answers) = channel();
        let bitmap = BitmapArgs { pgsize: PAGE, size: 8 };
        let its = buffer.clone();
        spawn(&container, &send, move |it| it.dirty_bitmap_into(at(0, 0), PAGE, &bitmap, &its, 0));
        let (leaves, comes) = (nodes[0].group(), Group::open(&nodes[1])?);
        spawn(&container, &send, move |it| {
            it.detach(leaves, Leave::Unset)?;
            it.attach(comes)
        });
        for page in 1..=MAPS {
            let memory = memory.clone();
            spawn(&container, &send, move |it| map(it, &memory, page));
        }
        drop((send, waits));
        for _ in 0..MAPS + 2 {
            match answers.recv_timeout(Duration::from_secs(2)) {
                Ok(answer) => {
                    let answer = answer?;
                    ensure!(matches!(answer, Ok(()) | Err(Errno::EINVAL)), "{answer:?}");
                }
                Err(RecvTimeoutError::Disconnected) => bail!("a thread panicked"),
                Err(RecvTimeoutError::Timeout) => {
                    // Closing it waits for the lock that these wait for.
                    std::mem::forget(container);
                    return Err(Stuck(stacks(process::id())).into());
                }
            }
        }
    }
    Ok(())
}
