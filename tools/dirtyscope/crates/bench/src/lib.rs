// SPDX-License-Identifier: GPL-2.0-only

//! `dirtyscope bench`: how fast the driver is, and type1.

#![forbid(unsafe_code)]

mod axis;
mod base;
mod compare;
mod devices;
mod footprint;
mod measurements;
mod sparse;
mod state;
mod stats;
mod table;
mod tracking;

use anyhow::{Context as _, Result, bail, ensure};
use harness::{Devices, new_uuid, stop_on_signals};
use mdev_dma::{
    MdevDma,
    sysfs::{Mdev, MdevType},
};
use measurements::{Clock, Measurements};
use std::{
    fs::File,
    io::{Write, stdout},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};
use uuid::Uuid;
use vfio_client::{
    BitmapArgs, Container, Group, MapArgs, Memory, UnmapArgs,
    uapi::{VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE},
};

const PAGE_SIZE: u64 = mdev_dma::PAGE;

/// Where memory is mapped.
const IOVA: u64 = 1 << 30;

/// How long a kernel has things to do after booting, and some.
const BOOTED: Duration = Duration::from_secs(10);

/// The driver in question.
const DRIVER: &str = "rust_mdev_dma";

/// The driver and the mdev type of `tools/bench/device.c`.
const C_DRIVER: &str = "c_mdev_dma";

/// Measure how fast the driver and type1 are on this kernel
///
/// The driver and a minimal one in C (tools/bench) do the same commands in turn, on the same pages. A
/// ratio is the median of the rounds' ratios, more than 1 if the Rust driver is faster; where the
/// true one lies is said with a confidence of 95 %. Then the kernel memory that drivers take for pinned
/// pages. Last it measures how long type1's calls take, the size of the device's state, how long stop-copy
/// takes, and how that grows with memory, pins, mappings and devices: with an exponent of 1, twice as
/// much takes twice as long. Instructions are shown in thousands (k) and millions (M).
///
/// Needs root, the modules vfio, vfio_iommu_type1 and mdev, and the drivers rust_mdev_dma and
/// c_mdev_dma, for up to 64 devices with max_instances=66. Ends with 0 whether goals are met or not, unless
/// --check is given.
///
/// Where the machine's clock counts instructions (see --clock), a busy host changes nothing, and few
/// rounds say as much as many.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  dirtyscope bench
  dirtyscope bench --rounds 51 --json bench.json
  dirtyscope bench --check --json - | tail -n 1 | jq .comparisons
  dirtyscope bench --growth mappings
  dirtyscope bench --compare before.json after.json")]
pub struct Arguments {
    /// An existing device of rust_mdev_dma to use; without it, one is created and removed at the end
    #[arg(long, value_name = "UUID")]
    device: Option<Uuid>,

    /// What the times of this machine are
    #[arg(long, value_enum, default_value_t = Clock::Wall)]
    clock: Clock,

    /// How often everything is compared; by default 1001 times by the wall clock, and 21 times by
    /// instructions
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rounds: Option<u32>,

    /// Compare the drivers, and measure nothing else
    #[arg(long)]
    paths: bool,

    /// Measure how costs grow, and nothing else: with what begins so, e.g. "mappings", or everything
    #[arg(long, value_name = "AXIS", num_args = 0..=1, default_missing_value = "", conflicts_with = "paths")]
    growth: Option<String>,

    /// Measure nothing, but compare the driver in two files that --json wrote by instructions: more
    /// than 1 % more of them on any path is a failure
    #[arg(long, num_args = 2, value_names = ["BEFORE", "AFTER"], exclusive = true)]
    compare: Vec<PathBuf>,

    /// Write the results to this file too, as JSON; "-" is a line of the output
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Take a goal that isn't met for a failure, and, by instructions, an exponent that isn't as expected
    #[arg(long)]
    check: bool,
}

/// What all measurements need.
struct Bench<'a> {
    rust: MdevDma,
    c: MdevDma,
    /// How often the drivers are compared.
    rounds: usize,
    /// How often anything else is measured.
    repetitions: usize,
    /// With what else than this nobody wants to know how costs grow.
    growth: &'a str,
    stop: &'a AtomicBool,
}

/// Runs the command.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    if let [before, after] = &arguments.compare[..] {
        return base::compare(before, after);
    }
    let stop = stop_on_signals()?;
    let rust = Devices::new(arguments.device)?.get(0)?;
    let c = Created::new(C_DRIVER).context("needs the driver to compare with, tools/bench")?;
    let measurements = measure(arguments, rust, c.0, &stop)?;

    print!("{measurements}");
    if let Some(path) = &arguments.json {
        write_json(&measurements, path)?;
    }
    Ok(match measurements.not_met() {
        0 => ExitCode::SUCCESS,
        _ if arguments.check => ExitCode::FAILURE,
        _ => ExitCode::SUCCESS,
    })
}

fn measure(arguments: &Arguments, rust: Mdev, c: Mdev, stop: &AtomicBool) -> Result<Measurements> {
    let clock = arguments.clock;
    let (rounds, repetitions) = match clock {
        Clock::Wall => (1001, 11),
        Clock::Instructions => (21, 5),
    };
    let rounds = arguments.rounds.map_or(rounds, |rounds| rounds as usize);
    let growth = arguments.growth.as_deref().unwrap_or_default();
    let bench = Bench::new(rust, c, rounds, repetitions, growth, stop)?;
    if clock == Clock::Instructions {
        // A kernel that has just booted has things to do, and their instructions count too. An idle
        // machine whose clock counts them gets over this at once.
        thread::sleep(BOOTED);
    }
    let (mut comparisons, mut growth, mut memory) = (Vec::new(), Vec::new(), Vec::new());
    if arguments.growth.is_none() {
        comparisons = compare::run(&bench)?;
    }
    if arguments.growth.is_none() && !arguments.paths {
        memory = footprint::run(&bench)?;
    }
    if !arguments.paths {
        for run in [tracking::run, devices::run, sparse::run, state::run] {
            growth.extend(run(&bench)?);
        }
    }
    let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
    Ok(Measurements { kernel, clock, rounds, comparisons, growth, memory })
}

fn write_json(measurements: &Measurements, path: &Path) -> Result<()> {
    let json = serde_json::to_string(measurements)?;
    if path == Path::new("-") {
        writeln!(stdout(), "{json}")?;
        return Ok(());
    }
    let mut file = File::create(path).with_context(|| path.display().to_string())?;
    writeln!(file, "{json}").with_context(|| path.display().to_string())
}

impl<'a> Bench<'a> {
    /// Both devices are in one container: they work on the same pages.
    fn new(
        rust: Mdev,
        c: Mdev,
        rounds: usize,
        repetitions: usize,
        growth: &'a str,
        stop: &'a AtomicBool,
    ) -> Result<Self> {
        let (rust, c) = (rust.node()?, c.node()?);
        let container = Container::new(Group::open(&rust)?)?;
        container.attach(Group::open(&c)?)?;
        let (rust, c) = (MdevDma::open(&container, &rust)?, MdevDma::open(&container, &c)?);
        Ok(Self { rust, c, rounds, repetitions, growth, stop })
    }

    /// Whether somebody wants to know how costs grow with this.
    fn is_wanted(&self, axis: &str) -> bool {
        axis.starts_with(self.growth)
    }

    /// Both of them, with their names.
    fn drivers(&self) -> [(&'static str, &MdevDma); 2] {
        [(DRIVER, &self.rust), (C_DRIVER, &self.c)]
    }

    /// The container of both.
    fn container(&self) -> &Container {
        self.rust.device().container()
    }

    /// Maps `size` bytes of memory at [`IOVA`], from byte `offset` of it on.
    fn map(&self, memory: &Arc<Memory>, offset: u64, size: u64) -> Result<()> {
        Ok(map(self.container(), memory, offset, IOVA, size)?)
    }

    /// Unmaps `size` bytes there.
    fn unmap(&self, size: u64) -> Result<()> {
        self.container().unmap(&UnmapArgs { iova: IOVA, size, ..Default::default() })?;
        Ok(())
    }

    /// Says what comes next.
    fn progress(&self, what: &str) {
        eprintln!("dirtyscope: {what} ...");
    }

    fn check_stopped(&self) -> Result<()> {
        if self.stop.load(Relaxed) {
            bail!("stopped");
        }
        Ok(())
    }
}

/// Maps `size` bytes of memory at `iova`, from byte `offset` of it on.
fn map(
    container: &Container,
    memory: &Arc<Memory>,
    offset: u64,
    iova: u64,
    size: u64,
) -> vfio_client::Result<()> {
    let flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;
    container.map(&MapArgs { memory, offset: offset as usize, iova, size, flags, argsz: None })
}

/// The arguments for the bitmap of `size` bytes of IOVA.
fn bitmap_of(size: u64) -> BitmapArgs {
    BitmapArgs { pgsize: PAGE_SIZE, size: (size / PAGE_SIZE).div_ceil(64) * 8 }
}

/// Runs a command, which must succeed. Returns how long the device took for it: the time of the write
/// to COMMAND.
fn timed_command(device: &MdevDma, op: u32, iova: u64, length: u64, seed: u64) -> Result<Duration> {
    device.prepare(iova, length, seed)?;
    let begin = Instant::now();
    device.write_command(op)?;
    let elapsed = begin.elapsed();
    let outcome = device.outcome()?;
    ensure!(
        outcome.status == 0 && outcome.count == length,
        "operation {op} of {iova:#x}+{length:#x} failed: {outcome:?}"
    );
    Ok(elapsed)
}

/// A device that is removed when this is dropped.
struct Created(Mdev);

impl Created {
    fn new(driver: &str) -> Result<Self> {
        Ok(Self(MdevType::of_driver(driver)?.create(new_uuid()?)?))
    }
}

impl Drop for Created {
    fn drop(&mut self) {
        if let Err(error) = self.0.remove() {
            eprintln!("dirtyscope: {} stays: {error}", self.0.uuid);
        }
    }
}
