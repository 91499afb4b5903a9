// SPDX-License-Identifier: GPL-2.0-only

//! `dirtyscope migrate`: migrates machines of QEMU, and compares their memory.

mod bed;
mod cases;
mod contents;
mod device;
mod machine;
mod pci;
mod progress;

use crate::{
    devices::Devices,
    filter,
    ktap::{Report, Verdict},
    scenarios::{Context, Skip},
    signals,
    verify::EXIT_SKIP,
};
use anyhow::Result;
use bed::Bed;
use cases::Case;
use contents::WrongPages;
use mdev_dma::sysfs::MdevType;
use std::{
    io::{self, Stdout},
    process::{Command, ExitCode},
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};
use uuid::Uuid;

/// Steps shown of what led to a failure.
const LOG_LINES: usize = 40;

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
    /// An existing mediated device to use; more are created, and removed at the end
    #[arg(long, value_name = "UUID")]
    device: Option<Uuid>,

    /// List the cases and end
    #[arg(long)]
    list: bool,

    /// Run cases whose name contains this, or matches it if it has * or ?; may be given again
    #[arg(long, value_name = "PATTERN")]
    filter: Vec<String>,

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

/// Runs the command.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let cases = [pci::CASES, cases::CASES].concat();
    let selected = filter::select(cases, |case| case.name, &arguments.filter)?;
    if arguments.list {
        for case in &selected {
            println!("{:<36} {}", case.name, case.about);
        }
        return Ok(ExitCode::SUCCESS);
    }
    let usable = MdevType::find().map_err(|error| error.to_string()).and_then(|_| {
        let qemu = Command::new(&arguments.qemu).arg("--version").output();
        qemu.map_err(|error| format!("{}: {error}; --qemu says where it is", arguments.qemu))
    });
    if let Err(why) = usable {
        Report::skip_all(io::stdout(), &why)?;
        return Ok(EXIT_SKIP.into());
    }
    let devices = Mutex::new(Devices::new(arguments.device)?);
    let planned = selected.len() + arguments.rounds as usize;
    let mut runner = Runner {
        arguments,
        devices: &devices,
        stop: &*signals::stop_on_signals()?,
        report: Report::begin(io::stdout(), planned)?,
    };
    runner.cases(&selected)?;
    runner.rounds()?;
    let stopped = runner.stop.load(Relaxed);
    let totals = runner.report.end()?;
    Ok(match totals.fail {
        0 if stopped => ExitCode::FAILURE,
        0 if totals.pass == 0 => EXIT_SKIP.into(),
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

/// Runs cases and reports.
struct Runner<'a> {
    arguments: &'a Arguments,
    devices: &'a Mutex<Devices>,
    stop: &'a AtomicBool,
    report: Report<Stdout>,
}

impl Runner<'_> {
    fn cases(&mut self, cases: &[Case]) -> Result<()> {
        for case in cases {
            let context = Context::new(self.devices, None);
            let mut bed = Bed::new(&context, &self.arguments.qemu, self.arguments.seed)?;
            let result = (case.run)(&mut bed);
            if self.stop.load(Relaxed) {
                break;
            }
            let verdict = self.judge(result, &context, &mut bed);
            self.report.result(case.name, &verdict)?;
        }
        Ok(())
    }

    /// Migrates one machine again and again. When a round fails, the next one has a new machine.
    fn rounds(&mut self) -> Result<()> {
        let mut number = 0;
        while number < self.arguments.rounds && !self.stop.load(Relaxed) {
            let context = Context::new(self.devices, None);
            let seed = self.arguments.seed.wrapping_add(number << 32);
            let mut bed = Bed::new(&context, &self.arguments.qemu, seed)?;
            let mut result = bed.start(1);
            while number < self.arguments.rounds && !self.stop.load(Relaxed) {
                context.note(format!("round {number}"));
                result = result.and_then(|()| cases::round(&mut bed, number));
                let failed = result.is_err();
                let verdict = self.judge(result, &context, &mut bed);
                self.report.result(&format!("round/{number}"), &verdict)?;
                number += 1;
                if failed {
                    break;
                }
                result = Ok(());
            }
        }
        Ok(())
    }

    fn judge(&self, result: Result<()>, context: &Context<'_>, bed: &mut Bed<'_>) -> Verdict {
        let error = match result {
            Ok(()) if self.arguments.control => {
                return Verdict::Fail("the kernel loses pages, and none was found".into());
            }
            Ok(()) => return Verdict::Pass,
            Err(error) => error,
        };
        match error.downcast_ref::<WrongPages>() {
            Some(wrong) if self.arguments.control => {
                wrong.to_string().lines().for_each(|line| println!("# {line}"));
                return Verdict::Pass;
            }
            _ => {}
        }
        match error.downcast_ref::<Skip>() {
            Some(Skip(why)) => Verdict::Skip(why.clone()),
            None => Verdict::Fail(format!("{error:#}\n{}\n{}", context.log(LOG_LINES), bed.logs())),
        }
    }
}
