// SPDX-License-Identifier: GPL-2.0-only

//! `dirtyscope`: holds what VFIO type1 says of dirty pages against what a device wrote.

#![forbid(unsafe_code)]

mod show;
mod verify;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Holds what VFIO type1 says of dirty pages against what a device wrote.
///
/// A guest's memory can only be moved to another host if all that write to it report what they wrote. For devices
/// that do their DMA by the CPU, VFIO's type1 driver keeps the account. This tool has such a device
/// (rust_mdev_dma) pin and write memory, asks type1 which pages are dirty, and reports every page
/// that is lost (written, but not reported: a migration would corrupt memory) or spurious (reported,
/// but neither written nor pinned: a migration would waste time).
#[derive(Parser)]
#[command(
    version,
    after_help = "See \"dirtyscope help verify\", and so on, for what each needs, and examples."
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Verify(verify::Arguments),
    Fuzz(fuzz::Arguments),
    Abuse(abuse::Arguments),
    Scope(fuzz::ScopeArguments),
    Race(race::Arguments),
    Migrate(migration::Arguments),
    MigrateGuest(migration::guest::Arguments),
    Guest(guest::Arguments),
    Bench(bench::Arguments),
    Report(report::Arguments),
    Coverage(coverage::Arguments),
    Show(show::Arguments),
    #[command(hide = true)]
    Shrink(fuzz::ShrinkArguments),
    #[command(hide = true)]
    AbuseClient(abuse::ClientArguments),
    #[command(hide = true)]
    Hold(device_tests::hold::Arguments),
    #[command(hide = true)]
    Serve(harness::ServeArguments),
}

fn main() -> ExitCode {
    vfio_client::coverage::trace();
    let result = match Arguments::parse().command {
        Command::Verify(arguments) => verify::run(&arguments, report::ktap()),
        Command::Fuzz(arguments) => fuzz::run(&arguments, report::ktap()),
        Command::Abuse(arguments) => abuse::run(&arguments, report::ktap()),
        Command::Scope(arguments) => fuzz::run_scope(&arguments, report::ktap()),
        Command::Race(arguments) => race::run(&arguments, report::ktap()),
        Command::Migrate(arguments) => migration::run(&arguments, report::ktap()),
        Command::MigrateGuest(arguments) => migration::guest::run(&arguments, report::ktap()),
        Command::Guest(arguments) => guest::run(&arguments),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Report(arguments) => report::run(&arguments),
        Command::Coverage(arguments) => coverage::run(&arguments),
        Command::Show(arguments) => show::run(&arguments),
        Command::Shrink(arguments) => fuzz::shrink(&arguments, abuse::is_input),
        Command::AbuseClient(arguments) => abuse::run_client(&arguments),
        Command::Hold(arguments) => device_tests::hold::run(&arguments),
        Command::Serve(arguments) => harness::serve(&arguments),
    };
    result.unwrap_or_else(|error| {
        eprintln!("dirtyscope: {error:#}");
        ExitCode::FAILURE
    })
}
