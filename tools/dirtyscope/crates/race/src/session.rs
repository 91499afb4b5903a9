// SPDX-License-Identifier: GPL-2.0-only

//! Rounds, one after the other, and the shortest that fails.

use crate::{
    finding,
    generate::Generator,
    linear::{self, Counted, Found},
    live::{self, Counters, Past, World},
    plan::{Act, Kind, PLACES, Round, SMALL, place},
    record::{Marks, Record, count_overlapping},
    rules,
    state::State,
    tally::Done,
};
use anyhow::{Result, ensure};
use dirty_model::Limits;
use events::Event;
use harness::{Context, Devices, Log, Progress, Skip, worker};
use mdev_dma::PAGE;
use serde::{Deserialize, Serialize};
use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};
use testbed::limits_of;
use uuid::Uuid;
use vfio_client::DeviceNode;

/// Rounds on one container.
const CONTAINER_ROUNDS: u64 = 200;

/// How long it may take to shorten a round.
const SHRINK_LIMIT: Duration = Duration::from_secs(60);

/// What a worker says.
#[derive(Serialize, Deserialize)]
pub enum Message {
    /// The log says how far it got.
    Progress,
    /// All of it passed.
    Passed,
    /// A round failed.
    Failed { what: String, program: String },
}

/// The driver that a group with an IOMMU has, none of whose devices is used.
const VFIO_PCI: &str = "vfio-pci";

/// A worker's work.
pub struct Session {
    // Closed before the devices are removed.
    world: Option<(World, Begin)>,
    devices: Mutex<Devices>,
    log: Mutex<Log>,
    marks: Arc<Marks>,
    threads: usize,
    /// How a group with an IOMMU is called, if this machine has one.
    iommu: Option<DeviceNode>,
    rounds_left: u64,
    done: Done,
    progress: Progress,
    stop: Arc<AtomicBool>,
}

/// How a container is when nothing is in it.
struct Begin {
    state: State,
    counters: Counters,
}

impl Session {
    pub fn new(
        device: Option<Uuid>,
        threads: usize,
        marks: Marks,
        stop: Arc<AtomicBool>,
        log: Log,
    ) -> Result<Self> {
        let (devices, log) = (Mutex::new(Devices::new(device)?), Mutex::new(log));
        let (world, rounds_left, done, progress) = (None, 0, Done::default(), Progress::new());
        let (iommu, marks) = (group_with_iommu(&Context::quiet(&devices, &log))?, Arc::new(marks));
        Ok(Self { devices, log, marks, threads, iommu, world, rounds_left, done, progress, stop })
    }

    /// Whether this machine has a group with an IOMMU.
    pub fn has_iommu(&self) -> bool {
        self.iommu.is_some()
    }

    /// Does rounds, so many operations or for so long. Returns the shortest that fails, if one does.
    pub fn run(
        &mut self,
        generator: &mut Generator,
        ops: u64,
        seconds: Option<Duration>,
        repeat: u32,
    ) -> Result<Message> {
        let start = Instant::now();
        while self.done.ops() < ops && seconds.is_none_or(|limit| start.elapsed() < limit) {
            let round = generator.round();
            if let Some(what) = self.attempt(&round)? {
                return self.shrink(round, what, repeat);
            }
        }
        self.say(format!("{} in {} s", self.done, start.elapsed().as_secs()))?;
        Ok(Message::Passed)
    }

    /// Does a round again and again. Returns how it fails, if it does.
    pub fn replay(&mut self, round: &Round, repeat: u32) -> Result<Message> {
        for n in 1..=repeat {
            if let Some(what) = self.attempt(round)? {
                let what = format!("{what}\nround {n} of {repeat} failed");
                return Ok(Message::Failed { what, program: round.to_string() });
            }
        }
        self.say(format!("{}: no round of {repeat} failed", self.done))?;
        Ok(Message::Passed)
    }

    /// Leaves threads out, and then acts, as long as a round fails in one of `repeat` attempts.
    fn shrink(&mut self, mut round: Round, mut what: String, repeat: u32) -> Result<Message> {
        self.say(format!("a round of {} acts fails, shortening it: {what}", round.len()))?;
        let begin = Instant::now();
        let (mut attempts, mut shorter) = (0u64, true);
        while shorter {
            shorter = false;
            let mut candidates: Vec<Round> = Vec::new();
            for lane in 0..round.lanes.len() {
                candidates.extend(round.without(|one, _| one != lane));
            }
            for lane in 0..round.lanes.len() {
                for i in 0..round.lanes[lane].len() {
                    candidates.extend(round.without(|one, at| (one, at) != (lane, i)));
                }
            }
            for i in 0..round.setup.len() {
                let mut less = round.clone();
                less.setup.remove(i);
                candidates.push(less);
            }
            for candidate in candidates {
                if candidate.len() == round.len() && candidate.setup.len() == round.setup.len() {
                    continue;
                }
                let mut failed = None;
                for _ in 0..repeat {
                    if begin.elapsed() > SHRINK_LIMIT {
                        break;
                    }
                    attempts += 1;
                    failed = self.attempt(&candidate)?.filter(|other| kind(other) == kind(&what));
                    if failed.is_some() {
                        break;
                    }
                }
                if let Some(failed) = failed {
                    (round, what, shorter) = (candidate, failed, true);
                    break;
                }
            }
        }
        what += &format!("\nshortened in {attempts} attempts, each part tried {repeat} times");
        Ok(Message::Failed { what, program: round.to_string() })
    }

    /// Does a round. Returns what is wrong with what came of it, if anything.
    fn attempt(&mut self, round: &Round) -> Result<Option<String>> {
        ensure!(!self.stop.load(Relaxed), "stopped");
        ensure!(round.lanes.len() <= self.threads, "a round of more threads than --threads");
        self.begin(round)?;
        if self.rounds_left == 0 {
            self.world = None;
            self.world = Some(self.new_world()?);
            self.rounds_left = CONTAINER_ROUNDS;
        }
        self.rounds_left -= 1;
        let Some((world, begin)) = &mut self.world else { return Ok(None) };
        let (did, counted) = perform(world, begin, round, &mut self.done)?;
        let started = Instant::now();
        let wrong = match wrong_at_the_end(world, begin)? {
            None => wrong_in(round.kind(), world, begin, &did, &counted, &mut self.done),
            wrong => wrong,
        };
        self.done.checks += started.elapsed();
        if self.progress.is_due() {
            self.say(self.done.to_string())?;
        }
        let Some(what) = wrong else { return Ok(None) };
        // What is left of it may be anything.
        self.rounds_left = 0;
        Ok(Some(format!("{what}\nhistory:\n{}", history(&did))))
    }

    fn new_world(&self) -> Result<(World, Begin)> {
        let context = Context::quiet(&self.devices, &self.log);
        let (iommu, marks) = (self.iommu.clone(), self.marks.clone());
        let world = World::new(&context, self.threads, iommu, marks)?;
        let limits = world.limits()?;
        let limits: Limits = limits_of(limits.max_pins, limits.max_length);
        let counters = world.counters()?;
        let state = State::new(self.threads, counters.dma_avail as u32, limits);
        Ok((world, Begin { state, counters }))
    }

    /// Logs what is about to be done.
    fn begin(&self, round: &Round) -> Result<()> {
        self.marks.clear();
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        log.take_back();
        log.append(&Event::Sequence)?;
        log.append(&Event::Note { text: round.to_string() })
    }

    fn say(&self, text: String) -> Result<()> {
        {
            let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
            log.take_back();
            log.append(&Event::Progress { text })?;
            log.keep();
        }
        worker::send(&Message::Progress)
    }
}

/// A group with an IOMMU, with a driver that lets it join a container, if this machine has one.
fn group_with_iommu(context: &Context<'_>) -> Result<Option<DeviceNode>> {
    let function = match context.edus() {
        Ok(edus) => edus.singles[0].clone(),
        Err(error) if error.is::<Skip>() => return Ok(None),
        Err(error) => return Err(error),
    };
    function.bind(VFIO_PCI)?;
    Ok(Some(function.node()?))
}

/// Does a round, what comes before it and what comes after. Returns all that was done, and what was counted.
fn perform(
    world: &mut World,
    begin: &Begin,
    round: &Round,
    done: &mut Done,
) -> Result<(Vec<Record>, Counted)> {
    world.clear_memory();
    let setup: Result<Vec<_>> = round.setup.iter().map(|op| world.alone(op)).collect();
    let mut all = setup?;
    let started = Instant::now();
    let Past { records, mut spans } = world.together(round)?;
    done.at_work += started.elapsed();
    all.extend(records);
    for op in live::last_reads() {
        all.push(world.alone(&op)?);
    }
    let (after, counters, besides) = (all.len(), world.counters()?, begin.counters.locked);
    for op in live::clean_up().into_iter().chain(world.missing()) {
        all.push(world.alone(&op)?);
    }
    done.count(round.kind(), spans.len(), count_overlapping(&mut spans));
    Ok((all, Counted { after, counters, besides, overwrites: false }))
}

/// What is wrong with a round of this kind, if anything is.
fn wrong_in(
    kind: Kind,
    world: &World,
    begin: &Begin,
    records: &[Record],
    counted: &Counted,
    done: &mut Done,
) -> Option<String> {
    if kind == Kind::Hammer {
        return None;
    }
    let broken = broken_rule(world, records);
    if broken.is_some() || kind == Kind::Storm {
        return broken;
    }
    done.histories += 1;
    match linear::search(&begin.state, records, counted) {
        Found::Order => None,
        Found::Undecided => {
            done.undecided += 1;
            None
        }
        Found::None { stuck } => {
            let overwrites = Counted { overwrites: true, ..counted.clone() };
            let so = linear::search(&begin.state, records, &overwrites) == Found::Order;
            let (known, stuck) = (if so { finding::D25 } else { "" }, stuck.join("\n  "));
            Some(format!("no order of these gives these answers{known}; none has\n  {stuck}"))
        }
    }
}

/// Whether anything is left when all was undone.
fn wrong_at_the_end(world: &World, begin: &Begin) -> Result<Option<String>> {
    let counters = world.counters()?;
    let why = begin.state.differs(&counters, begin.counters.locked);
    Ok(why.map(|why| format!("at the end something is left: {why}")))
}

fn broken_rule(world: &World, records: &[Record]) -> Option<String> {
    (0..PLACES.len()).find_map(|i| {
        let (start, size) = place(i);
        // What nobody names by itself is in reads of everything only: that is the model's business.
        let range = |record: &Record| match &record.act {
            Act::Op(op) => op.range(),
            Act::Generate(config) => Some((config.iova, config.length)),
            _ => None,
        };
        let inside = |record: &Record| {
            range(record)
                .is_some_and(|(at, _)| record.lane.is_some() && at.wrapping_sub(start) < size)
        };
        if !records.iter().any(inside) {
            return None;
        }
        // A sample of the large one will do.
        let pages = if i == SMALL { 64 } else { 1 };
        (start..start + size)
            .step_by(pages * PAGE as usize)
            .find_map(|iova| rules::check(records, iova, Some(&world.page(iova))))
    })
}

/// The word by which a failure is told from others: another one is nothing shorter.
fn kind(what: &str) -> (&str, bool) {
    (what.split(' ').next().unwrap_or_default(), what.contains(finding::D25))
}

/// All that was done, in order of its begin.
fn history(records: &[Record]) -> String {
    let mut records: Vec<_> = records.iter().collect();
    records.sort_by_key(|record| record.time.start);
    let lines: Vec<_> = records.iter().map(|record| format!("  {record}")).collect();
    lines.join("\n")
}

/// How far a round is that nobody has heard of since.
pub fn in_progress(marks: &Marks, round: &Round) -> String {
    let mut acts = Vec::new();
    for (lane, steps) in round.lanes.iter().enumerate() {
        for (i, step) in steps.iter().enumerate() {
            let (begun, ended) = marks.get(lane, i);
            let ended = ended.filter(|&ended| Some(ended) > begun);
            if let Some(begun) = begun {
                let until = ended.map_or("     still".into(), |ended| format!("-{ended:<9}"));
                acts.push((begun, format!("  {begun:4}{until} thread {lane}: {}", step.act)));
            }
        }
    }
    acts.sort();
    let acts: Vec<_> = acts.into_iter().map(|(_, text)| text).collect();
    acts.join("\n")
}
