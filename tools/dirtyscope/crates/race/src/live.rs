// SPDX-License-Identifier: GPL-2.0-only

//! A container, a device for each thread, and the threads.

use crate::{
    hands::Hand,
    meeting::Meeting,
    plan::{Act, CRUMBS, Cpus, PLACES, Round, SMALL, Step, place, place_of, whole},
    record::{Marks, Record, Span, places},
};
use anyhow::{Context as _, Result, anyhow, ensure};
use dirty_model::{Bitmap, Errno};
use harness::{Context, locked_memory};
use mdev_dma::{
    DeviceLimits, MdevDma, PAGE, Width,
    uapi::{
        RUST_MDEV_DMA_REG_COUNT, RUST_MDEV_DMA_REG_IOVA, RUST_MDEV_DMA_REG_LENGTH,
        RUST_MDEV_DMA_REG_SEED, RUST_MDEV_DMA_REG_STATUS,
    },
};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::{
    cell::Cell,
    hint::spin_loop,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};
use testbed::{Answer, Buffer, Op, status};
use vfio_client::{
    Access, BitmapArgs, Container, DeviceNode, Group, Leave, MapArgs, Memory, UnmapArgs,
};

/// The registers that have the arguments of a command.
const ARGUMENTS: [u32; 3] =
    [RUST_MDEV_DMA_REG_IOVA, RUST_MDEV_DMA_REG_LENGTH, RUST_MDEV_DMA_REG_SEED];

/// What is there when nothing is going on.
#[derive(Clone, Debug)]
pub struct Counters {
    /// PINS of the devices that are open.
    pub pins: Vec<Option<u64>>,
    pub dma_avail: u64,
    /// Bytes that this process has locked.
    pub locked: u64,
}

/// A container and memory, and threads, for any number of rounds.
pub struct World {
    lanes: Vec<Arc<Mutex<Lane>>>,
    hands: Vec<Hand<Job, Done>>,
    shared: Arc<Shared>,
}

struct Shared {
    container: Arc<Container>,
    memory: Vec<Arc<Memory>>,
    cpus: CpuSet,
    /// A group with an IOMMU that may join.
    iommu: Option<DeviceNode>,
    marks: Arc<Marks>,
}

/// What all threads do.
#[derive(Clone)]
struct Job {
    round: Arc<Round>,
    meeting: Arc<Meeting>,
}

/// What came of it.
type Done = Result<Past>;

/// What was done at the same time.
#[derive(Default)]
pub struct Past {
    /// The acts, of the last time that they were done.
    pub records: Vec<Record>,
    /// When acts were in progress, each time.
    pub spans: Vec<Span>,
}

/// A thread's device.
struct Lane {
    number: usize,
    node: DeviceNode,
    joined: bool,
    device: Option<MdevDma>,
    /// Whether the group with an IOMMU has joined when this thread had it do so.
    iommu_joined: bool,
    /// What the registers of a command have, in the order of [`ARGUMENTS`]: who writes only what differs
    /// spends less time between operations.
    prepared: [Option<u64>; 3],
}

impl World {
    /// With so many devices, which are open. Their groups, and one that stays, are in the container;
    /// that of `iommu` can join.
    pub fn new(
        context: &Context<'_>,
        devices: usize,
        iommu: Option<DeviceNode>,
        marks: Arc<Marks>,
    ) -> Result<Self> {
        let container = Container::new(Group::open(&context.device(devices)?.node()?)?)?;
        let memory = PLACES.map(|pages| Memory::new(((pages.end - pages.start) * PAGE) as usize));
        let memory = memory.into_iter().map(|one| Ok(Arc::new(one?))).collect::<Result<_>>()?;
        let cpus = sched_getaffinity(None)?;
        let shared = Arc::new(Shared { container, memory, cpus, iommu, marks });
        let mut this = Self { lanes: Vec::new(), hands: Vec::new(), shared };
        for number in 0..devices {
            let node = context.device(number)?.node()?;
            let (joined, iommu_joined, device, prepared) = (false, false, None, [None; 3]);
            let mut lane = Lane { number, node, joined, device, iommu_joined, prepared };
            lane.join(&this.shared)?;
            lane.open(&this.shared)?;
            let lane = Arc::new(Mutex::new(lane));
            let (own, shared) = (lane.clone(), this.shared.clone());
            this.hands.push(Hand::new(move |job: Job| lock(&own).run(&shared, &job)));
            this.lanes.push(lane);
        }
        Ok(this)
    }

    /// What the registers of the first device say of its limits.
    pub fn limits(&self) -> Result<DeviceLimits> {
        let lane = lock(&self.lanes[0]);
        Ok(lane.device.as_ref().context("a device that isn't open")?.limits()?)
    }

    /// What can be counted now.
    pub fn counters(&self) -> Result<Counters> {
        let pins =
            |lane: &Arc<Mutex<Lane>>| lock(lane).device.as_ref().map(MdevDma::pins).transpose();
        let avail = self.shared.container.info()?.dma_avail;
        Ok(Counters {
            pins: self.lanes.iter().map(pins).collect::<Result<_, _>>()?,
            dma_avail: avail.context("no VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL")?.into(),
            locked: locked_memory()?,
        })
    }

    /// Forgets what is in memory.
    pub fn clear_memory(&self) {
        // Nothing is written to the others.
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
    pub fn alone(&mut self, op: &Op) -> Result<Record> {
        let (lane, act) = (op.device().unwrap_or(0), Act::Op(op.clone()));
        let marks = &self.shared.marks;
        let start = marks.now();
        let (answer, written) =
            lock(&self.lanes[lane]).perform(&self.shared, &act, true, &|_| ())?;
        Ok(Record { lane: None, act, time: start..marks.now(), answer, written })
    }

    /// All threads do what they have to do.
    pub fn together(&mut self, round: &Round) -> Result<Past> {
        let meeting = Arc::new(Meeting::of(round.lanes.len()));
        let job = Job { round: Arc::new(round.clone()), meeting };
        let hands = &self.hands[..round.lanes.len()];
        for hand in hands {
            hand.begin(job.clone())?;
        }
        let mut past = Past::default();
        for hand in hands {
            let Past { records, spans } = hand.end()??;
            past.records.extend(records);
            past.spans.extend(spans);
        }
        Ok(past)
    }

    /// What brings devices back that a round has closed.
    pub fn missing(&self) -> Vec<Op> {
        let lanes = self.lanes.iter().map(|lane| lock(lane));
        let missing = lanes.filter(|lane| lane.device.is_none()).flat_map(|lane| {
            let device = lane.number;
            let join = (!lane.joined).then_some(Op::Join { device });
            join.into_iter().chain([Op::Open { device }])
        });
        missing.collect()
    }
}

/// A thread that panicked has ended the round anyway.
fn lock(lane: &Mutex<Lane>) -> MutexGuard<'_, Lane> {
    lane.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Lane {
    fn join(&mut self, shared: &Shared) -> Result<Answer> {
        let joined = status(shared.container.attach(Group::open(&self.node)?))?;
        self.joined = joined.is_ok();
        Ok(Answer::of(joined))
    }

    fn open(&mut self, shared: &Shared) -> Result<Answer> {
        self.device = Some(MdevDma::open(&shared.container, &self.node)?);
        self.prepared = [None; 3];
        Ok(Answer::of(Ok(())))
    }

    /// Does what a thread has to do, as often as it has to.
    fn run(&mut self, shared: &Shared, job: &Job) -> Done {
        let Job { round, meeting } = job;
        let number = self.number;
        let steps = &round.lanes[number];
        let follows = round.follows(number);
        shared.settle(number, round.cpus)?;
        let mut past = Past::default();
        past.records.reserve(steps.len());
        let member = meeting.begin(number);
        let mut left = round.times;
        loop {
            left = left.saturating_sub(1);
            past.records.clear();
            for (i, step) in steps.iter().enumerate() {
                if step.meets {
                    member.meet();
                }
                let asks = left == 0 && !follows;
                let (answer, written, time) = self.step(shared, i, step, asks)?;
                let (lane, places) = (number, places(&step.act));
                past.spans.push(Span { lane, time: time.clone(), places });
                let (lane, act) = (Some(number), step.act.clone());
                past.records.push(Record { lane, act, time, answer, written });
            }
            let ends = if follows { meeting.has_ended(0) } else { left == 0 };
            if ends {
                return Ok(past);
            }
        }
    }

    /// Does step number `i`. Returns what came of it, of commands if anybody asks only, and when it was.
    fn step(
        &mut self,
        shared: &Shared,
        i: usize,
        step: &Step,
        asks: bool,
    ) -> Result<(Answer, u64, Range<u64>)> {
        idle(Duration::from_nanos(step.pause.into()));
        let (start, end) = (Cell::new(0), Cell::new(0));
        let (marks, number) = (&shared.marks, self.number);
        let mark = |begins: bool| match begins {
            true => start.set(marks.begin(number, i)),
            false => end.set(marks.end(number, i)),
        };
        let (answer, written) = self.perform(shared, &step.act, asks, &mark)?;
        Ok((answer, written, start.get()..end.get()))
    }

    /// Does it. Says by `mark` when it begins (true) and has ended (false).
    fn perform(
        &mut self,
        shared: &Shared,
        act: &Act,
        asks: bool,
        mark: &dyn Fn(bool),
    ) -> Result<(Answer, u64)> {
        if let Act::Op(Op::Command { op, iova, length, seed, .. }) = *act {
            let device = self.device.as_ref().context("a device that isn't open")?;
            let arguments = ARGUMENTS.into_iter().zip([iova, length, seed]);
            for ((register, value), prepared) in arguments.zip(&mut self.prepared) {
                if *prepared != Some(value) {
                    device.write(register, Width::Quad, value)?;
                    *prepared = Some(value);
                }
            }
            mark(true);
            let rung = device.write_command(op);
            mark(false);
            rung?;
            let answer = match asks {
                true => outcome(device)?,
                false => Answer::of(Ok(())),
            };
            return Ok((answer, 0));
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
            Act::JoinIommu => {
                let node = shared.iommu.as_ref().context("no group with an IOMMU")?;
                let joined = status(shared.container.attach(Group::open(node)?))?;
                self.iommu_joined = joined.is_ok();
                return Ok((Answer::of(joined), 0));
            }
            Act::LeaveIommu if !self.iommu_joined => {
                return Ok((Answer::of(Err(Errno::EINVAL)), 0));
            }
            Act::LeaveIommu => {
                let node = shared.iommu.as_ref().context("no group with an IOMMU")?;
                let left = status(shared.container.detach(node.group(), Leave::Unset))?;
                return Ok((Answer::of(left), 0));
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
                let fits = |&i: &usize| place(i) == (iova, size) || i == CRUMBS && size == PAGE;
                let i = place_of(iova).filter(fits).context("no place for a mapping")?;
                let (memory, offset) = (&self.memory[i], (iova - place(i).0) as usize);
                let args = MapArgs { memory, offset, iova, size, flags, argsz: None };
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
            Op::Hide { iova, size } => self.set_access(iova, size, Access::None),
            Op::Show { iova, size } => self.set_access(iova, size, Access::ReadWrite),
            _ => Err(anyhow!("{op}: nothing that several threads do")),
        }
    }

    fn set_access(&self, iova: u64, size: u64, access: Access) -> Result<Answer> {
        let i = place_of(iova).with_context(|| format!("no place at {iova:#x}"))?;
        let start = (iova - place(i).0) as usize;
        self.memory[i].set_access(start..start + size as usize, access)?;
        Ok(Answer::of(Ok(())))
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

/// How the last command ended.
fn outcome(device: &MdevDma) -> Result<Answer> {
    let status = match device.read(RUST_MDEV_DMA_REG_STATUS, Width::Long)? {
        0 => Ok(()),
        errno => Err(Errno(errno as i32)),
    };
    let count = device.read(RUST_MDEV_DMA_REG_COUNT, Width::Quad)?;
    Ok(Answer { count, ..Answer::of(status) })
}

/// What is done when all threads have ended, before counters are compared.
pub fn last_reads() -> [Op; 2] {
    let (iova, size) = whole();
    [Op::get_bitmap(iova, size), Op::get_bitmap(iova, size)]
}

/// What leaves nothing behind.
pub fn clean_up() -> [Op; 3] {
    let (iova, size) = whole();
    let (hidden, length) = place(CRUMBS);
    [Op::unmap(iova, size), Op::Stop, Op::Show { iova: hidden, size: length }]
}
