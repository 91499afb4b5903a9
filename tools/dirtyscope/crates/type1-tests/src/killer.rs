// SPDX-License-Identifier: GPL-2.0-only

//! Defects of type1 after which the kernel can't be used any more: locks that nobody releases, tasks
//! that can't be killed. Each wants a boot of its own.

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use dirty_model::Errno;
use harness::{
    Context, Failure, Scenario, Setting, Shows, Signature, Skip, Stuck, count_blocked, defect,
    stacks,
};
use mdev_dma::{MdevDma, Opcode};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
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

/// All threads that are made until this is dropped share one CPU: one that wakes up gets its turn soon,
/// in the middle of what another one does in the kernel. In a VM, another CPU may have to wait.
struct OneCpu(CpuSet);

impl OneCpu {
    fn new() -> Result<Self> {
        let old = sched_getaffinity(None)?;
        let mut one = CpuSet::new();
        one.set((0..CpuSet::MAX_CPU).find(|&cpu| old.is_set(cpu)).unwrap_or(0));
        sched_setaffinity(None, &one).context("sched_setaffinity")?;
        Ok(Self(old))
    }
}

impl Drop for OneCpu {
    fn drop(&mut self) {
        if let Err(error) = sched_setaffinity(None, &self.0) {
            eprintln!("dirtyscope: sched_setaffinity: {error}");
        }
    }
}

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

/// Whether the kernel panics for an oops: not while a scenario looks at what one leaves.
const PANIC_ON_OOPS: &str = "/proc/sys/kernel/panic_on_oops";

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

/// Has a thread do something to `mapped` that doesn't return if the kernel kills it, with locks that
/// nobody releases then.
fn or_stuck<T: Send + 'static>(
    what: &str,
    mapped: Mapped,
    f: impl FnOnce(&Mapped) -> T + Send + 'static,
) -> Result<T> {
    let mapped = Arc::new(mapped);
    let (its, (send, done)) = (mapped.clone(), channel());
    thread::spawn(move || send.send(f(&its)));
    match done.recv_timeout(Duration::from_secs(2)) {
        Ok(value) => Ok(value),
        Err(RecvTimeoutError::Disconnected) => bail!("the thread for {what} panicked"),
        Err(RecvTimeoutError::Timeout) => {
            // Closing these waits for the locks.
            std::mem::forget(mapped);
            Err(Stuck(format!("{what} does not return")).into())
        }
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
