// SPDX-License-Identifier: GPL-2.0-only

//! `dirtyscope guest`: inside a guest, has the device write to memory, and checks it.
//!
//! [`workload::Workload`] is what goes on, [`service::Service`] the process in which it does. There is no
//! VFIO in a guest: [`function::Function`] drives the device by sysfs, and [`memory::HugePage`] is
//! memory whose physical address is known.

#![forbid(unsafe_code)]

mod function;
mod interrupts;
mod memory;
mod service;
mod workload;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Subcommand;
use harness::{new_seed, stop_on_signals};
use service::{LIMIT, Request, Service};
use std::{
    io::Read as _,
    process::{Child, Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};
use workload::{Parameters, Workload};

/// Inside a guest: have the device write to its memory, and check that
///
/// For a virtual machine that has a rust_mdev_dma device, however its VMM gives it that. A process takes
/// huge pages and has the device write to them, by itself and by commands, through pins and by
/// vfio_dma_rw(), while the CPU writes to others, until it is stopped: also while the machine migrates.
/// Each page is checked before it is written again, and all of them when one asks. A page that the
/// migration has lost is named; nothing more is written then.
///
/// Needs root, and 4 huge pages of 2 MiB. No VFIO, no module; but with uio_pci_generic it checks interrupts
/// as well. Ends with 0 if all was well, and 1 if not.
#[derive(clap::Args)]
#[command(after_help = "\
Examples, in a guest:
  echo 4 > /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages
  modprobe uio_pci_generic                if the guest has it
  dirtyscope guest start --rate 1000
                                          now migrate the machine, from outside
  dirtyscope guest check                  all memory, in the machine that it has become
  dirtyscope guest stop")]
pub struct Arguments {
    #[command(subcommand)]
    command: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Begin to write, in the background
    Start(StartArguments),
    /// Say what was written so far, and whether something is wrong
    Status,
    /// Check all memory now
    Check,
    /// Reset the device while it writes, check all memory, and begin anew
    Reset,
    /// Check all memory, and end
    Stop,
    #[command(hide = true)]
    Serve(StartArguments),
}

#[derive(clap::Args)]
struct StartArguments {
    /// The device's address on the PCI bus, as 0000:00:04.0, if there are several
    #[arg(long, value_name = "ADDRESS")]
    device: Option<String>,

    /// Pages per second, for each of four writers: the device's generator, commands that write through
    /// pins, commands that write by vfio_dma_rw(), and the CPU
    #[arg(long, value_name = "PAGES", default_value_t = 500,
        value_parser = clap::value_parser!(u32).range(16..=100_000))]
    rate: u32,

    /// Pages that each of them writes to, a multiple of 8: the first ones of a huge page
    #[arg(long, value_name = "PAGES", default_value_t = 512, value_parser = pages)]
    pages: u64,

    /// What the contents of all pages follow from; default: a random number
    #[arg(long, value_name = "NUMBER")]
    seed: Option<u64>,
}

/// Parses a number of pages, of which each writer has a huge page.
fn pages(text: &str) -> Result<u64> {
    let (most, unit) = (harness::HUGE_PAGE / mdev_dma::PAGE, workload::BATCH);
    let pages = text.parse()?;
    let fits = pages % unit == 0 && (2 * unit..=most).contains(&pages);
    ensure!(fits, "a multiple of {unit}, from {} to {most}", 2 * unit);
    Ok(pages)
}

/// Runs the command.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    match &arguments.command {
        Action::Start(arguments) => start(arguments),
        Action::Serve(arguments) => serve(arguments),
        Action::Status => ask(Request::Status),
        Action::Check => ask(Request::Check),
        Action::Reset => ask(Request::Reset),
        Action::Stop => ask(Request::Stop),
    }
}

fn ask(request: Request) -> Result<ExitCode> {
    let Some((is_well, text)) = request.ask()? else {
        bail!("\"dirtyscope guest\" doesn't run: \"dirtyscope guest start\" first")
    };
    print!("{text}");
    Ok(if is_well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Starts the background process, and waits until it has device and CPU write.
fn start(arguments: &StartArguments) -> Result<ExitCode> {
    if Request::Status.ask()?.is_some() {
        bail!("\"dirtyscope guest\" runs already: \"dirtyscope guest stop\" ends it");
    }
    let seed = arguments.seed.map_or_else(new_seed, Ok)?;
    let mut command = Command::new("/proc/self/exe");
    command.args([
        "guest",
        "serve",
        "--seed",
        &seed.to_string(),
        "--rate",
        &arguments.rate.to_string(),
        "--pages",
        &arguments.pages.to_string(),
    ]);
    if let Some(address) = &arguments.device {
        command.args(["--device", address]);
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().context("start the background process")?;
    let begin = Instant::now();
    loop {
        if child.try_wait()?.is_some() {
            bail!(why(child)?);
        }
        // It may end while it is asked.
        if let Ok(Some((is_well, text))) = Request::Status.ask() {
            print!("seed: {seed}\n{text}");
            return Ok(if is_well { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        let waited = begin.elapsed().as_secs();
        ensure!(begin.elapsed() < LIMIT, "process {} doesn't begin, for {waited} s", child.id());
        thread::sleep(Duration::from_millis(100));
    }
}

/// What a process that has ended said last.
fn why(child: Child) -> Result<String> {
    let mut text = String::new();
    child.stderr.context("its standard error")?.read_to_string(&mut text)?;
    Ok(text.trim().trim_start_matches("dirtyscope: ").into())
}

/// Runs as the background process.
fn serve(arguments: &StartArguments) -> Result<ExitCode> {
    // The terminal that we were started from may go.
    rustix::process::setsid().context("setsid")?;
    let stop = stop_on_signals()?;
    let seed = arguments.seed.map_or_else(new_seed, Ok)?;
    let parameters = Parameters { rate: arguments.rate, pages: arguments.pages, seed };
    let device = arguments.device.as_deref();
    Service::new(|| Workload::start(device, &parameters))?.run(&stop)?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::pages;

    #[test]
    fn pages_are_whole_batches_in_a_huge_page() {
        for (text, parsed) in [("16", 16), ("64", 64), ("512", 512)] {
            assert_eq!(pages(text).unwrap(), parsed);
        }
        for text in ["0", "8", "20", "520", "-16", "many"] {
            assert!(pages(text).is_err(), "{text}");
        }
    }
}
