// SPDX-License-Identifier: GPL-2.0-only

//! `dirtyscope migrate`: migrates machines of a VMM, and compares their memory.
//!
//! `vmm` says what a VMM has to do for that; to add yours, begin there.

#![forbid(unsafe_code)]

mod cases;
mod contents;
pub mod guest;
mod mini;
mod pair;
mod qemu;
mod runner;
mod vmm;
mod watch;

use anyhow::Result;
use cases::MachineCase;
use events::Sink;
use harness::{Context, Output, Recorder, Selection};
use mini::MiniVmm;
use pair::MachinePair;
use qemu::{QemuVmm, iommufd, iommufd::IommufdVmm, log_sync, pci, reported};
use runner::{Case, Runner, Settings};
use std::{cell::RefCell, process::ExitCode, time::Duration};
use vmm::Vmm;
use watch::Watch;

/// Runs a case. Returns what came of it, and what the VMM has said.
type RunCase<'a> =
    Box<dyn Fn(&Context<'_>, &RefCell<Recorder>) -> Result<(Result<()>, String)> + 'a>;

/// Migrate machines while the device writes, and compare their memory
///
/// Starts two QEMUs without a guest, each with a device and memory of its own, migrates one to the
/// other while the device's generator writes, and compares every page of the destination's memory
/// with what must have been written: the last write to each page follows from the generator's seed
/// and counter. A page that type1 did not report shows here as what it does to a guest: it has old
/// contents. Does the same with a minimal VMM of its own, mini-vmm.
///
/// Needs root, the modules vfio, vfio_iommu_type1 and mdev, the driver rust_mdev_dma, and, but for the
/// cases of mini-vmm, QEMU 11 or later with its qtest accelerator. Prints KTAP version 1. Ends with 0 if
/// no case failed, known defects aside, 1 if one did, 4 if none could run.
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

    /// Afterwards, migrate one machine of QEMU so often in a row, each time with other writes
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
    fn pair<'a, V: Vmm>(
        &self,
        context: &'a Context<'a>,
        recorder: &'a RefCell<Recorder>,
        vmm: &'a V,
        seed: u64,
    ) -> Result<MachinePair<'a, V>> {
        let watch = Watch::new(recorder, Duration::from_secs(self.limit));
        MachinePair::new(context, watch, vmm, seed)
    }

    /// Cases of a VMM, of which it doesn't matter any more which one that is.
    fn runnable<'a, V: Vmm>(
        &'a self,
        vmm: &'a V,
        cases: Vec<MachineCase<V>>,
    ) -> impl Iterator<Item = Case<RunCase<'a>>> {
        cases.into_iter().map(move |Case { name, about, run }| {
            let run: RunCase<'a> = Box::new(move |context, recorder| {
                let mut pair = self.pair(context, recorder, vmm, self.seed)?;
                let result = run(&mut pair);
                Ok((result, pair.logs()))
            });
            Case { name, about, run }
        })
    }
}

/// All cases of all VMMs.
fn all_cases<'a>(
    arguments: &'a Arguments,
    qemu: &'a QemuVmm,
    with_iommufd: &'a IommufdVmm<'a>,
) -> Vec<Case<RunCase<'a>>> {
    let of_qemu = [pci::CASES, &cases::cases(), reported::CASES, log_sync::CASES].concat();
    let of_iommufd = [cases::cases(), iommufd::cases().into()].concat();
    let of_mini = [&cases::cases(), mini::CASES].concat();
    let all = arguments.runnable(qemu, of_qemu);
    let all = all.chain(arguments.runnable(with_iommufd, of_iommufd));
    all.chain(arguments.runnable(&MiniVmm, of_mini)).collect()
}

/// Runs the command. `print` gets what happens.
pub fn run(arguments: &Arguments, print: Sink) -> Result<ExitCode> {
    let qemu = QemuVmm { program: arguments.qemu.clone() };
    let with_iommufd = IommufdVmm::new(&qemu);
    let all = all_cases(arguments, &qemu, &with_iommufd);
    let Some(selected) = arguments.selection.of(all, |case| (&case.name, case.about))? else {
        return Ok(ExitCode::SUCCESS);
    };
    let settings = Settings {
        command: "migrate",
        planned: selected.len() + arguments.rounds as usize,
        device: arguments.selection.device,
        control: arguments.control,
    };
    settings.run(&arguments.output, print, |runner| {
        for case in selected {
            runner.one(&case.name, case.about, case.run)?;
        }
        rounds(arguments, &qemu, runner)
    })
}

/// Migrates one machine again and again. When a round fails, the next one has a new machine.
fn rounds(arguments: &Arguments, qemu: &QemuVmm, runner: &mut Runner<'_>) -> Result<()> {
    let mut number = 0;
    while number < arguments.rounds && !runner.is_stopped() {
        number = rounds_of_one_machine(arguments, qemu, runner, number)?;
    }
    Ok(())
}

/// Migrates one machine until a round fails, from round `number` on. Returns the next round.
fn rounds_of_one_machine(
    arguments: &Arguments,
    qemu: &QemuVmm,
    runner: &mut Runner<'_>,
    mut number: u64,
) -> Result<u64> {
    let recorder = runner.recorder;
    let log = recorder.borrow().log().clone();
    let context = Context::new(runner.devices, &log, None);
    let seed = arguments.seed.wrapping_add(number << 32);
    let mut pair = arguments.pair(&context, recorder, qemu, seed)?;
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
