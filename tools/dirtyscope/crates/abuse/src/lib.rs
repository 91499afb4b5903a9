// SPDX-License-Identifier: GPL-2.0-only

//! `dirtyscope abuse`: a client that means harm.

#![forbid(unsafe_code)]

mod backend;
mod calls;
mod client;
mod input;
mod lives;
mod rng;
mod search;
mod served;
mod stream;
mod table;
mod world;

use anyhow::{Context as _, Result};
use events::Sink;
use harness::{Engine, Log, Output, new_seed, select, stop_on_signals, worker};
use input::Kind;
use search::{Name, Search};
use serde::{Deserialize, Serialize};
use signal_hook::{consts::SIGUSR1, flag};
use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};
use uuid::Uuid;

pub use client::{ClientArguments, run as run_client};

/// Do what no client should, to see that it harms nobody
///
/// Makes every call that whoever holds a group's file descriptor can make, with arguments that no client
/// should give, and hands the device states that no device has saved. After each row of inputs the device
/// must work as a new one, all pages must be unpinned, all memory unlocked, and the kernel must not have
/// complained. Inputs follow from a seed; those that fail are shortened and saved for --replay, also if
/// they kill the kernel.
///
/// Needs what "dirtyscope verify" needs. Prints KTAP version 1, and for each entry point what it answered.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  dirtyscope abuse                        from a random seed
  dirtyscope abuse --seed 7 --filter states
  dirtyscope abuse --percent 10           a tenth of the inputs
  dirtyscope abuse --replay abuse-states.ops")]
pub struct Arguments {
    /// An existing mediated device to use; without it, one is created and removed at the end
    #[arg(long, value_name = "UUID")]
    device: Option<Uuid>,

    /// What inputs follow from
    #[arg(long, value_name = "NUMBER")]
    seed: Option<u64>,

    /// How many inputs, of those of a whole run
    #[arg(long, value_name = "NUMBER", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    percent: u64,

    /// Only those whose name contains this, or matches it if it has * or ?; may be given again
    #[arg(long, value_name = "PATTERN")]
    filter: Vec<String>,

    /// Also do all of it from eight threads at once. On a kernel without our fixes of type1 they deadlock
    /// (D2) and crash (D10)
    #[arg(long)]
    threads: bool,

    /// The directory to save inputs in that fail
    #[arg(long, value_name = "DIRECTORY", default_value = ".")]
    save: PathBuf,

    /// Do the inputs of this file, and nothing else; may be given again
    #[arg(long, value_name = "FILE", conflicts_with_all = ["seed", "percent", "filter"])]
    replay: Vec<PathBuf>,

    #[command(flatten)]
    output: Output,
}

/// What gives one result.
#[derive(Serialize, Deserialize)]
enum Job {
    Inputs { kind: String, seed: u64 },
    Replay(PathBuf),
}

impl harness::Job for Job {
    fn name(&self) -> String {
        match self {
            Self::Inputs { kind, .. } => format!("abuse/{kind}"),
            Self::Replay(file) => {
                format!("replay/{}", file.file_stem().unwrap_or_default().to_string_lossy())
            }
        }
    }

    fn about(&self) -> String {
        match self {
            Self::Inputs { kind, seed } => {
                let about = find(kind).map_or("", Kind::about);
                format!("{about}, from seed {seed}")
            }
            Self::Replay(file) => format!("the inputs of {}", file.display()),
        }
    }

    fn file(&self) -> Option<String> {
        match self {
            Self::Inputs { kind, .. } => Some(format!("abuse-{kind}.ops")),
            Self::Replay(_) => None,
        }
    }
}

fn find(kind: &str) -> Option<Kind> {
    Kind::ALL.into_iter().find(|one| one.name() == kind)
}

/// Runs the command. `print` gets what happens.
pub fn run(arguments: &Arguments, print: Sink) -> Result<ExitCode> {
    if let Some((job, log)) = worker::job::<Job>()? {
        work(arguments, &job, log)?;
        return Ok(ExitCode::SUCCESS);
    }
    let Arguments { output, save, .. } = arguments;
    let counts = ("bad inputs", "pass what is checked first");
    Engine { name: "abuse", output, save, counts }.run(&jobs(arguments)?, print)
}

fn jobs(arguments: &Arguments) -> Result<Vec<Job>> {
    if !arguments.replay.is_empty() {
        return Ok(arguments.replay.iter().cloned().map(Job::Replay).collect());
    }
    let seed = arguments.seed.map_or_else(new_seed, Ok)?;
    let all = Kind::ALL.into_iter().filter(|&kind| arguments.threads || kind != Kind::Threads);
    let kinds = select(all, |kind| kind.name(), &arguments.filter)?;
    Ok(kinds.into_iter().map(|kind| Job::Inputs { kind: kind.name().into(), seed }).collect())
}

fn work(arguments: &Arguments, job: &Job, log: Log) -> Result<()> {
    // It interrupts, and ends nobody.
    flag::register(SIGUSR1, Arc::default())?;
    let mut search = Search::new(arguments.device, stop_on_signals()?, log)?;
    let message = match job {
        Job::Inputs { kind, seed } => {
            let kind = find(kind).with_context(|| format!("no inputs {kind}"))?;
            let (inputs, _) = kind.counts();
            search.run(kind, *seed, (inputs * arguments.percent).div_ceil(100))?
        }
        Job::Replay(file) => search.replay(&read(file)?)?,
    };
    worker::send(&search.counted())?;
    worker::send(&message)
}

/// Whether a line of a saved file is an input.
pub fn is_input(line: &str) -> bool {
    Name::parse(line).is_some()
}

/// The inputs that a saved file names.
fn read(file: &Path) -> Result<Vec<Name>> {
    let what = || file.display().to_string();
    let text = fs::read_to_string(file).with_context(what)?;
    let lines = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    lines
        .map(|line| Name::parse(line).with_context(|| format!("{line:?} is no KIND SEED NUMBER")))
        .collect::<Result<_>>()
        .with_context(what)
}
