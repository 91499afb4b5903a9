// SPDX-License-Identifier: GPL-2.0-only

//! Events in; KTAP, JUnit and a page out.

#![forbid(unsafe_code)]

mod ktap;
mod totals;

use anyhow::Result;
use events::Event;
use std::{
    io::{self, IsTerminal},
    process::ExitCode,
};

/// Make results of the events of a run
#[derive(clap::Args)]
pub struct Arguments {}

/// Runs the command.
pub fn run(_arguments: &Arguments) -> Result<ExitCode> {
    todo!()
}

/// Prints KTAP to standard output.
pub fn ktap() -> Box<dyn FnMut(&Event) -> io::Result<()>> {
    let mut printer = ktap::Printer::new(io::stdout(), io::stdout().is_terminal());
    Box::new(move |event| printer.event(event))
}
