// SPDX-License-Identifier: GPL-2.0-only

//! `dirtyscope verify`: runs scenarios.

use crate::{
    devices::Devices,
    filter,
    ktap::{Report, Verdict},
    scenarios::{self, Context, Scenario, Skip, Stuck},
    signals,
    testbed::Failure,
    worker::{self, Event, Worker},
};
use anyhow::Result;
use mdev_dma::sysfs::MdevType;
use serde::{Deserialize, Serialize};
use std::{
    ffi::OsString,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    process::ExitCode,
    sync::{Arc, Mutex, atomic::Ordering::Relaxed},
    time::Duration,
};
use uuid::Uuid;

/// What kselftest takes for skipped.
pub const EXIT_SKIP: u8 = 4;

/// After so long without an end, a worker that has nothing more to do hangs.
const CLEANUP_LIMIT: Duration = Duration::from_secs(3);

/// Operations shown of what led to a failure.
const LOG_LINES: usize = 40;

/// Run scenarios on this kernel
///
/// Each scenario is a short sequence of operations on a container and devices of its own, done in
/// the kernel and in a model of what the kernel must do. Answers, dirty pages and memory contents
/// are compared.
///
/// Needs root, the modules vfio, vfio_iommu_type1 and mdev, and the driver rust_mdev_dma. Prints
/// KTAP version 1. Ends with 0 if all scenarios passed, 1 if one failed, 4 if none could run.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  dirtyscope verify                       everything that needs no --module
  dirtyscope verify --list                names, and what they are about
  dirtyscope verify --filter dirty/       those whose name contains \"dirty/\"
  dirtyscope verify --filter 'map/*hole*' --filter selftest
  dirtyscope verify --module /lib/modules/rust_mdev_dma.ko")]
pub struct Arguments {
    /// An existing mediated device to use; without it, one is created and removed at the end
    #[arg(long, value_name = "UUID")]
    device: Option<Uuid>,

    /// List the scenarios and end
    #[arg(long)]
    list: bool,

    /// Run scenarios whose name contains this, or matches it if it has * or ?; may be given again
    #[arg(long, value_name = "PATTERN")]
    filter: Vec<String>,

    /// Take known defects of the kernel (the scenarios defect/...) for failures
    #[arg(long)]
    strict: bool,

    /// The driver's file, for the scenarios that unload and load it; all its devices go with it
    #[arg(long, value_name = "FILE.ko")]
    module: Option<PathBuf>,

    /// Also run scenarios that, on a kernel with the defect they show, leave processes behind that
    /// can't be killed and devices that can't be removed until the machine is booted again
    #[arg(long)]
    may_hang: bool,

    /// Run the selected scenarios from this number on, and send messages about it
    #[arg(long, hide = true, value_name = "NUMBER")]
    worker: Option<usize>,
}

impl Arguments {
    /// The arguments of a worker that runs scenarios from number `next` on. A device that another
    /// worker has hung with isn't for it.
    fn for_worker(&self, next: usize, device: Option<Uuid>) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = vec!["verify".into()];
        let mut add = |name: &str, value: OsString| arguments.extend([name.into(), value]);
        add("--worker", next.to_string().into());
        if let Some(device) = device {
            add("--device", device.to_string().into());
        }
        self.filter.iter().for_each(|pattern| add("--filter", pattern.into()));
        if let Some(module) = &self.module {
            add("--module", module.into());
        }
        if self.strict {
            arguments.push("--strict".into());
        }
        if self.may_hang {
            arguments.push("--may-hang".into());
        }
        arguments
    }
}

/// Runs the command.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let selected = filter::select(scenarios::all(), |scenario| scenario.name, &arguments.filter)?;
    if arguments.list {
        for scenario in &selected {
            println!("{:<36} {}", scenario.name, scenario.about);
        }
        return Ok(ExitCode::SUCCESS);
    }
    if let Err(error) = MdevType::find() {
        Report::skip_all(io::stdout(), &error.to_string())?;
        return Ok(EXIT_SKIP.into());
    }
    match arguments.worker {
        Some(next) => work(&selected[next..], arguments),
        None => watch(&selected, arguments),
    }
}

/// What a worker says of a scenario that it ran.
#[derive(Serialize, Deserialize)]
struct Done {
    verdict: Verdict,
    /// Whether it can't go on, see [`Stuck`].
    stuck: bool,
}

/// Has workers run the scenarios, and reports. One that hangs, or takes its worker with it, is followed
/// by the next one in another worker.
fn watch(selected: &[&Scenario], arguments: &Arguments) -> Result<ExitCode> {
    let stop = signals::stop_on_signals()?;
    // What is wrong with the arguments is said by one.
    drop(Devices::new(arguments.device)?);
    let mut report = Report::begin(io::stdout(), selected.len())?;
    let mut device = arguments.device;
    let mut next = 0;
    while next < selected.len() && !stop.load(Relaxed) {
        let mut worker = Worker::start(arguments.for_worker(next, device))?;
        loop {
            let scenario = selected.get(next);
            let limit = scenario.map_or(CLEANUP_LIMIT, |_| scenarios::LIMIT);
            let event = worker.next(limit)?;
            let mut gone = !matches!(event, Event::Message(_));
            let verdict = match (scenario, event) {
                (Some(_), Event::Message(Done { verdict, stuck: false })) => verdict,
                (Some(_), Event::Message(Done { verdict, stuck: true })) => {
                    worker.abandon()?;
                    device = None;
                    gone = true;
                    verdict
                }
                (Some(scenario), Event::Hung(what)) => {
                    device = None;
                    judge(scenario, &Failure::new(what.clone()).into(), what, arguments.strict)
                }
                (Some(_), Event::Ended(_)) if stop.load(Relaxed) => break,
                (Some(_), Event::Ended(status)) => {
                    Verdict::Fail(format!("the process that ran it ended, {status}"))
                }
                (None, Event::Message(_) | Event::Ended(_)) => break,
                (None, Event::Hung(what)) => {
                    report.comment(&format!("cleaning up {what}"))?;
                    break;
                }
            };
            report.result(selected[next].name, &verdict)?;
            next += 1;
            if gone {
                break;
            }
        }
    }
    let totals = report.end()?;
    Ok(match totals.fail {
        0 if stop.load(Relaxed) => ExitCode::FAILURE,
        0 if totals.pass + totals.known == 0 => EXIT_SKIP.into(),
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

/// Runs scenarios, and sends a verdict on each.
fn work(selected: &[&Scenario], arguments: &Arguments) -> Result<ExitCode> {
    worker::begin()?;
    let stop = signals::stop_on_signals()?;
    let panic = catch_panics();
    let devices = Mutex::new(Devices::new(arguments.device)?);
    for scenario in selected {
        let context = Context::new(&devices, arguments.module.as_deref());
        let result = match scenario.may_hang() && !arguments.may_hang {
            true => {
                Ok(Err(Skip("give --may-hang for what may need a boot after it".into()).into()))
            }
            false => catch_unwind(AssertUnwindSafe(|| (scenario.run)(&context))),
        };
        if stop.load(Relaxed) {
            eprintln!("dirtyscope: stopped in {}", scenario.name);
            break;
        }
        let stuck = matches!(&result, Ok(Err(error)) if error.is::<Stuck>());
        let verdict = match result {
            Ok(Ok(())) => Verdict::Pass,
            Ok(Err(error)) => match error.downcast_ref::<Skip>() {
                Some(Skip(why)) => Verdict::Skip(why.clone()),
                None => judge(scenario, &error, explain(&error, &context), arguments.strict),
            },
            Err(_) => {
                let what = panic.lock().map_or_else(|_| String::new(), |what| what.clone());
                Verdict::Fail(format!("{what}\n{}", context.log(LOG_LINES)))
            }
        };
        worker::send(&Done { verdict, stuck })?;
        if stuck {
            // Whatever this process did now would wait for what nobody gives back.
            loop {
                std::thread::park();
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Only a difference to the contract is a known defect; that a scenario could not get so far isn't.
fn judge(scenario: &Scenario, error: &anyhow::Error, why: String, strict: bool) -> Verdict {
    match scenario.defect() {
        Some(id) if !strict && (error.is::<Failure>() || error.is::<Stuck>()) => {
            Verdict::Known(format!("known defect {id} of the kernel"), why)
        }
        _ => Verdict::Fail(why),
    }
}

/// What went wrong, and what led there.
fn explain(error: &anyhow::Error, context: &Context<'_>) -> String {
    let what = match error.downcast_ref::<Failure>() {
        Some(failure) => failure.to_string(),
        None => format!("{error:#}"),
    };
    format!("{what}\n{}", context.log(LOG_LINES))
}

/// Keeps what a panic says for the report, instead of printing it in the middle of it.
fn catch_panics() -> Arc<Mutex<String>> {
    let message = Arc::new(Mutex::new(String::new()));
    let sink = message.clone();
    std::panic::set_hook(Box::new(move |panic| {
        if let Ok(mut message) = sink.lock() {
            *message = panic.to_string();
        }
    }));
    message
}
