// SPDX-License-Identifier: GPL-2.0-only

//! `dirtyscope migrate`: migrates machines of QEMU, and compares their memory.

#![forbid(unsafe_code)]

mod cases;
mod contents;
mod function;
mod machine;
mod pair;
mod pci;

use anyhow::Result;
use cases::Case;
use contents::WrongMemory;
use events::{EXIT_SKIP, Event, Sink, Verdict};
use harness::{Context, Devices, Messages, Output, Recorder, Selection, Skip, stop_on_signals};
use machine::Role;
use mdev_dma::sysfs::MdevType;
use pair::MachinePair;
use std::{
    cell::RefCell,
    process::{Command, ExitCode},
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

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
}

/// Runs the command. `print` gets what happens.
pub fn run(arguments: &Arguments, print: Sink) -> Result<ExitCode> {
    let cases = [pci::CASES, cases::CASES].concat();
    let Some(selected) = arguments.selection.of(cases, |case| (case.name, case.about))? else {
        return Ok(ExitCode::SUCCESS);
    };
    let usable = MdevType::find().map_err(|error| error.to_string()).and_then(|_| {
        let qemu = Command::new(&arguments.qemu).arg("--version").output();
        qemu.map_err(|error| format!("{}: {error}; --qemu says where it is", arguments.qemu))
    });
    if let Err(why) = usable {
        arguments.output.begin("migrate", 0, Some(why), print)?.end(false)?;
        return Ok(EXIT_SKIP.into());
    }
    let devices = Mutex::new(Devices::new(arguments.selection.device)?);
    let planned = selected.len() + arguments.rounds as usize;
    let stop = stop_on_signals()?;
    let recorder = RefCell::new(arguments.output.begin("migrate", planned, None, print)?);
    let mut runner = Runner {
        arguments,
        devices: &devices,
        stop: &stop,
        messages: Messages::from_now()?,
        recorder: &recorder,
        passed: 0,
        failed: 0,
    };
    runner.cases(&selected)?;
    runner.rounds()?;
    let stopped = stop.load(Relaxed);
    let Runner { passed, failed, .. } = runner;
    recorder.into_inner().end(stopped)?;
    Ok(match failed {
        0 if stopped => ExitCode::FAILURE,
        0 if passed == 0 => EXIT_SKIP.into(),
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

/// Runs cases, and records what comes of them.
struct Runner<'a> {
    arguments: &'a Arguments,
    devices: &'a Mutex<Devices>,
    stop: &'a AtomicBool,
    messages: Messages,
    recorder: &'a RefCell<Recorder>,
    passed: usize,
    failed: usize,
}

impl Runner<'_> {
    fn cases(&mut self, cases: &[Case]) -> Result<()> {
        for case in cases {
            self.recorder.borrow_mut().begin(case.name, case.about)?;
            let log = self.recorder.borrow().log().clone();
            let context = Context::new(self.devices, &log, None);
            let (qemu, seed) = (&self.arguments.qemu, self.arguments.seed);
            let mut pair = MachinePair::new(&context, self.recorder, qemu, seed)?;
            let result = (case.run)(&mut pair);
            if self.stop.load(Relaxed) {
                break;
            }
            let verdict = self.judge(&result, &pair.logs())?;
            self.record(case.name, verdict)?;
        }
        Ok(())
    }

    /// Migrates one machine again and again. When a round fails, the next one has a new machine.
    fn rounds(&mut self) -> Result<()> {
        let mut number = 0;
        while number < self.arguments.rounds && !self.stop.load(Relaxed) {
            number = self.rounds_of_one_machine(number)?;
        }
        Ok(())
    }

    /// Migrates one machine until a round fails, from round `number` on. Returns the next round.
    fn rounds_of_one_machine(&mut self, mut number: u64) -> Result<u64> {
        let log = self.recorder.borrow().log().clone();
        let context = Context::new(self.devices, &log, None);
        let seed = self.arguments.seed.wrapping_add(number << 32);
        let mut pair = MachinePair::new(&context, self.recorder, &self.arguments.qemu, seed)?;
        let mut result = Ok(());
        let first = number;
        while result.is_ok() && number < self.arguments.rounds && !self.stop.load(Relaxed) {
            let name = format!("round/{number}");
            self.recorder.borrow_mut().begin(&name, "one machine migrates again")?;
            let start = if number == first { pair.start(1) } else { Ok(()) };
            result = start.and_then(|()| cases::round(&mut pair, number));
            let verdict = self.judge(&result, &pair.logs())?;
            self.record(&name, verdict)?;
            number += 1;
        }
        Ok(number)
    }

    fn record(&mut self, name: &str, verdict: Verdict) -> Result<()> {
        match verdict {
            Verdict::Pass => self.passed += 1,
            Verdict::Fail { .. } => self.failed += 1,
            _ => {}
        }
        self.recorder.borrow_mut().result(name, verdict)
    }

    /// What a case's result means. `logs` is what QEMU has said.
    fn judge(&mut self, result: &Result<()>, logs: &str) -> Result<Verdict> {
        let complaints = self.recorder.borrow_mut().complaints(&mut self.messages)?;
        let verdict = match result {
            Ok(()) if self.arguments.control => {
                Verdict::Fail { why: "the kernel loses pages, and none was found".into() }
            }
            Ok(()) => Verdict::Pass,
            Err(error) => self.judge_error(error, logs)?,
        };
        Ok(match complaints.is_empty() {
            true => verdict,
            false => verdict.with_complaints(&complaints),
        })
    }

    fn judge_error(&mut self, error: &anyhow::Error, logs: &str) -> Result<Verdict> {
        if let Some(Skip(why)) = error.downcast_ref() {
            return Ok(Verdict::Skip { why: why.clone() });
        }
        if let Some(wrong) = error.downcast_ref::<WrongMemory>() {
            self.recorder.borrow_mut().record(&Event::Difference(wrong.difference()))?;
            // In the machine that was left, the device wrote to memory itself: nothing was lost there.
            if self.arguments.control && wrong.role == Role::Destination {
                let text = wrong.to_string();
                self.recorder.borrow_mut().record(&Event::Progress { text })?;
                return Ok(Verdict::Pass);
            }
        }
        Ok(Verdict::Fail { why: format!("{error:#}\n{logs}") })
    }
}
