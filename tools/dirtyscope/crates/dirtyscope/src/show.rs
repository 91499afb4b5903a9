// SPDX-License-Identifier: GPL-2.0-only

//! `dirtyscope show`: what must come of a program.

use anyhow::{Context as _, Result};
use events::Event;
use std::{fs, path::PathBuf, process::ExitCode};

/// Say what must come of a program, and draw it
///
/// Reads operations as "dirtyscope fuzz --replay" does, and says of each what the kernel owes: its
/// answer, and the pages that it must report as dirty. No kernel is asked, and nothing is needed: no
/// root, no modules, no device. Limits are the defaults of type1 and of the driver.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  dirtyscope show fuzz-1.ops
  dirtyscope show fuzz-1.ops --html fuzz-1.html")]
pub struct Arguments {
    /// The program
    #[arg(value_name = "FILE.ops")]
    file: PathBuf,

    /// Draw it in this file, as report.html has it
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

/// Runs the command.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let what = || arguments.file.display().to_string();
    let text = fs::read_to_string(&arguments.file).with_context(|| format!("read {}", what()))?;
    let name = arguments.file.file_stem().unwrap_or_default().to_string_lossy();
    let events = testbed::rehearse(&name, &text).with_context(what)?;
    match &arguments.html {
        Some(path) => fs::write(path, report::page(&events))
            .with_context(|| format!("write {}", path.display()))?,
        None => print(&events),
    }
    Ok(ExitCode::SUCCESS)
}

fn print(events: &[Event]) {
    for event in events {
        match event {
            Event::Call(call) => print!("{:4}  {} -> ", call.n, call.op),
            Event::Answer(answer) => {
                println!("{}", answer.model.text);
                for (start, end) in answer.model.dirty.iter().flatten() {
                    println!("      dirty {start:#x}-{:#x}", end - 1);
                }
            }
            _ => {}
        }
    }
}
