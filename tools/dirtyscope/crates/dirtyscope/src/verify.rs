// SPDX-License-Identifier: GPL-2.0-only

//! `dirtyscope verify`: runs scenarios.

use anyhow::Result;
use events::{EXIT_SKIP, Sink};
use harness::{KnownDefects, Output, Scenario, Selection, Suite, other_driver};
use mdev_dma::sysfs::MdevType;
use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

/// Run scenarios on this kernel
///
/// Each scenario is a short sequence of operations on a container and devices of its own, done in
/// the kernel and in a model of what the kernel must do. Answers, dirty pages and memory contents
/// are compared. Scenarios type1/... are about what the kernel owes, device/... about the driver
/// rust_mdev_dma.
///
/// Needs root, the modules vfio, vfio_iommu_type1 and mdev, and the driver rust_mdev_dma. Prints
/// KTAP version 1. Ends with 0 if no scenario failed, known defects aside, 1 if one did, 4 if none could run.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  dirtyscope verify                       all but what needs --module or --killers
  dirtyscope verify --list                names, and what they are about
  dirtyscope verify --filter type1/       what the kernel owes
  dirtyscope verify --filter 'type1/map/*hole*' --filter selftest
  dirtyscope verify --module /lib/modules/rust_mdev_dma.ko")]
pub struct Arguments {
    #[command(flatten)]
    selection: Selection,

    /// Take known defects of the kernel for failures
    #[arg(long)]
    strict: bool,

    /// Take it for a failure if a scenario is skipped, unless the list of known defects says that this
    /// kernel or driver can't run it
    #[arg(long)]
    complete: bool,

    /// Take it for a hang if a scenario takes longer: kernels that watch themselves are slow
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    limit: u64,

    /// Which kernel shows which defects, instead of the list that this program was built with
    #[arg(long, value_name = "FILE.toml")]
    known_defects: Option<PathBuf>,

    /// The driver's file, for the scenarios that unload and load it; all its devices go with it
    #[arg(long, value_name = "FILE.ko")]
    module: Option<PathBuf>,

    /// Run the scenarios after which a kernel with the defect that they show has to be booted again:
    /// they leave processes that can't be killed, and devices that can't be removed
    #[arg(long)]
    killers: bool,

    /// Run the scenarios of pins as real drivers make them, for which the driver has to be loaded with
    /// raw_pins=1. On a kernel with defects these can corrupt memory: run them in a VM of 512 MiB at
    /// most, as "make pins" does, where what goes far astray faults
    #[arg(long, conflicts_with = "killers")]
    raw_pins: bool,

    /// Run the scenarios in which allocations of the kernel fail, one after the other, for which it has to be
    /// one that can make them fail: CONFIG_FAILSLAB, CONFIG_FAIL_PAGE_ALLOC, CONFIG_FAULT_INJECTION_DEBUG_FS
    #[arg(long, conflicts_with_all = ["killers", "raw_pins"])]
    fail_nth: bool,

    #[command(flatten)]
    output: Output,
}

/// Runs the command. `print` gets what happens.
pub fn run(arguments: &Arguments, print: Sink) -> Result<ExitCode> {
    let selected = arguments.selection.of(scenarios(arguments), |one| (one.name, one.about))?;
    let Some(mut selected) = selected else { return Ok(ExitCode::SUCCESS) };
    // What is up to the driver is up to the one in Rust; nor is there rust_vfio_edu beside the other.
    let other_driver = other_driver();
    let count = selected.len();
    selected.retain(|one| other_driver.is_none() || !one.name.starts_with("device/"));
    let left_out = count - selected.len();
    let known = KnownDefects::load(arguments.known_defects.as_deref())?;
    let others = raw_pins().chain(killer_tests::scenarios()).chain(failure_tests::scenarios());
    known.check(&all().chain(others).collect::<Vec<_>>())?;
    let suite = Suite {
        scenarios: &selected,
        device: arguments.selection.device,
        module: arguments.module.as_deref(),
        strict: arguments.strict,
        complete: arguments.complete,
        limit: Duration::from_secs(arguments.limit),
        left_out,
        known: &known,
    };
    if let Some(code) = suite.work_if_worker()? {
        return Ok(code);
    }
    if let Err(error) = MdevType::find() {
        arguments.output.begin("verify", 0, Some(error.to_string()), print)?.end(false)?;
        return Ok(EXIT_SKIP.into());
    }
    suite.watch(arguments.output.begin("verify", suite.planned(), None, print)?)
}

/// Scenarios of raw pins.
fn raw_pins() -> impl Iterator<Item = &'static Scenario> {
    type1_tests::raw_pins().chain(device_feature_tests::raw_pins())
}

/// All scenarios but killers, and those of raw pins.
fn all() -> impl Iterator<Item = &'static Scenario> {
    type1_tests::lockdep()
        .chain(type1_tests::scenarios())
        .chain(scope_tests::scenarios())
        .chain(memory_tests::scenarios())
        .chain(device_tests::scenarios())
        .chain(device_feature_tests::scenarios())
}

/// The scenarios that may be selected.
fn scenarios(arguments: &Arguments) -> Vec<&'static Scenario> {
    if arguments.killers {
        return killer_tests::scenarios().collect();
    }
    if arguments.raw_pins {
        return raw_pins().collect();
    }
    if arguments.fail_nth {
        return failure_tests::scenarios().collect();
    }
    let list = arguments.selection.list;
    let with_module = arguments.module.is_some() || list;
    let with_lockdep = Path::new("/proc/lockdep").exists() || list;
    let lockdep = |name| type1_tests::lockdep().any(|one| one.name == name);
    all()
        .filter(|one| with_module || !one.name.starts_with("device/module/"))
        .filter(|one| with_lockdep || !lockdep(one.name))
        .collect()
}
