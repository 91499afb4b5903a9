// SPDX-License-Identifier: GPL-2.0-only

//! Inputs in a row on a world, then another one; and the fewest that fail.

use crate::{
    backend::Backend,
    input::{Input, Kind, Stock},
    lives::live,
    table::Table,
};
use anyhow::{Result, ensure};
use events::{Call, Event, Kind as Effect, describe_complaints};
use harness::{
    Devices, Log, Message, Messages, Progress, locked_memory, pages_pinned, slab_unreclaimable,
    worker,
};
use mdev_dma::sysfs::Mdev;
use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};
use uuid::Uuid;
use vfio_client::{EventFd, hostile::HostileFile};

/// What ends by itself has ended after that.
const ENDING: Duration = Duration::from_secs(5);

/// Bytes that slabs may have more after many inputs: 100 KiB come of what else a kernel does.
const SLAB: u64 = 768 << 10;

/// Attempts to leave something out, and the time they may take.
const ATTEMPTS: usize = 80;
const SHORTENING: Duration = Duration::from_secs(60);

/// One input of a sequence: all that there is to be known of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name {
    pub kind: Kind,
    pub seed: u64,
    pub number: u64,
}

impl Name {
    /// What a line of a saved file names.
    pub fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_whitespace();
        let (kind, seed, number) = (words.next()?, words.next()?, words.next()?);
        let kind = Kind::ALL.into_iter().find(|one| one.name() == kind)?;
        Some(Self { kind, seed: seed.parse().ok()?, number: number.parse().ok()? })
    }

    fn input(self) -> Input {
        Input::new(self.kind, self.seed, self.number)
    }

    /// Its line.
    fn line(self) -> String {
        let Self { kind, seed, number } = self;
        format!("{} {seed} {number} {}", kind.name(), self.input())
    }
}

pub struct Search {
    mdev: Mdev,
    _devices: Devices,
    stock: Stock,
    backends: Vec<Backend>,
    log: Log,
    messages: Messages,
    stop: Arc<AtomicBool>,
    table: Table,
    progress: Progress,
    start: Instant,
}

impl Search {
    /// With a device. It ends early when `stop` is set.
    pub fn new(device: Option<Uuid>, stop: Arc<AtomicBool>, log: Log) -> Result<Self> {
        let mut devices = Devices::new(device)?;
        let mdev = devices.get(0)?;
        Ok(Self {
            mdev,
            _devices: devices,
            stock: Stock::new(mdev)?,
            backends: Backend::all(mdev),
            log,
            messages: Messages::from_now()?,
            stop,
            table: Table::default(),
            progress: Progress::new(),
            start: Instant::now(),
        })
    }

    /// Does so many inputs of a kind. Returns the fewest that fail, if some do.
    pub fn run(&mut self, kind: Kind, seed: u64, inputs: u64) -> Result<Message> {
        let (_, together) = kind.counts();
        let (mut number, mut slab) = (0, None);
        while number < inputs {
            let end = inputs.min(number + together);
            let names: Vec<_> = (number..end).map(|number| Name { kind, seed, number }).collect();
            if let Err(error) = self.attempt(&names)? {
                return self.shorten(names, error);
            }
            number = end;
            if slab.is_none() && 4 * number >= inputs {
                slab = Some(slab_unreclaimable()?);
            }
        }
        self.slab_stays(slab)?;
        for line in self.table.lines() {
            self.say(line)?;
        }
        let seconds = self.start.elapsed().as_secs_f64();
        let rate = self.table.inputs as f64 / seconds.max(0.001);
        self.say(format!("{}, {seconds:.0} s, {rate:.0}/s", self.table))?;
        Ok(Message::Passed)
    }

    /// The kernel has no more in its slabs than after the first inputs: what each leaves would add up.
    fn slab_stays(&mut self, before: Option<u64>) -> Result<()> {
        let Some(before) = before else { return Ok(()) };
        let begin = Instant::now();
        let mut grown = slab_unreclaimable()?.saturating_sub(before);
        // What was freed is given back by and by.
        while grown > SLAB && begin.elapsed() < ENDING {
            thread::sleep(Duration::from_millis(100));
            grown = slab_unreclaimable()?.saturating_sub(before);
        }
        self.say(format!("slabs have grown by {} KiB", grown >> 10))?;
        ensure!(grown <= SLAB, "all is closed, and {grown} bytes more are in slabs");
        Ok(())
    }

    /// How many inputs were made so far.
    pub fn counted(&self) -> Message {
        Message::Counted { all: self.table.inputs, counting: self.table.passed }
    }

    /// Does the inputs of a file.
    pub fn replay(&mut self, names: &[Name]) -> Result<Message> {
        match self.attempt(names)? {
            Ok(()) => Ok(Message::Passed),
            Err(error) => Ok(failed(names, &error)),
        }
    }

    /// Does inputs, on a world of their own. Returns what was wrong with that, if anything.
    fn attempt(&mut self, names: &[Name]) -> Result<Result<(), anyhow::Error>> {
        ensure!(!self.stop.load(Relaxed), "stopped");
        self.log.take_back();
        self.log.append(&Event::Sequence)?;
        self.call(0, "a new container, with a device".into())?;
        self.choose_backend(names);
        let done = self.inputs(names);
        if self.progress.is_due() {
            let text = self.table.to_string();
            self.say(text)?;
        }
        Ok(done.and_then(|()| {
            let messages = self.messages.read()?;
            let complaints = messages.into_iter().filter(|one| one.complaint).map(|one| one.text);
            let complaints: Vec<_> = complaints.collect();
            ensure!(complaints.is_empty(), describe_complaints(&complaints));
            Ok(())
        }))
    }

    /// What a world's device has its memory from follows from the numbers of its inputs, too.
    fn choose_backend(&mut self, names: &[Name]) {
        if let Some(name) = names.first() {
            let (_, together) = name.kind.counts();
            let number = name.number / together;
            self.stock.backend = self.backends[number as usize % self.backends.len()];
        }
    }

    fn inputs(&mut self, names: &[Name]) -> Result<()> {
        let (pinned, locked) = (pages_pinned()?, locked_memory()?);
        // One that nobody else refers to, so that references to it that stay are noticed.
        self.fresh_eventfd()?;
        let mut world = None;
        for (n, name) in (1..).zip(names) {
            let input = name.input();
            self.call(n, name.line())?;
            if let Input::Life(kind, mut rng) = input {
                drop(world.take());
                live(kind, &mut rng, self.mdev, &self.stock, &mut self.table)?;
                continue;
            }
            let world = match &mut world {
                Some(world) => world,
                None => world.insert(self.stock.world(self.mdev)?),
            };
            let outcome = input.run(world, &self.stock)?;
            self.table.add(&outcome);
        }
        if let Some(world) = &mut world {
            world.works()?;
            world.generates()?;
        }
        drop(world);
        let begin = Instant::now();
        // Who was killed may still be ending.
        while pages_pinned()? != pinned && begin.elapsed() < ENDING {
            thread::sleep(Duration::from_millis(1));
        }
        for (what, before, after) in
            [("pinned pages", pinned, pages_pinned()?), ("locked bytes", locked, locked_memory()?)]
        {
            ensure!(before == after, "all is closed, and there are {after} {what}, not {before}");
        }
        let before = eventfd_id(&self.stock.eventfd)?;
        self.fresh_eventfd()?;
        let after = eventfd_id(&self.stock.eventfd)?;
        ensure!(
            before == after,
            "an eventfd was closed, and the kernel still has it: {before:?}, {after:?}"
        );
        Ok(())
    }

    /// An eventfd in place of the one there was, which is closed before: so it takes its number, the lowest
    /// that is free, unless somebody still refers to that.
    fn fresh_eventfd(&mut self) -> Result<()> {
        self.stock.eventfd = HostileFile::open("/dev/null")?;
        self.stock.eventfd = EventFd::new()?.into();
        Ok(())
    }

    fn call(&mut self, n: u64, op: String) -> Result<()> {
        let thread = std::process::id() as i32;
        let call =
            Call { n, op, kind: Effect::Other, range: None, thread, device: None, group: None };
        self.log.append(&Event::Call(call))
    }

    fn say(&mut self, text: String) -> Result<()> {
        self.log.take_back();
        self.log.append(&Event::Progress { text })?;
        self.log.keep();
        worker::send(&Message::Progress)
    }

    /// Leaves inputs out as long as the rest fails.
    fn shorten(&mut self, mut best: Vec<Name>, mut why: anyhow::Error) -> Result<Message> {
        self.say(format!("{} inputs fail, shortening them: {why:#}", best.len()))?;
        let mut attempts = 0;
        let begin = Instant::now();
        let mut part = best.len().div_ceil(2);
        while part > 0 {
            let mut start = 0;
            while start < best.len() && best.len() > 1 {
                if attempts == ATTEMPTS || begin.elapsed() > SHORTENING {
                    return Ok(failed(&best, &why));
                }
                let end = best.len().min(start + part);
                let rest = [&best[..start], &best[end..]].concat();
                attempts += 1;
                match self.attempt(&rest)? {
                    Err(error) if !rest.is_empty() => (best, why) = (rest, error),
                    _ => start = end,
                }
            }
            part /= 2;
        }
        Ok(failed(&best, &why))
    }
}

/// The number that the kernel has for an eventfd as long as anybody refers to it.
fn eventfd_id(file: &HostileFile) -> Result<Option<u64>> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.number()))?;
    let id = text.lines().find_map(|line| line.strip_prefix("eventfd-id:"));
    Ok(id.and_then(|id| id.trim().parse().ok()))
}

fn failed(names: &[Name], why: &anyhow::Error) -> Message {
    let program = names.iter().map(|name| name.line() + "\n").collect();
    Message::Failed { what: format!("{why:#}"), program }
}
