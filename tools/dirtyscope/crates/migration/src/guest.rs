// SPDX-License-Identifier: GPL-2.0-only

//! `dirtyscope migrate-guest`: the same with a guest, which checks its memory by itself.

mod cases;
mod machine;
mod pair;

pub(crate) use pair::WrongInGuest;

use crate::runner::{Runner, Settings};
use anyhow::{Context as _, Result};
use cases::CASES;
use events::Sink;
use harness::{Output, Selection};
use pair::GuestPair;
use std::{path::PathBuf, process::ExitCode};

/// Migrate machines of QEMU with a guest, which checks its memory by itself
///
/// The guest has booted already: its state is loaded into a QEMU, the device is plugged in, and
/// "dirtyscope guest" in it has the device write. The machine migrates meanwhile to another QEMU, as
/// "dirtyscope migrate" has it, and there the guest looks which pages it has lost.
///
/// Needs what "dirtyscope migrate" needs, and a directory with the guest: QEMU's arguments, a line each, in
/// the file "arguments", and the machine's state in the file "state". tools/vm/pack-guest makes them.
#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    selection: Selection,

    #[command(flatten)]
    output: Output,

    /// The directory with the guest
    #[arg(long, value_name = "DIRECTORY", default_value = "/guest")]
    guest: PathBuf,

    /// The kernel loses pages: what passes is a case whose guest finds wrong pages and names them
    #[arg(long)]
    control: bool,

    /// The QEMU to run
    #[arg(long, value_name = "PROGRAM", default_value = "qemu-system-x86_64")]
    qemu: String,
}

/// Runs the command. `print` gets what happens.
pub fn run(arguments: &Arguments, print: Sink) -> Result<ExitCode> {
    let Some(selected) = arguments.selection.of(CASES, |case| (&case.name, case.about))? else {
        return Ok(ExitCode::SUCCESS);
    };
    let guest = arguments.guest.join("arguments");
    guest
        .metadata()
        .with_context(|| format!("{}: --guest says where the guest is", guest.display()))?;
    let settings = Settings {
        command: "migrate-guest",
        planned: selected.len(),
        device: arguments.selection.device,
        control: arguments.control,
    };
    settings.run(&arguments.output, print, |runner: &mut Runner<'_>| {
        for case in selected {
            runner.one(&case.name, case.about, |context, recorder| {
                let mut pair =
                    GuestPair::new(context, recorder, &arguments.qemu, &arguments.guest)?;
                let result = (case.run)(&mut pair);
                Ok((result, pair.logs()))
            })?;
        }
        Ok(())
    })
}
