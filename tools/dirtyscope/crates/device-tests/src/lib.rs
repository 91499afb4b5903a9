// SPDX-License-Identifier: GPL-2.0-only

//! Scenarios about `rust_mdev_dma`: what the driver owes whoever has it read and write memory. What it
//! owes as one that interrupts and migrates has a crate of its own, `device-feature-tests`.
//!
//! A family has a file, whose `SCENARIOS` lists what is in it. To add a scenario, write a function
//! and add it there.

#![forbid(unsafe_code)]

mod background;
mod client;
mod commands;
mod generator;
pub mod hold;
mod interface;
mod lifetime;
mod mdev;
mod memory;
mod module;

use harness::Scenario;

/// All of them.
pub fn scenarios() -> impl Iterator<Item = &'static Scenario> {
    [
        interface::SCENARIOS,
        commands::SCENARIOS,
        memory::SCENARIOS,
        lifetime::SCENARIOS,
        background::SCENARIOS,
        generator::SCENARIOS,
        mdev::SCENARIOS,
        client::SCENARIOS,
        module::SCENARIOS,
    ]
    .into_iter()
    .flatten()
}
