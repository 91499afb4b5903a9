// SPDX-License-Identifier: GPL-2.0-only

//! Events in; KTAP, JUnit and a page out.

#![forbid(unsafe_code)]

mod conclude;
mod console;
mod coverage;
mod ending;
mod explain;
mod follow;
mod growth;
mod junit;
mod ktap;
mod legend;
mod page;
mod passes;
mod picture;
mod results;
mod scale;
mod story;
mod totals;

#[cfg(test)]
mod tests;

use anyhow::{Context as _, Result, bail};
use console::Console;
use events::{Event, Sink};
use page::Page;
use results::Results;
use serde::de::DeserializeOwned;
use std::{
    fs,
    io::{self, IsTerminal},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Arc, atomic::AtomicBool},
};

/// Make results of what happens in a VM
///
/// Follows the events that dirtyscope in a VM writes to memory which is a file of the host
/// (--log there, see Documentation/events.rst), and prints KTAP version 1 as they come. When the VM
/// has ended, its console is searched for complaints of the kernel that nobody in the VM has
/// recorded. What went wrong with the VM is the failure of the test that was in progress; if there was
/// none, of a result of its own, vm/console. The last line says how many passed and failed; tests that
/// were planned and have no result are among the latter.
///
/// In a directory it writes results.ktap, events.jsonl (all events, one a line), junit.xml,
/// report.html (a picture of each test that failed or showed what is known), and the fuzzer's
/// sequences that fail, to be replayed.
///
/// Ends with 0 if all tests passed or showed what is known of this kernel, 4 if none could be run,
/// 1 else.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  dirtyscope report --log vm/log --ended vm/ended --console vm/console.log --directory results
  dirtyscope report --bench bench.json --directory results
  dirtyscope report --coverage coverage.json --directory results

The file --ended says how the VM ended, and must appear at once (write another, rename it):
  exit N            the guest ended it, with dirtyscope's exit status N
  timeout SECONDS   it was ended after so long
  died STATUS       it ended otherwise, by a panic or a reset, with this exit status of QEMU
  failed STATUS     it could not be run")]
pub struct Arguments {
    /// The memory that the VM shares: a file, all of which is there from the begin on
    #[arg(long, value_name = "FILE", required_unless_present_any = ["bench", "coverage"], requires = "ended")]
    log: Option<PathBuf>,

    /// What will say that the VM has ended, and how
    #[arg(long, value_name = "FILE", requires = "log")]
    ended: Option<PathBuf>,

    /// What the VM's kernel prints to its console
    #[arg(long, value_name = "FILE")]
    console: Option<PathBuf>,

    /// Draw how costs grow, from what "dirtyscope bench --json" has written; nothing else
    #[arg(long, value_name = "FILE.json", conflicts_with = "log", requires = "directory")]
    bench: Option<PathBuf>,

    /// Show which lines were run, from what "dirtyscope coverage --json" has written; nothing else
    #[arg(long, value_name = "FILE.json", conflicts_with_all = ["log", "bench"], requires = "directory")]
    coverage: Option<PathBuf>,

    /// Where files are written
    #[arg(long, value_name = "DIRECTORY")]
    directory: Option<PathBuf>,

    /// Where the user will find them, which is said of those to be replayed [default: --directory]
    #[arg(long, value_name = "DIRECTORY", requires = "directory")]
    published: Option<PathBuf>,

    /// The VM is only booted, and nothing is tested in it
    #[arg(long)]
    without_tests: bool,

    /// What the run is called in these files [default: verify, fuzz or migrate]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
}

/// Runs the command.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let (directory, name) = (arguments.directory.as_deref(), arguments.name.as_deref());
    if let (Some(file), Some(directory)) = (&arguments.bench, directory) {
        return write_page(file, directory, |bench| growth::page(bench, name));
    }
    if let (Some(file), Some(directory)) = (&arguments.coverage, directory) {
        return write_page(file, directory, |coverage| coverage::page(coverage, name));
    }
    let (Some(log), Some(ended)) = (&arguments.log, &arguments.ended) else {
        bail!(
            "neither --log with --ended, nor --bench or --coverage with --directory: nothing to report"
        );
    };
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, stop.clone())?;
    }
    let (out, watched) = (io::stdout(), io::stdout().is_terminal());
    let published = arguments.published.as_deref().or(directory);
    let mut results = Results::new(out, watched, directory, published, name)?;
    let each = |event| results.event(event);
    let mut followed = follow::follow(log, ended, &stop, each)?;
    let console = arguments.console.as_deref().and_then(|path| match fs::read(path) {
        Ok(bytes) => Some(Console::new(&bytes)),
        // Who knows what the kernel said: that must not pass.
        Err(error) => {
            followed.damage.get_or_insert(format!("read {}: {error}", path.display()));
            None
        }
    });
    conclude::conclude(&mut results, followed, console.as_ref(), arguments.without_tests)?;
    let (_, code) = results.end()?;
    Ok(code.into())
}

/// Writes a page of what was measured, which is in a file.
fn write_page<Measured: DeserializeOwned>(
    file: &Path,
    directory: &Path,
    page: impl FnOnce(&Measured) -> String,
) -> Result<ExitCode> {
    let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    let measured = serde_json::from_str(&text).with_context(|| file.display().to_string())?;
    fs::create_dir_all(directory)
        .with_context(|| format!("make the directory {}", directory.display()))?;
    let path = directory.join("report.html");
    fs::write(&path, page(&measured)).with_context(|| format!("write {}", path.display()))?;
    Ok(ExitCode::SUCCESS)
}

/// The page that shows what all events say, also of tests that passed.
pub fn page(events: &[Event]) -> String {
    let mut page = Page::whole();
    events.iter().for_each(|event| page.event(event));
    page.to_html()
}

/// Prints KTAP to standard output.
pub fn ktap() -> Sink {
    let mut printer = ktap::Printer::new(io::stdout(), io::stdout().is_terminal(), None);
    Box::new(move |event| printer.event(event))
}
