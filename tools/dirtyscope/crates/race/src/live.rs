// SPDX-License-Identifier: GPL-2.0-only

//! A container, a device for each thread, and the threads.

use crate::{
    plan::{Act, Cpus, PLACES, Round, SMALL, Step, place, place_of, whole},
    record::{Marks, Record},
};
use anyhow::{Context as _, Result, anyhow, ensure};
use dirty_model::{Bitmap, Errno};
use harness::{Context, locked_memory};
use mdev_dma::{MdevDma, Outcome, PAGE};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::{
    hint::spin_loop,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};
use testbed::{Answer, Buffer, Op, status};
use vfio_client::{BitmapArgs, Container, DeviceNode, Group, MapArgs, Memory, UnmapArgs};

/// What is there when nothing is going on.
#[derive(Clone, Debug)]
pub struct Counters {
    /// PINS of the devices that are open.
    pub pins: Vec<Option<u64>>,
    pub dma_avail: u64,
    /// Bytes that this process has locked.
    pub locked: u64,
}

/// A container and memory, for any number of rounds.
pub struct World {
    lanes: Vec<Lane>,
    shared: Shared,
}

struct Shared {
    container: Arc<Container>,
    memory: Vec<Arc<Memory>>,
    cpus: CpuSet,
}

/// A thread's device.
struct Lane {
    number: usize,
    node: DeviceNode,
    joined: bool,
    device: Option<MdevDma>,
    /// What the registers of a command have: to ring again takes the doorbell only.
    prepared: Option<(u64, u64, u64)>,
}

impl World {
    /// With so many devices, which are open. Their groups, and one that stays, are in the container.
    pub fn new(context: &Context<'_>, devices: usize) -> Result<Self> {
        let container = Container::new(Group::open(&context.device(devices)?.node()?)?)?;
        let memory = PLACES.map(|pages| Memory::new(((pages.end - pages.start) * PAGE) as usize));
        let memory = memory.into_iter().map(|one| Ok(Arc::new(one?))).collect::<Result<_>>()?;
        let shared = Shared { container, memory, cpus: sched_getaffinity(None)? };
        let mut lanes = Vec::new();
        for number in 0..devices {
            let node = context.device(number)?.node()?;
            let mut lane = Lane { number, node, joined: false, device: None, prepared: None };
            lane.join(&shared)?;
            lane.open(&shared)?;
            lanes.push(lane);
        }
        Ok(Self { lanes, shared })
    }

    /// An open device.
    pub fn device(&self, lane: usize) -> Result<&MdevDma> {
        self.lanes[lane].device.as_ref().context("a device that isn't open")
    }

    /// What can be counted now.
    pub fn counters(&self) -> Result<Counters> {
        let pins = |lane: &Lane| lane.device.as_ref().map(MdevDma::pins).transpose();
        let avail = self.shared.container.info()?.dma_avail;
        Ok(Counters {
            pins: self.lanes.iter().map(pins).collect::<Result<_, _>>()?,
            dma_avail: avail.context("no VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL")?.into(),
            locked: locked_memory()?,
        })
    }

    /// Forgets what is in memory.
    pub fn clear_memory(&self) {
        // Nothing is written to the last one.
        for memory in &self.shared.memory[..SMALL] {
            memory.write(0, &vec![0; memory.len()]);
        }
    }

    /// The contents of the page at an IOVA.
    pub fn page(&self, iova: u64) -> Vec<u8> {
        let mut bytes = vec![0; PAGE as usize];
        if let Some(i) = place_of(iova) {
            self.shared.memory[i].read((iova - place(i).0) as usize, &mut bytes);
        }
        bytes
    }

    /// One thread does an operation.
    pub fn alone(&mut self, marks: &Marks, op: &Op) -> Result<Record> {
        let lane = op.device().unwrap_or(0);
        let act = Act::Op(op.clone());
        let start = marks.now();
        let (answer, written) = self.lanes[lane].perform(&self.shared, &act, &|_| ())?;
        Ok(Record { lane: None, act, time: start..marks.now(), answer, written })
    }

    /// All threads do what they have to do.
    pub fn together(&mut self, marks: &Marks, round: &Round) -> Result<Vec<Record>> {
        let (shared, waiting) = (&self.shared, AtomicUsize::new(round.lanes.len()));
        let (waiting, cpus) = (&waiting, round.cpus);
        thread::scope(|scope| {
            let threads: Vec<_> = self
                .lanes
                .iter_mut()
                .zip(&round.lanes)
                .map(|(lane, steps)| {
                    scope.spawn(move || lane.run(shared, marks, steps, cpus, waiting))
                })
                .collect();
            let mut records = Vec::new();
            for thread in threads {
                records.extend(thread.join().map_err(|_| anyhow!("a thread panicked"))??);
            }
            Ok(records)
        })
    }

    /// What brings devices back that a round has closed.
    pub fn missing(&self) -> Vec<Op> {
        let missing = self.lanes.iter().filter(|lane| lane.device.is_none()).flat_map(|lane| {
            let device = lane.number;
            let join = (!lane.joined).then_some(Op::Join { device });
            join.into_iter().chain([Op::Open { device }])
        });
        missing.collect()
    }
}

impl Lane {
    fn join(&mut self, shared: &Shared) -> Result<Answer> {
        let joined = status(shared.container.attach(Group::open(&self.node)?))?;
        self.joined = joined.is_ok();
        Ok(Answer::of(joined))
    }

    fn open(&mut self, shared: &Shared) -> Result<Answer> {
        self.device = Some(MdevDma::open(&shared.container, &self.node)?);
        self.prepared = None;
        Ok(Answer::of(Ok(())))
    }

    fn run(
        &mut self,
        shared: &Shared,
        marks: &Marks,
        steps: &[Step],
        cpus: Cpus,
        waiting: &AtomicUsize,
    ) -> Result<Vec<Record>> {
        shared.settle(self.number, cpus)?;
        let mut records = Vec::with_capacity(steps.len());
        waiting.fetch_sub(1, SeqCst);
        while waiting.load(SeqCst) > 0 {
            thread::yield_now();
        }
        for (i, Step { pause, act }) in steps.iter().enumerate() {
            idle(Duration::from_nanos((*pause).into()));
            let number = self.number;
            let start = std::cell::Cell::new(0);
            let end = std::cell::Cell::new(0);
            let mark = |begins: bool| match begins {
                true => start.set(marks.begin(number, i)),
                false => end.set(marks.end(number, i)),
            };
            let (answer, written) = self.perform(shared, act, &mark)?;
            let time = start.get()..end.get();
            records.push(Record { lane: Some(number), act: act.clone(), time, answer, written });
        }
        Ok(records)
    }

    /// Does it. Says by `mark` when it begins (true) and has ended (false).
    fn perform(
        &mut self,
        shared: &Shared,
        act: &Act,
        mark: &dyn Fn(bool),
    ) -> Result<(Answer, u64)> {
        if let Act::Op(Op::Command { op, iova, length, seed, .. }) = *act {
            let device = self.device.as_ref().context("a device that isn't open")?;
            let arguments = Some((iova, length, seed));
            if self.prepared != arguments {
                device.prepare(iova, length, seed)?;
                self.prepared = arguments;
            }
            mark(true);
            let rung = device.write_command(op);
            mark(false);
            rung?;
            return Ok((of_command(&device.outcome()?), 0));
        }
        mark(true);
        let done = self.perform_slowly(shared, act);
        mark(false);
        done
    }

    fn perform_slowly(&mut self, shared: &Shared, act: &Act) -> Result<(Answer, u64)> {
        let good = Answer::of(Ok(()));
        let op = match act {
            Act::Generate(config) => {
                let device = self.device.as_ref().context("a device that isn't open")?;
                let started = device.start_generator(config).map_err(|error| error.errno());
                return Ok((Answer::of(started.map_err(Errno)), 0));
            }
            Act::Halt => {
                let device = self.device.as_ref().context("a device that isn't open")?;
                return Ok((good, device.stop_generator()?.counter));
            }
            Act::Op(op) => op,
        };
        let answer = match op {
            Op::Open { .. } => self.open(shared)?,
            Op::Close { .. } => {
                self.device = None;
                good
            }
            Op::Join { .. } => self.join(shared)?,
            Op::Leave { by, .. } => {
                let left = status(shared.container.detach(self.node.group(), *by))?;
                self.joined = left.is_err();
                Answer::of(left)
            }
            _ => shared.perform(op)?,
        };
        Ok((answer, 0))
    }
}

impl Shared {
    fn perform(&self, op: &Op) -> Result<Answer> {
        let container = &self.container;
        match *op {
            Op::Map { iova, size, flags, .. } => {
                let i = place_of(iova).filter(|&i| place(i) == (iova, size));
                let memory = &self.memory[i.context("no place for a mapping")?];
                let args = MapArgs { memory, offset: 0, iova, size, flags, argsz: None };
                Ok(Answer::of(status(container.map(&args))?))
            }
            Op::Unmap { iova, size, flags } => {
                let args = UnmapArgs { iova, size, flags, argsz: None };
                let count = status(container.unmap(&args))?;
                Ok(with_bitmap(count.map(|count| (count, None)), size))
            }
            Op::UnmapBitmap { iova, size, buffer } => {
                let args = UnmapArgs { iova, size, ..Default::default() };
                let done = status(container.unmap_dirty(&args, &bitmap_args(&buffer)))?;
                Ok(with_bitmap(done.map(|(count, words)| (count, Some(words))), size))
            }
            Op::Start => Ok(Answer::of(status(container.dirty_start())?)),
            Op::Stop => Ok(Answer::of(status(container.dirty_stop())?)),
            Op::GetBitmap { iova, size, buffer } => {
                let words = status(container.dirty_bitmap(iova, size, &bitmap_args(&buffer)))?;
                Ok(with_bitmap(words.map(|words| (0, Some(words))), size))
            }
            _ => Err(anyhow!("{op}: nothing that several threads do")),
        }
    }

    /// Puts this thread where it shall run.
    fn settle(&self, lane: usize, cpus: Cpus) -> Result<()> {
        let all: Vec<_> = (0..CpuSet::MAX_CPU).filter(|&cpu| self.cpus.is_set(cpu)).collect();
        ensure!(!all.is_empty(), "no CPUs");
        let mut set = CpuSet::new();
        match cpus {
            Cpus::Any => set = self.cpus,
            Cpus::Each => set.set(all[lane % all.len()]),
            Cpus::One => set.set(all[0]),
        }
        sched_setaffinity(None, &set).context("sched_setaffinity")
    }
}

/// Waits: busily, unless that is long.
fn idle(time: Duration) {
    if time > Duration::from_micros(100) {
        thread::sleep(time);
        return;
    }
    let begin = Instant::now();
    while !time.is_zero() && begin.elapsed() < time {
        spin_loop();
    }
}

fn bitmap_args(buffer: &Buffer) -> BitmapArgs {
    BitmapArgs { pgsize: buffer.pgsize, size: buffer.size }
}

/// An answer with the bitmap of `size` bytes of IOVA, if there is one.
fn with_bitmap(done: Result<(u64, Option<Vec<u64>>), Errno>, size: u64) -> Answer {
    match done {
        Ok((count, words)) => {
            let bitmap = words.map(|words| Bitmap::from_words(words, size / PAGE));
            Answer { count, bitmap, ..Answer::of(Ok(())) }
        }
        Err(errno) => Answer::of(Err(errno)),
    }
}

fn of_command(outcome: &Outcome) -> Answer {
    let status = match outcome.status {
        0 => Ok(()),
        errno => Err(Errno(errno as i32)),
    };
    Answer { count: outcome.count, ..Answer::of(status) }
}

/// What is done when all threads have ended, before counters are compared.
pub fn last_reads() -> [Op; 2] {
    let (iova, size) = whole();
    [Op::get_bitmap(iova, size), Op::get_bitmap(iova, size)]
}

/// What leaves nothing behind.
pub fn clean_up() -> [Op; 2] {
    let (iova, size) = whole();
    [Op::unmap(iova, size), Op::Stop]
}
