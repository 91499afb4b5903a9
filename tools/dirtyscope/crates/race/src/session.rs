// SPDX-License-Identifier: GPL-2.0-only

//! Rounds, one after the other, and the shortest that fails.

use crate::{
    finding,
    generate::Generator,
    linear::{self, Counted, Found},
    live::{self, Counters, World},
    plan::{Act, PLACES, Round, SMALL, place},
    record::{Marks, Record},
    rules,
    state::State,
};
use anyhow::{Result, ensure};
use dirty_model::Limits;
use events::Event;
use harness::{Context, Devices, Log, Progress, worker};
use mdev_dma::PAGE;
use serde::{Deserialize, Serialize};
use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};
use testbed::limits_of;
use uuid::Uuid;

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

/// What was done.
#[derive(Default)]
struct Done {
    ops: u64,
    overlapping: u64,
    rounds: u64,
    histories: u64,
    undecided: u64,
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let &Self { ops, overlapping, rounds, histories, undecided } = self;
        let percent = 100 * overlapping / ops.max(1);
        write!(
            f,
            "{ops} operations, {overlapping} ({percent} %) overlap with another on the same mapping; \
             {rounds} rounds, {histories} histories against the model, {undecided} undecided"
        )
    }
}

/// A worker's work.
pub struct Session {
    // Closed before the devices are removed.
    world: Option<(World, Begin)>,
    devices: Mutex<Devices>,
    log: Mutex<Log>,
    marks: Marks,
    threads: usize,
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
        Ok(Self { devices, log, marks, threads, world, rounds_left, done, progress, stop })
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
        while self.done.ops < ops && seconds.is_none_or(|limit| start.elapsed() < limit) {
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
        world.clear_memory();
        let marks = &self.marks;
        let mut records = Vec::new();
        for op in &round.setup {
            records.push(world.alone(marks, op)?);
        }
        records.extend(world.together(marks, round)?);
        self.done.overlapping += rules::count_overlapping(&records) as u64;
        for op in live::last_reads() {
            records.push(world.alone(marks, &op)?);
        }
        let counters = world.counters()?;
        let after = records.len();
        for op in live::clean_up() {
            records.push(world.alone(marks, &op)?);
        }
        for op in world.missing() {
            records.push(world.alone(marks, &op)?);
        }
        self.done.ops += records.len() as u64;
        self.done.rounds += 1;

        let mut wrong = wrong_at_the_end(world, begin)?;
        if wrong.is_none() {
            wrong = broken_rule(world, &records);
        }
        if wrong.is_none() && !round.is_storm() {
            self.done.histories += 1;
            let besides = begin.counters.locked;
            let counted = Counted { after, counters, besides, overwrites: false };
            match linear::search(&begin.state, &records, &counted) {
                Found::Order => {}
                Found::Undecided => self.done.undecided += 1,
                Found::None { stuck } => {
                    let stuck = stuck.join("\n  ");
                    wrong =
                        Some(format!("no order of these gives these answers; none has\n  {stuck}"));
                }
            }
        }
        if self.progress.is_due() {
            self.say(self.done.to_string())?;
        }
        let Some(what) = wrong else { return Ok(None) };
        // What is left of it may be anything.
        self.rounds_left = 0;
        Ok(Some(format!("{what}\nhistory:\n{}", history(&records))))
    }

    fn new_world(&self) -> Result<(World, Begin)> {
        let context = Context::quiet(&self.devices, &self.log);
        let world = World::new(&context, self.threads)?;
        let limits = world.device(0)?.limits()?;
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
            Act::Halt => None,
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
