// SPDX-License-Identifier: GPL-2.0-only

use crate::{
    corpus::Corpus,
    generate,
    triggers::{Trigger, triggers_any},
};
use anyhow::{Result, ensure};
use events::Event;
use harness::{Context, Devices, Failure, Log, Message, Progress, Skip, worker};
use proptest::{
    strategy::{Strategy, ValueTree},
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};
use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};
use testbed::{
    Besides, Contract, Op, Testbed,
    program::{self, Failed},
    slots::{EDU, EMULATED, PAIR, PINNING, can_promote},
};
use uuid::Uuid;
use vfio_client::{calls, coverage};

/// The longest sequence of which pairs of operations are left out.
const PAIRS_MAX: usize = 16;

/// Does sequences of operations, each on a container of its own.
pub struct Search {
    devices: Mutex<Devices>,
    log: Mutex<Log>,
    contract: Contract,
    avoided: Vec<&'static Trigger>,
    length: usize,
    done: Done,
    /// What is locked and pinned between two programs: one that leaves more behind, the next one notices.
    besides: Option<Besides>,
    /// How the last program that failed did.
    failed: String,
    progress: Progress,
    stop: Arc<AtomicBool>,
}

impl Search {
    /// With the user's device, if there is one. Sequences have no more than `length` operations. It
    /// ends early when `stop` is set.
    pub fn new(
        device: Option<Uuid>,
        avoided: Vec<&'static Trigger>,
        length: usize,
        stop: Arc<AtomicBool>,
        log: Log,
    ) -> Result<Self> {
        let (devices, log) = (Mutex::new(Devices::new(device)?), Mutex::new(log));
        let context = Context::quiet(&devices, &log);
        let mut bed = Testbed::new(&context)?;
        bed.must(Op::Join { device: 1 })?;
        let contract = bed.contract().clone();
        drop(bed);
        let (done, progress) = (Done::nothing(), Progress::new());
        let (besides, failed) = (None, String::new());
        Ok(Self { devices, log, contract, avoided, length, done, besides, failed, progress, stop })
    }

    /// Does so many operations, or goes on for so long. Returns the shortest program that fails, if
    /// one does. Guided, it goes on from sequences that have run code that none before has.
    pub fn run(
        &mut self,
        seed: u64,
        guided: bool,
        ops: u64,
        seconds: Option<Duration>,
    ) -> Result<Option<Message>> {
        let (contract, avoided) = (self.contract.clone(), self.avoided.clone());
        let slots = self.slots()?;
        let strategy = generate::sequences(contract, 1..self.length + 1, avoided, slots.clone());
        let mut runner = runner(seed);
        let mut corpus = guided.then(Corpus::default);
        coverage::fresh();
        let start = Instant::now();
        while self.done.ops < ops && seconds.is_none_or(|limit| start.elapsed() < limit) {
            if let Some(program) =
                corpus.as_ref().and_then(|c| self.variant(c, &mut runner, &slots))
            {
                if let Some(failed) = self.one(&program)? {
                    return Ok(Some(failed));
                }
                self.learn(&mut corpus, &program);
                continue;
            }
            let mut tree = strategy.new_tree(&mut runner).map_err(|e| anyhow::anyhow!("{e}"))?;
            let (_, program, seen) = tree.current();
            let Err(failed) = self.attempt(&program)? else {
                self.learn(&mut corpus, &program);
                continue;
            };
            if let Some(seen) = seen {
                seen.store(failed.done.min(program.len()), Relaxed);
            }
            let program = self.shrink(&mut tree, program)?;
            return self.explain(&program).map(Some);
        }
        ensure!(self.done.ops > 0, "no operation was done");
        self.say(self.done.to_string())?;
        Ok(None)
    }

    /// Whether a program ran something new.
    fn learn(&mut self, corpus: &mut Option<Corpus>, program: &[Op]) {
        let fresh = coverage::fresh().unwrap_or(0);
        self.done.places += fresh;
        if let Some(corpus) = corpus.as_mut().filter(|_| fresh > 0) {
            corpus.keep(program.to_vec());
        }
    }

    /// A variant of what the corpus has that is possible: what is not is left out of it.
    fn variant(
        &self,
        corpus: &Corpus,
        runner: &mut TestRunner,
        slots: &[usize],
    ) -> Option<Vec<Op>> {
        let mut rng = runner.new_rng();
        let make = |before: &[Op], count: usize| {
            let mut contract = self.contract.clone();
            for op in before {
                contract.apply(op);
            }
            let count = 1..count.min(self.length) + 1;
            let slots = slots.to_vec();
            let tree =
                generate::sequences(contract, count, self.avoided.clone(), slots).new_tree(runner);
            tree.map_or_else(|_| Vec::new(), |tree| tree.current().1)
        };
        let mut contract = self.contract.clone();
        let mut program = corpus.variant(&mut rng, make)?;
        program.retain(|op| {
            let good = contract.allows(op) && !triggers_any(&self.avoided, &contract, op);
            if good {
                contract.apply(op);
            }
            good
        });
        program.truncate(self.length);
        Some(program).filter(|program| !program.is_empty())
    }

    /// Does these programs, `what` they are. Returns the shortest one that fails, of those that are part
    /// of the first one that does.
    pub fn all(&mut self, programs: &[Vec<Op>], what: &str) -> Result<Option<Message>> {
        for program in programs {
            if let Some(failed) = self.one(program)? {
                return Ok(Some(failed));
            }
        }
        ensure!(self.done.ops > 0, "no operation was done");
        self.say(format!("{what}: {}", self.done))?;
        Ok(None)
    }

    /// Does a program. Returns the shortest part of it that fails, if it does.
    fn one(&mut self, program: &[Op]) -> Result<Option<Message>> {
        let Err(failed) = self.attempt(program)? else { return Ok(None) };
        let done = &program[..failed.done.min(program.len())];
        self.say(format!("a sequence of {} operations fails, shortening it", done.len()))?;
        let program = self.shorten(done.to_vec())?;
        self.explain(&program).map(Some)
    }

    /// Does a program once. Returns how it fails, if it does.
    pub fn replay(&mut self, program: &[Op]) -> Result<Option<Message>> {
        match self.attempt(program)? {
            Ok(()) => Ok(None),
            Err(_) => self.explain(program).map(Some),
        }
    }

    /// Does a program, on a new container with two groups and the first of their devices open. At the
    /// end all that is dirty is read, and everything is compared.
    fn attempt(&mut self, program: &[Op]) -> Result<Result<(), Failed>> {
        ensure!(!self.stop.load(Relaxed), "stopped");
        self.begin_sequence()?;
        let context = Context::quiet(&self.devices, &self.log);
        let result = program::run_after(&context, program, &mut self.besides)?;
        self.done.ops += program.len() as u64;
        self.done.sequences += 1;
        if let Err(failed) = &result {
            self.failed = format!("{:#}", failed.error);
        }
        if self.progress.is_due() {
            self.say(self.done.to_string())?;
        }
        Ok(result)
    }

    /// The slots whose devices this machine has.
    fn slots(&self) -> Result<Vec<usize>> {
        let context = Context::quiet(&self.devices, &self.log);
        match context.edus() {
            Ok(_) => {
                let singles = if can_promote() { PINNING } else { EDU };
                Ok([&EMULATED[..], &singles, &PAIR[..1]].concat())
            }
            Err(error) if error.is::<Skip>() => Ok(EMULATED.to_vec()),
            Err(error) => Err(error),
        }
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Logs that a sequence begins. What the one before did isn't of interest any more.
    fn begin_sequence(&self) -> Result<()> {
        let mut log = self.log();
        log.take_back();
        log.append(&Event::Sequence)
    }

    /// Says how far it got, between two sequences.
    fn say(&self, text: String) -> Result<()> {
        {
            let mut log = self.log();
            log.take_back();
            log.append(&Event::Progress { text })?;
            log.keep();
        }
        worker::send(&Message::Progress)
    }

    /// The shortest program that fails, of those that are simpler than `program`.
    fn shrink<T>(
        &mut self,
        tree: &mut impl ValueTree<Value = (Arc<Contract>, Vec<Op>, T)>,
        program: Vec<Op>,
    ) -> Result<Vec<Op>> {
        let count = program.len();
        self.say(format!("a sequence of {count} operations fails, shrinking it"))?;
        let mut best = program;
        let mut more = tree.simplify();
        while more {
            let (_, program, _) = tree.current();
            more = match self.attempt(&program)? {
                Err(_) => {
                    best = program;
                    tree.simplify()
                }
                Ok(()) => tree.complicate(),
            };
        }
        self.shorten(best)
    }

    /// Leaves out single operations, and pairs of them, as long as the rest fails.
    fn shorten(&mut self, mut best: Vec<Op>) -> Result<Vec<Op>> {
        'again: loop {
            let singles = (0..best.len()).rev().map(|i| (i, i));
            let pairs = (0..best.len()).rev().flat_map(|j| (0..j).rev().map(move |i| (i, j)));
            let fewer = singles.chain(pairs.filter(|_| best.len() <= PAIRS_MAX));
            for (i, j) in fewer.collect::<Vec<_>>() {
                let kept = best.iter().enumerate().filter(|&(k, _)| k != i && k != j);
                let program: Vec<_> = kept.map(|(_, op)| op.clone()).collect();
                if self.possible(&program) && self.attempt(&program)?.is_err() {
                    best = program;
                    continue 'again;
                }
            }
            return Ok(best);
        }
    }

    /// Whether sequences may be like this.
    fn possible(&self, program: &[Op]) -> bool {
        let mut contract = self.contract.clone();
        program.iter().all(|op| {
            let good = contract.allows(op) && !triggers_any(&self.avoided, &contract, op);
            if good {
                contract.apply(op);
            }
            good
        })
    }

    /// Does a program that fails once more, to say how.
    fn explain(&mut self, program: &[Op]) -> Result<Message> {
        self.begin_sequence()?;
        let context = Context::new(&self.devices, &self.log, None);
        let what = match program::run(&context, program)? {
            Ok(()) => format!("it failed before, and doesn't any more; then: {}", self.failed),
            Err(failed) => match failed.error.downcast::<Failure>() {
                Ok(failure) => {
                    let mut log = self.log();
                    log.append(&Event::Difference(failure.0.clone()))?;
                    failure.to_string()
                }
                Err(error) => format!("{error:#}"),
            },
        };
        Ok(Message::Failed { what, program: program::text(program) })
    }
}

/// Where all random choices of a search come from.
pub fn runner(seed: u64) -> TestRunner {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let config =
        Config { max_local_rejects: u32::MAX, failure_persistence: None, ..Config::default() };
    TestRunner::new_with_rng(config, rng)
}

/// What a search has done.
struct Done {
    ops: u64,
    sequences: u64,
    /// Of the kernel's code, where it is traced.
    places: usize,
    start: Instant,
    /// How long calls of VFIO had taken by then.
    calls: Duration,
}

impl Done {
    fn nothing() -> Self {
        Self { ops: 0, sequences: 0, places: 0, start: Instant::now(), calls: calls::time() }
    }
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { ops, sequences, places, start, calls } = self;
        let seconds = start.elapsed().as_secs_f64().max(0.001);
        let in_calls = 100.0 * (calls::time() - *calls).as_secs_f64() / seconds;
        let rate = *ops as f64 / seconds;
        write!(
            f,
            "{ops} operations in {sequences} sequences, {seconds:.0} s, {in_calls:.0} % of it in calls of VFIO, \
             {rate:.0} operations/s"
        )?;
        if *places > 0 { write!(f, ", {places} places of the kernel") } else { Ok(()) }
    }
}
