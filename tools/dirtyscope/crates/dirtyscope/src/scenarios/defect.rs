// SPDX-License-Identifier: GPL-2.0-only

//! Defects of type1, each with the shortest sequence that shows it: see `Documentation/findings/`.
//!
//! They state what the contract says, as all scenarios do. That kernels are known to fail them is
//! said by their names: see [`Scenario::defect`].

use super::{Context, Scenario, Stuck};
use crate::testbed::{Failure, Op, PAGE, Testbed, at, program, status};
use crate::worker;
use anyhow::{Context as _, Result, anyhow, ensure};
use dirty_model::Errno;
use mdev_dma::MdevDma;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::{
    fs::{self, File},
    io::{Read, Seek, SeekFrom},
    os::unix::fs::OpenOptionsExt,
    process,
    sync::{
        Arc, Barrier,
        mpsc::{RecvTimeoutError, channel},
    },
    thread,
    time::{Duration, Instant},
};
use vfio_client::{
    BitmapArgs, Container, Group, MapArgs, Memory, UnmapArgs,
    uapi::{VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE},
};

/// A program that the fuzzer found and shrank; but D4's, which no compiler known breaks.
macro_rules! found {
    ($file:literal) => {
        |context| replay(context, include_str!(concat!("defects/", $file, ".ops")))
    };
}

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "defect/D1-pgsize-0",
        about: "GET_BITMAP with a page size of 0 is refused without undefined behaviour",
        run: pgsize_0,
    },
    Scenario {
        name: "defect/D3-read-cost",
        about: "reading the last of many mappings costs about as much as reading the first",
        run: read_cost,
    },
    Scenario {
        name: "defect/D4-no-flag",
        about: "DIRTY_PAGES without a flag is refused, and changes nothing",
        run: found!("D4-no-flag"),
    },
    Scenario {
        name: "defect/D5-pin-unwind",
        about: "a batch of pins that fails in the middle leaves nothing dirty",
        run: found!("D5-pin-unwind"),
    },
    Scenario {
        name: "defect/D6-shift-stale",
        about: "a mapping that was read at an odd place of a bitmap has no pages after its end",
        run: found!("D6-shift-stale"),
    },
    Scenario {
        name: "defect/D6-shift-fault",
        about: "a read at an odd place that faults leaves the mapping's dirty pages where they are",
        run: found!("D6-shift-fault"),
    },
    Scenario {
        name: "defect/D6-shift-merge",
        about: "a mapping that was read behind another one in a word has no pages of that one",
        run: found!("D6-shift-merge"),
    },
    Scenario {
        name: "defect/D7-read-consumes",
        about: "a read of two mappings that faults in the second forgets nothing of the first",
        run: found!("D7-read-consumes"),
    },
    Scenario {
        name: "defect/D8-unmap-partial",
        about: "an unmap with bitmap that faults in the second mapping unmaps nothing",
        run: found!("D8-unmap-partial"),
    },
    Scenario {
        name: "defect/D9-dma-rw-partial",
        about: "what a vfio_dma_rw() wrote before it faulted is dirty",
        run: found!("D9-dma-rw-partial"),
    },
];

/// Scenarios that leave tasks behind that can't be killed, if the kernel has the defect.
pub const HANGS: &[Scenario] = &[
    Scenario {
        name: "defect/D2-unmap-deadlock",
        about: "two threads that unmap pinned ranges of one container don't block one another",
        run: unmap_deadlock,
    },
    Scenario {
        name: "defect/D10-stop-in-unmap",
        about: "STOP while an UNMAP with bitmap waits for devices makes it fail, no more",
        run: stop_in_unmap,
    },
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
        let given_back = sched_setaffinity(None, &self.0);
        debug_assert!(given_back.is_ok());
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
            if worker::count_blocked(process::id()) == nodes.len() {
                let what = format!("deadlock\n{}", worker::stacks(process::id()));
                std::mem::forget(container);
                return Err(Stuck(what).into());
            }
        }
    }
    for thread in threads {
        thread.join().map_err(|_| anyhow!("a thread panicked"))??;
    }
    Ok(())
}

/// A panic of the kernel for an oops, switched off until this is dropped.
struct NoPanic(String);

impl NoPanic {
    const PATH: &str = "/proc/sys/kernel/panic_on_oops";

    fn new() -> Result<Self> {
        let old = fs::read_to_string(Self::PATH).context(Self::PATH)?;
        fs::write(Self::PATH, "0").context(Self::PATH)?;
        Ok(Self(old))
    }
}

impl Drop for NoPanic {
    fn drop(&mut self) {
        if let Err(error) = fs::write(Self::PATH, &self.0) {
            eprintln!("dirtyscope: {}: {error}", Self::PATH);
        }
    }
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
    let mut messages = Messages::from_now()?;
    let _no_panic = NoPanic::new()?;
    let _one_cpu = OneCpu::new()?;
    context.expect_complaint(|| {
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
                Ok(other) => differs_if(Some(format!("UNMAP with bitmap: {:?}", other?)))?,
                Err(_) => {
                    // The kernel killed the thread, with a lock that closing these waits for.
                    std::mem::forget((device, container));
                    let text = messages.read()?;
                    let bug = text.lines().find(|line| line.contains("BUG")).unwrap_or("no answer");
                    return Err(Stuck(format!("UNMAP with bitmap: {bug}")).into());
                }
            }
        }
        Ok(())
    })
}

fn pgsize_0(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 1)?;
    bed.start()?;
    let mut messages = Messages::from_now()?;
    let bitmap = BitmapArgs { pgsize: 0, size: 8 };
    context.expect_complaint(|| {
        let refused = status(bed.container().dirty_bitmap(at(0, 0), PAGE, &bitmap))?;
        ensure!(refused == Err(Errno::EINVAL), "GET_BITMAP with pgsize 0: {refused:?}");
        Ok(())
    })?;
    let text = messages.read()?;
    differs_if(text.lines().find(|line| line.contains("UBSAN")).map(str::to_owned))
}

/// Fails with `what` there is, if any.
fn differs_if(what: Option<String>) -> Result<()> {
    what.map_or(Ok(()), |what| Err(Failure { what, ..Default::default() }.into()))
}

/// What the kernel logs from now on.
struct Messages(File);

impl Messages {
    fn from_now() -> Result<Self> {
        const O_NONBLOCK: i32 = 0o4000;
        let mut file = File::options().read(true).custom_flags(O_NONBLOCK).open("/dev/kmsg")?;
        file.seek(SeekFrom::End(0))?;
        Ok(Self(file))
    }

    /// All until now; a read gives one message.
    fn read(&mut self) -> Result<String> {
        let mut text = String::new();
        let mut message = [0; 8192];
        while let Ok(len @ 1..) = self.0.read(&mut message) {
            text.push_str(&String::from_utf8_lossy(&message[..len]));
        }
        Ok(text)
    }
}

fn read_cost(context: &Context<'_>) -> Result<()> {
    const MAPPINGS: u64 = 4000;
    const READS: u32 = 20;
    let mut bed = Testbed::new(context)?;
    for i in 0..MAPPINGS {
        bed.map(2 * i..2 * i + 1)?;
    }
    bed.start()?;
    let mut time = |page: u64| -> Result<Duration> {
        let start = Instant::now();
        for _ in 0..READS {
            bed.must(Op::get_bitmap(at(page, 0), PAGE))?;
        }
        Ok(start.elapsed())
    };
    // The best of some: other work on the machine only ever adds.
    let mut best = |page| (0..5).map(|_| time(page)).collect::<Result<Vec<_>>>();
    let first = best(0)?.into_iter().min().unwrap_or_default();
    let last = best(2 * (MAPPINGS - 1))?.into_iter().min().unwrap_or_default();
    differs_if((last >= 4 * first).then(|| {
        format!(
            "the last of {MAPPINGS} mappings takes {:.0?} to read, the first {:.0?}",
            last / READS,
            first / READS
        )
    }))
}

fn replay(context: &Context<'_>, text: &str) -> Result<()> {
    program::run(context, &program::parse(text)?)?.map_err(|failed| failed.error)
}
