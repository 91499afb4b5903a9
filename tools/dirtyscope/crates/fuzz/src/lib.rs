// SPDX-License-Identifier: GPL-2.0-only

//! `dirtyscope fuzz`: random sequences of operations, and the shortest one that fails.

#![forbid(unsafe_code)]

mod corpus;
mod exhaustive;
mod generate;
mod search;
mod shorter;
mod triggers;
mod universe;

use anyhow::{Context as _, Result, bail, ensure};
use events::Sink;
use harness::{Amount, Engine, Message, Output, stop_on_signals, worker};
use search::Search;
use serde::{Deserialize, Serialize};
use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};
use testbed::{Op, program};
use triggers::{TRIGGERS, Trigger};
use uuid::Uuid;
use vfio_client::coverage;

pub use exhaustive::{Arguments as ScopeArguments, run as run_scope};
pub use shorter::{ShrinkArguments, shrink};

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
  dirtyscope fuzz --coverage --seconds 20  where the kernel says what it runs
  dirtyscope fuzz --replay fuzz-1.ops     what failed, once more")]
pub struct Arguments {
    /// An existing mediated device to use; without it, one is created and removed at the end
    #[arg(long, value_name = "UUID")]
    device: Option<Uuid>,

    #[command(flatten)]
    amount: Amount,

    /// Go on from sequences that run code of the kernel that none before has: by KCOV, of what a kernel
    /// with CONFIG=coverage has for it
    #[arg(long)]
    coverage: bool,

    /// The longest sequence
    #[arg(long, value_name = "OPERATIONS", default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..100_000))]
    length: u64,

    /// Steer around this known defect only; may be given again
    #[arg(long, value_name = "ID", value_parser = TRIGGERS.iter().map(|trigger| trigger.defect).collect::<Vec<_>>())]
    avoid: Vec<String>,

    /// Steer around no known defect
    #[arg(long, conflicts_with = "avoid")]
    strict: bool,

    /// The directory to save sequences in that fail
    #[arg(long, value_name = "DIRECTORY", default_value = ".")]
    save: PathBuf,

    /// Do the operations of this file, and nothing else; may be given again
    #[arg(long, value_name = "FILE", conflicts_with_all = ["seed", "ops", "seconds", "avoid", "strict"])]
    replay: Vec<PathBuf>,

    #[command(flatten)]
    output: Output,
}

impl Arguments {
    /// The defects to steer around.
    fn avoided(&self) -> Vec<&'static Trigger> {
        let all = self.avoid.is_empty() && !self.strict;
        let chosen = |one: &&Trigger| all || self.avoid.iter().any(|id| id == one.defect);
        TRIGGERS.iter().filter(chosen).collect()
    }
}

/// What gives one result.
#[derive(Serialize, Deserialize)]
pub(crate) enum Job {
    Seed(u64),
    Replay(PathBuf),
    Sequences,
    Pairs,
}

impl harness::Job for Job {
    fn name(&self) -> String {
        match self {
            Self::Seed(seed) => format!("fuzz/seed-{seed}"),
            Self::Replay(file) => {
                format!("replay/{}", file.file_stem().unwrap_or_default().to_string_lossy())
            }
            Self::Sequences => "scope/sequences".into(),
            Self::Pairs => "scope/pairs".into(),
        }
    }

    fn file(&self) -> Option<String> {
        match self {
            Self::Seed(seed) => Some(format!("fuzz-{seed}.ops")),
            Self::Replay(_) => None,
            Self::Sequences => Some("scope-sequences.ops".into()),
            Self::Pairs => Some("scope-pairs.ops".into()),
        }
    }

    fn about(&self) -> String {
        match self {
            Self::Seed(seed) => format!("random sequences from seed {seed}"),
            Self::Replay(file) => format!("the operations of {}", file.display()),
            Self::Sequences => "all short sequences in a small universe".into(),
            Self::Pairs => "every pair of steps from every state of it".into(),
        }
    }
}

/// Runs the command. `print` gets what happens.
pub fn run(arguments: &Arguments, print: Sink) -> Result<ExitCode> {
    if let Some((job, log)) = worker::job::<Job>()? {
        work(arguments, &job, log)?;
        return Ok(ExitCode::SUCCESS);
    }
    ensure!(
        !arguments.coverage || coverage::fresh().is_some(),
        "--coverage: nothing is traced: set {} to a directory, on a kernel with CONFIG_KCOV",
        coverage::DIRECTORY
    );
    let Arguments { output, save, .. } = arguments;
    Engine { name: "fuzz", output, save, counts: ("", "") }.run(&jobs(arguments)?, print)
}

fn jobs(arguments: &Arguments) -> Result<Vec<Job>> {
    if !arguments.replay.is_empty() {
        return Ok(arguments.replay.iter().cloned().map(Job::Replay).collect());
    }
    Ok(arguments.amount.seeds()?.into_iter().map(Job::Seed).collect())
}

fn work(arguments: &Arguments, job: &Job, log: harness::Log) -> Result<()> {
    let stop = stop_on_signals()?;
    let (avoided, length) = (arguments.avoided(), arguments.length as usize);
    let mut search = Search::new(arguments.device, avoided, length, stop, log)?;
    let found = match job {
        Job::Replay(file) => search.replay(&read_program(file)?)?,
        &Job::Seed(seed) => {
            let amount = &arguments.amount;
            search.run(seed, arguments.coverage, amount.ops(), amount.limit())?
        }
        Job::Sequences | Job::Pairs => bail!("this is no job of the fuzzer"),
    };
    worker::send(&found.unwrap_or(Message::Passed))
}

fn read_program(path: &Path) -> Result<Vec<Op>> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    program::parse(&text).with_context(|| path.display().to_string())
}
