// SPDX-License-Identifier: GPL-2.0-only

//! `dirtyscope migrate`: migrates machines of QEMU, and compares their memory.

#![forbid(unsafe_code)]

mod cases;
mod contents;
pub mod guest;
mod pair;
mod qemu;
mod runner;
mod watch;

use anyhow::Result;
use events::Sink;
use harness::{Context, Output, Recorder, Selection};
use pair::MachinePair;
use qemu::{pci, reported};
use runner::{Runner, Settings};
use std::{cell::RefCell, process::ExitCode, time::Duration};
use watch::Watch;

/// Migrate machines of QEMU while the device writes, and compare their memory
///
/// Starts two QEMUs without a guest, each with a device and memory of its own, migrates one to the
/// other while the device's generator writes, and compares every page of the destination's memory
/// with what must have been written: the last write to each page follows from the generator's seed
/// and counter. A page that type1 did not report shows here as what it does to a guest: it has old
/// contents.
///
/// Needs root, QEMU 11 or later with its qtest accelerator, the modules vfio, vfio_iommu_type1 and
/// mdev, and the driver rust_mdev_dma. Prints KTAP version 1. Ends with 0 if all cases passed, 1 if
/// one failed, 4 if none could run.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  dirtyscope migrate                      every case once
  dirtyscope migrate --list               names, and what they are about
  dirtyscope migrate --filter dma-rw
  dirtyscope migrate --rounds 50          and then 50 migrations of one machine
  dirtyscope migrate --filter dma-rw --control
                                          on a type1 that was broken on purpose")]
pub struct Arguments {
    #[command(flatten)]
    selection: Selection,

    #[command(flatten)]
    output: Output,

    /// Afterwards, migrate one machine so often in a row, each time with other writes
    #[arg(long, value_name = "N", default_value_t = 0)]
    rounds: u64,

    /// The kernel loses pages: what passes is a case that finds wrong pages and names them
    #[arg(long)]
    control: bool,

    /// What all seeds follow from
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    seed: u64,

    /// The QEMU to run
    #[arg(long, value_name = "PROGRAM", default_value = "qemu-system-x86_64")]
    qemu: String,

    /// How long to wait for what should happen by itself, such as that a migration completes
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    limit: u64,
}

impl Arguments {
    /// A pair of machines, none of which there is yet.
    fn pair<'a>(
        &'a self,
        context: &'a Context<'a>,
        recorder: &'a RefCell<Recorder>,
        seed: u64,
    ) -> Result<MachinePair<'a>> {
        let watch = Watch::new(recorder, Duration::from_secs(self.limit));
        MachinePair::new(context, watch, &self.qemu, seed)
    }
}

/// Runs the command. `print` gets what happens.
pub fn run(arguments: &Arguments, print: Sink) -> Result<ExitCode> {
    let cases = [pci::CASES, cases::CASES, reported::CASES].concat();
    let Some(selected) = arguments.selection.of(cases, |case| (case.name, case.about))? else {
        return Ok(ExitCode::SUCCESS);
    };
    let settings = Settings {
        command: "migrate",
        planned: selected.len() + arguments.rounds as usize,
        device: arguments.selection.device,
        qemu: &arguments.qemu,
        control: arguments.control,
    };
    settings.run(&arguments.output, print, |runner| {
        for case in selected {
            runner.one(case.name, case.about, |context, recorder| {
                let mut pair = arguments.pair(context, recorder, arguments.seed)?;
                let result = (case.run)(&mut pair);
                Ok((result, pair.logs()))
            })?;
        }
        rounds(arguments, runner)
    })
}

/// Migrates one machine again and again. When a round fails, the next one has a new machine.
fn rounds(arguments: &Arguments, runner: &mut Runner<'_>) -> Result<()> {
    let mut number = 0;
    while number < arguments.rounds && !runner.is_stopped() {
        number = rounds_of_one_machine(arguments, runner, number)?;
    }
    Ok(())
}

/// Migrates one machine until a round fails, from round `number` on. Returns the next round.
fn rounds_of_one_machine(
    arguments: &Arguments,
    runner: &mut Runner<'_>,
    mut number: u64,
) -> Result<u64> {
    let recorder = runner.recorder;
    let log = recorder.borrow().log().clone();
    let context = Context::new(runner.devices, &log, None);
    let seed = arguments.seed.wrapping_add(number << 32);
    let mut pair = arguments.pair(&context, recorder, seed)?;
    let mut is_well = true;
    let first = number;
    while is_well && number < arguments.rounds && !runner.is_stopped() {
        let name = format!("round/{number}");
        is_well = runner.one(&name, "one machine migrates again", |_, _| {
            let start = if number == first { pair.start(1) } else { Ok(()) };
            let result = start.and_then(|()| cases::round(&mut pair, number));
            Ok((result, pair.logs()))
        })?;
        number += 1;
    }
    Ok(number)
}
