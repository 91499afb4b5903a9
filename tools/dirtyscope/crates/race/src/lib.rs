// SPDX-License-Identifier: GPL-2.0-only

//! `dirtyscope race`: several threads and devices on one container at the same time.
//!
//! ```text
//! generate, hammer -> plan -> live -> record   a round: what threads do, by chance; doing it; what was when
//!                     live: hands, meeting     threads, and how they meet
//!                                    record -> linear (by state, the model), rules
//! session, tally                               rounds in a worker, how much was done, the shortest that fails
//! finding                                      which known defect shows so
//! ```

#![forbid(unsafe_code)]

mod finding;
mod generate;
mod hammer;
mod hands;
mod linear;
mod live;
mod meeting;
mod plan;
mod record;
mod rules;
mod session;
mod state;
mod tally;

use anyhow::{Context as _, Result, anyhow};
use events::{EXIT_SKIP, Event, Sink, Verdict};
use generate::{Avoid, Generator, Rng};
use harness::{
    Amount, Messages, Output, Recorder, Setting, stop_on_signals,
    worker::{self, Reported, Worker},
};
use mdev_dma::sysfs::MdevType;
use plan::{LANES_MAX, Round};
use record::Marks;
use serde::{Deserialize, Serialize};
use session::{Message, Session, in_progress};
use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::Duration,
};
use tempfile::NamedTempFile;
use uuid::Uuid;

/// After so long without a word, a round hangs.
const LIMIT: Duration = Duration::from_secs(20);

/// Whether the kernel panics for an oops: not while somebody looks at what one leaves.
const PANIC_ON_OOPS: &str = "/proc/sys/kernel/panic_on_oops";

/// Have several threads use one container at the same time
///
/// Does rounds of random operations, in two to four threads with a device each: pins, writes, reads of
/// the bitmap, maps, unmaps, START, STOP, devices opened and closed, groups that come and go; and some few
/// again and again, so that two of them meet in a moment that is short. Checks that
/// what was answered is what some order of them would answer, in a model of what the kernel must do; that
/// each page is in the reads that it must be in, and in no others; memory, and counters. A round that
/// fails is shortened; one that hangs or crashes is reported with all that was in progress. The same seed
/// gives the same rounds, but not the same timing.
///
/// Needs what "dirtyscope verify" needs. Prints KTAP version 1, a result for each seed.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  dirtyscope race                        a minute, from a random seed
  dirtyscope race --seed 1 --ops 20000 --threads 3
  dirtyscope race --avoid D2             whatever else there is
  dirtyscope race --strict               known defects fail
  dirtyscope race --replay race-1.race --repeat 1000")]
pub struct Arguments {
    /// An existing mediated device to use; without it, one is created and removed at the end
    #[arg(long, value_name = "UUID")]
    device: Option<Uuid>,

    #[command(flatten)]
    amount: Amount,

    /// Threads at most
    #[arg(long, value_name = "NUMBER", default_value_t = LANES_MAX as u64, value_parser = clap::value_parser!(u64).range(2..=LANES_MAX as u64))]
    threads: u64,

    /// Operations of a thread in a round, at most
    #[arg(long, value_name = "OPERATIONS", default_value_t = 12, value_parser = clap::value_parser!(u64).range(2..=16))]
    length: u64,

    /// Steer around this known defect; may be given again
    #[arg(long, value_name = "ID", value_parser = ["D2", "D10", "D24", "D25"])]
    avoid: Vec<String>,

    /// What a known defect shows is a failure
    #[arg(long)]
    strict: bool,

    /// The directory to save rounds in that fail
    #[arg(long, value_name = "DIRECTORY", default_value = ".")]
    save: PathBuf,

    /// Do the round of this file, and nothing else; may be given again
    #[arg(long, value_name = "FILE", conflicts_with_all = ["seed", "ops", "seconds", "avoid"])]
    replay: Vec<PathBuf>,

    /// How often a round is done for --replay, and without a part of it to shorten it
    #[arg(long, value_name = "TIMES", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..))]
    repeat: u32,

    #[command(flatten)]
    output: Output,
}

impl Arguments {
    fn generator(&self, seed: u64, iommu: bool) -> Generator {
        let avoids = |id: &str| self.avoid.iter().any(|one| one == id);
        let avoid =
            Avoid { d2: avoids("D2"), d10: avoids("D10"), d24: avoids("D24"), d25: avoids("D25") };
        let (rng, threads) = (Rng::new(seed), self.threads as usize);
        Generator { rng, threads, avoid, iommu, length: self.length }
    }

    fn jobs(&self) -> Result<Vec<What>> {
        if !self.replay.is_empty() {
            return Ok(self.replay.iter().cloned().map(What::Replay).collect());
        }
        Ok(self.amount.seeds()?.into_iter().map(What::Seed).collect())
    }
}

/// What gives one result.
#[derive(Clone, Serialize, Deserialize)]
enum What {
    Seed(u64),
    Replay(PathBuf),
}

impl What {
    fn name(&self) -> String {
        match self {
            Self::Seed(seed) => format!("race/seed-{seed}"),
            Self::Replay(file) => {
                format!("replay/{}", file.file_stem().unwrap_or_default().to_string_lossy())
            }
        }
    }

    fn about(&self) -> String {
        match self {
            Self::Seed(seed) => format!("random rounds of several threads from seed {seed}"),
            Self::Replay(file) => format!("the round of {}", file.display()),
        }
    }
}

/// What a worker is to do, and the file in which it marks what it does.
#[derive(Serialize, Deserialize)]
struct Job {
    what: What,
    marks: PathBuf,
}

/// Runs the command. `print` gets what happens.
pub fn run(arguments: &Arguments, print: Sink) -> Result<ExitCode> {
    if let Some((job, log)) = worker::job::<Job>()? {
        work(arguments, &job, log)?;
        return Ok(ExitCode::SUCCESS);
    }
    let output = &arguments.output;
    if let Err(error) = MdevType::find() {
        output.begin("race", 0, Some(error.to_string()), print)?.end(false)?;
        return Ok(EXIT_SKIP.into());
    }
    let jobs = arguments.jobs()?;
    let stop = stop_on_signals()?;
    let _no_panic = Setting::new(PANIC_ON_OOPS, "0")?;
    let mut recorder = output.begin("race", jobs.len(), None, print)?;
    let mut messages = Messages::from_now()?;
    let mut all_passed = true;
    for what in jobs {
        let name = what.name();
        recorder.begin(&name, &what.about())?;
        let Some(ending) = watch(arguments, what, &mut recorder, &stop)? else {
            recorder.end(true)?;
            return Ok(ExitCode::FAILURE);
        };
        let complaints = recorder.complaints(&mut messages)?;
        let usable = ending.ended && complaints.is_empty();
        let verdict = ending.verdict(&complaints, arguments.strict);
        all_passed &= !matches!(verdict, Verdict::Fail { .. });
        recorder.result(&name, verdict)?;
        if !usable {
            break;
        }
    }
    recorder.end(false)?;
    Ok(if all_passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// How a job ended.
struct Ending {
    /// What was wrong, if anything was.
    what: Option<String>,
    /// What tasks wait for, if it hangs.
    stacks: Option<String>,
    /// Whether the worker has ended, and so given its devices back as they were.
    ended: bool,
}

impl Ending {
    fn verdict(self, complaints: &[String], strict: bool) -> Verdict {
        let Self { what, stacks, .. } = self;
        let known =
            finding::name(what.as_deref().unwrap_or_default(), stacks.as_deref(), complaints);
        let Some(why) = what.or_else(|| (!complaints.is_empty()).then(String::new)) else {
            return Verdict::Pass;
        };
        let verdict = match known {
            Some(defect) if !strict => Verdict::Known { defect: defect.into(), why },
            _ => Verdict::Fail { why },
        };
        match (verdict, complaints) {
            (Verdict::Known { defect, why }, [_, ..]) => {
                let said = events::describe_complaints(complaints);
                Verdict::Known { defect, why: format!("{why}\n{said}") }
            }
            (verdict, [_, ..]) => verdict.with_complaints(complaints),
            (verdict, []) => verdict,
        }
    }
}

/// Has a worker do a job. Nothing if it was stopped.
fn watch(
    arguments: &Arguments,
    what: What,
    recorder: &mut Recorder,
    stop: &AtomicBool,
) -> Result<Option<Ending>> {
    let file = NamedTempFile::with_prefix("dirtyscope-race-").context("make a file for marks")?;
    let (name, marks) = (what.name(), file.path().to_owned());
    let replays = matches!(what, What::Replay(_));
    let seen = Marks::open(&marks)?;
    let mut worker = Worker::start(&Job { what, marks }, &recorder.log_path())?;
    loop {
        let reported = worker.next(LIMIT)?;
        recorder.follow()?;
        let (mut stacks, mut ended) = (None, true);
        let (mut why, program) = match reported {
            Reported::Message(Message::Progress) => continue,
            Reported::Message(Message::Passed) => {
                let what = worker.finish(LIMIT)?;
                return Ok(Some(Ending { ended: what.is_none(), what, stacks }));
            }
            Reported::Message(Message::Failed { what, program }) => {
                ended = worker.finish(LIMIT)?.is_none();
                (what, program)
            }
            Reported::Ended(_) if stop.load(Relaxed) => return Ok(None),
            Reported::Ended(status) => {
                (format!("the process that did it ended, {status}"), last_round(recorder)?)
            }
            Reported::Hung(found) => {
                let why = format!("hung for {} s\n{found}", LIMIT.as_secs());
                (stacks, ended) = (Some(found), false);
                (why, last_round(recorder)?)
            }
        };
        if stacks.is_some() {
            if let Ok(round) = program.parse::<Round>() {
                why += &format!("\nin progress:\n{}", in_progress(&seen, &round));
            }
        }
        if !replays && !program.is_empty() {
            let file = format!("{}.race", name.replace('/', "-"));
            save(&arguments.save, &file, &why, &program, recorder)?;
        }
        return Ok(Some(Ending { what: Some(why), stacks, ended }));
    }
}

/// The round that was begun last.
fn last_round(recorder: &Recorder) -> Result<String> {
    let rest = recorder.rest()?;
    let notes = rest.into_iter().rev().find_map(|event| match event {
        Event::Note { text } => Some(text),
        _ => None,
    });
    Ok(notes.unwrap_or_default())
}

fn save(
    directory: &Path,
    file: &str,
    why: &str,
    program: &str,
    recorder: &mut Recorder,
) -> Result<()> {
    let text = format!("# {}\n{program}", why.lines().next().unwrap_or_default());
    let path = directory.join(file);
    fs::write(&path, &text).with_context(|| format!("save {}", path.display()))?;
    recorder.record(&Event::Saved { file: file.into(), text })
}

fn work(arguments: &Arguments, job: &Job, log: harness::Log) -> Result<()> {
    let stop = stop_on_signals()?;
    let marks = Marks::open(&job.marks)?;
    let threads = arguments.threads as usize;
    let mut session = Session::new(arguments.device, threads, marks, stop, log)?;
    let message = match &job.what {
        What::Replay(file) => session.replay(&read(file)?, arguments.repeat)?,
        &What::Seed(seed) => {
            let (ops, limit) = (arguments.amount.ops(), arguments.amount.limit());
            let mut generator = arguments.generator(seed, session.has_iommu());
            session.run(&mut generator, ops, limit, arguments.repeat)?
        }
    };
    worker::send(&message)
}

fn read(path: &Path) -> Result<Round> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    text.parse().map_err(|error: anyhow::Error| anyhow!("{}: {error:#}", path.display()))
}
