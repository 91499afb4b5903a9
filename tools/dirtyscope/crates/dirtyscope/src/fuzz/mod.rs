// SPDX-License-Identifier: GPL-2.0-only

//! `dirtyscope fuzz`: random sequences of operations, and the shortest one that fails.

mod generate;
mod known;
mod search;

use crate::{
    devices,
    ktap::{Report, Verdict},
    signals,
    testbed::{Op, program},
    verify::EXIT_SKIP,
    worker::{self, Event, Worker},
};
use anyhow::{Context as _, Result, bail};
use known::{KNOWN, Known};
use mdev_dma::sysfs::MdevType;
use search::{Message, Search};
use std::{
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::Duration,
};
use uuid::Uuid;

/// After so long without a word, a sequence hangs.
const LIMIT: Duration = Duration::from_secs(60);

/// Try random sequences of operations on this kernel
///
/// Does sequences of random operations, valid and invalid ones, in the kernel and in a model of what
/// the kernel must do, and compares answers, dirty pages, memory contents and counters. A sequence
/// that fails is shrunk to the shortest one that fails, shown, and saved as a file for --replay. One
/// that hangs is reported with what its tasks wait for.
///
/// Sequences steer around the known defects of type1 (Documentation/findings), as exactly as these
/// are understood: see --avoid and --strict.
///
/// Needs what "dirtyscope verify" needs. Prints KTAP version 1, a result for each seed.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  dirtyscope fuzz                         a minute, from a random seed
  dirtyscope fuzz --seed 1 --seed 2 --ops 20000
  dirtyscope fuzz --strict --seconds 10   finds the known defects again
  dirtyscope fuzz --avoid D5 --avoid D6   all others
  dirtyscope fuzz --replay fuzz-1.ops     what failed, once more")]
pub struct Arguments {
    /// An existing mediated device to use; without it, one is created and removed at the end
    #[arg(long, value_name = "UUID")]
    device: Option<Uuid>,

    /// Where to begin; the same seed gives the same sequences. May be given again
    #[arg(long, value_name = "NUMBER")]
    seed: Vec<u64>,

    /// Operations to do for a seed [default: no limit]
    #[arg(long, value_name = "NUMBER")]
    ops: Option<u64>,

    /// Seconds to go on for a seed [default: 60, no limit with --ops]
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<u64>,

    /// The longest sequence
    #[arg(long, value_name = "OPERATIONS", default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..100_000))]
    length: u64,

    /// Steer around this known defect only; may be given again
    #[arg(long, value_name = "ID", value_parser = KNOWN.iter().map(|known| known.id).collect::<Vec<_>>())]
    avoid: Vec<String>,

    /// Steer around no known defect
    #[arg(long, conflicts_with = "avoid")]
    strict: bool,

    /// Where to save sequences that fail
    #[arg(long, value_name = "FOLDER", default_value = ".")]
    save: PathBuf,

    /// Do the operations of this file, and nothing else; may be given again
    #[arg(long, value_name = "FILE", conflicts_with_all = ["seed", "ops", "seconds", "avoid", "strict"])]
    replay: Vec<PathBuf>,

    /// Do the work, and send messages about it
    #[arg(long, hide = true)]
    worker: bool,
}

impl Arguments {
    /// The defects to steer around.
    fn avoided(&self) -> Vec<&'static Known> {
        let all = self.avoid.is_empty() && !self.strict;
        let chosen = |known: &&Known| all || self.avoid.iter().any(|id| id == known.id);
        KNOWN.iter().filter(chosen).collect()
    }

    fn limit(&self) -> Option<Duration> {
        let seconds = self.seconds.or(self.ops.is_none().then_some(60));
        seconds.map(Duration::from_secs)
    }

    /// The arguments of a worker that does `job`.
    fn for_worker(&self, job: &Job) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = vec!["fuzz".into(), "--worker".into()];
        let mut add = |name: &str, value: OsString| arguments.extend([name.into(), value]);
        if let Some(device) = self.device {
            add("--device", device.to_string().into());
        }
        match job {
            Job::Replay(file) => add("--replay", file.into()),
            Job::Seed(seed) => {
                add("--seed", seed.to_string().into());
                add("--length", self.length.to_string().into());
                if let Some(ops) = self.ops {
                    add("--ops", ops.to_string().into());
                }
                if let Some(seconds) = self.seconds {
                    add("--seconds", seconds.to_string().into());
                }
                self.avoid.iter().for_each(|id| add("--avoid", id.into()));
                if self.strict {
                    arguments.push("--strict".into());
                }
            }
        }
        arguments
    }
}

/// What gives one result.
enum Job {
    Seed(u64),
    Replay(PathBuf),
}

impl Job {
    fn name(&self) -> String {
        match self {
            Self::Seed(seed) => format!("fuzz/seed-{seed}"),
            Self::Replay(file) => {
                format!("replay/{}", file.file_stem().unwrap_or_default().to_string_lossy())
            }
        }
    }
}

/// Runs the command.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    if arguments.worker {
        return work(arguments);
    }
    if let Err(error) = MdevType::find() {
        Report::skip_all(io::stdout(), &error.to_string())?;
        return Ok(EXIT_SKIP.into());
    }
    let stop = signals::stop_on_signals()?;
    let jobs = jobs(arguments)?;
    let planned = jobs.len();
    let mut report = Report::begin(io::stdout(), planned)?;
    for job in jobs {
        let Some((verdict, hung)) = watch(arguments, &job, &mut report, &stop)? else { break };
        report.result(&job.name(), &verdict)?;
        if hung {
            report.comment("what hangs has the devices: no more is tried")?;
            break;
        }
    }
    let totals = report.end()?;
    Ok(if totals.pass == planned { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn jobs(arguments: &Arguments) -> Result<Vec<Job>> {
    if !arguments.replay.is_empty() {
        return Ok(arguments.replay.iter().cloned().map(Job::Replay).collect());
    }
    if !arguments.seed.is_empty() {
        return Ok(arguments.seed.iter().copied().map(Job::Seed).collect());
    }
    // Small enough to be typed.
    let seed = devices::new_uuid()?.as_u128() as u32;
    Ok(vec![Job::Seed(seed.into())])
}

/// Has a worker do a job. Says what came of it, and whether it hangs; nothing if it was stopped.
fn watch(
    arguments: &Arguments,
    job: &Job,
    report: &mut Report<io::Stdout>,
    stop: &AtomicBool,
) -> Result<Option<(Verdict, bool)>> {
    let mut worker = Worker::start(arguments.for_worker(job))?;
    let mut running = String::new();
    loop {
        match worker.next(LIMIT)? {
            Event::Message(Message::Sequence(program)) => running = program,
            Event::Message(Message::Note(text)) => report.comment(&text)?,
            Event::Message(Message::Passed) => return Ok(Some((Verdict::Pass, false))),
            Event::Message(Message::Failed { what, program }) => {
                return Ok(Some((failed(arguments, job, &what, &program)?, false)));
            }
            Event::Hung(what) => {
                return Ok(Some((failed(arguments, job, &what, &running)?, true)));
            }
            Event::Ended(_) if stop.load(Relaxed) => return Ok(None),
            Event::Ended(status) => {
                let what = format!("the process that did it ended, {status}");
                return Ok(Some((failed(arguments, job, &what, &running)?, false)));
            }
        }
    }
}

/// Saves a sequence that failed.
fn failed(arguments: &Arguments, job: &Job, what: &str, program: &str) -> Result<Verdict> {
    let mut text = what.to_owned();
    if let Job::Seed(seed) = job {
        let path = arguments.save.join(format!("fuzz-{seed}.ops"));
        let file = format!("# {}\n{program}", what.lines().next().unwrap_or_default());
        fs::write(&path, file).with_context(|| format!("save {}", path.display()))?;
        text = format!("{text}\nsaved as {}, to be replayed:\n{program}", path.display());
    }
    Ok(Verdict::Fail(text))
}

fn work(arguments: &Arguments) -> Result<ExitCode> {
    worker::begin()?;
    let stop = signals::stop_on_signals()?;
    let (avoided, length) = (arguments.avoided(), arguments.length as usize);
    let mut search = Search::new(arguments.device, avoided, length, stop)?;
    let found = match (&arguments.replay[..], &arguments.seed[..]) {
        ([file], []) => search.replay(&read_program(file)?)?,
        ([], &[seed]) => {
            let limit = arguments.limit();
            search.run(seed, arguments.ops.unwrap_or(u64::MAX), limit)?
        }
        _ => bail!("a worker does one seed or file"),
    };
    worker::send(&found.unwrap_or(Message::Passed))?;
    Ok(ExitCode::SUCCESS)
}

fn read_program(path: &Path) -> Result<Vec<Op>> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    program::parse(&text).with_context(|| path.display().to_string())
}
