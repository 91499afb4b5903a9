// SPDX-License-Identifier: GPL-2.0-only

//! `dirtyscope verify`: runs scenarios.

use crate::{
    devices::Devices,
    ktap::{Report, Verdict},
    scenarios::{self, Context, Scenario, Skip},
    testbed::Failure,
};
use anyhow::Result;
use mdev_dma::sysfs::MdevType;
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    flag,
};
use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    process::ExitCode,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};
use uuid::Uuid;

/// What kselftest takes for skipped.
const EXIT_SKIP: u8 = 4;

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
}

/// Runs the command.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let selected = select(&arguments.filter)?;
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
    let devices = Mutex::new(Devices::new(arguments.device)?);
    run_all(&selected, &devices, arguments)
}

/// The scenarios that any of the patterns selects.
fn select(patterns: &[String]) -> Result<Vec<&'static Scenario>> {
    let mut selected: Vec<_> = scenarios::all().collect();
    if !patterns.is_empty() {
        let patterns = patterns.iter().map(|p| {
            // A pattern without wildcards is one with wildcards around it.
            let bare = !p.contains(['*', '?', '[']);
            glob::Pattern::new(&if bare { format!("*{p}*") } else { p.clone() })
        });
        let patterns = patterns.collect::<Result<Vec<_>, _>>()?;
        selected.retain(|scenario| patterns.iter().any(|p| p.matches(scenario.name)));
        anyhow::ensure!(!selected.is_empty(), "no scenario is selected; --list shows all names");
    }
    Ok(selected)
}

fn run_all(
    selected: &[&Scenario],
    devices: &Mutex<Devices>,
    arguments: &Arguments,
) -> Result<ExitCode> {
    let stop = stop_on_signals()?;
    let panic = catch_panics();
    let mut report = Report::begin(io::stdout(), selected.len())?;
    for scenario in selected {
        let context = Context::new(devices, arguments.module.as_deref());
        let result = catch_unwind(AssertUnwindSafe(|| (scenario.run)(&context)));
        if stop.load(Relaxed) {
            eprintln!("dirtyscope: stopped in {}", scenario.name);
            break;
        }
        let verdict = match result {
            Ok(Ok(())) => Verdict::Pass,
            Ok(Err(error)) => match error.downcast_ref::<Skip>() {
                Some(Skip(why)) => Verdict::Skip(why.clone()),
                None => failed(scenario, &error, explain(&error, &context), arguments.strict),
            },
            Err(_) => {
                let what = panic.lock().map_or_else(|_| String::new(), |what| what.clone());
                Verdict::Fail(format!("{what}\n{}", context.log(LOG_LINES)))
            }
        };
        report.result(scenario.name, &verdict)?;
    }
    let totals = report.end()?;
    Ok(match totals.fail {
        0 if stop.load(Relaxed) => ExitCode::FAILURE,
        0 if totals.pass == 0 => EXIT_SKIP.into(),
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

/// Only a difference to the contract is a known defect; that a scenario could not get so far isn't.
fn failed(scenario: &Scenario, error: &anyhow::Error, why: String, strict: bool) -> Verdict {
    match scenario.defect() {
        Some(id) if !strict && error.is::<Failure>() => {
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

/// A first signal ends the run after the present scenario, a second one at once.
fn stop_on_signals() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        flag::register_conditional_shutdown(signal, 128 + signal, stop.clone())?;
        flag::register(signal, stop.clone())?;
    }
    Ok(stop)
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
