// SPDX-License-Identifier: GPL-2.0-only

//! Scenarios about `rust_mdev_dma`: what the driver owes its user.
//!
//! A family has a file, whose `SCENARIOS` lists what is in it. To add a scenario, write a function
//! and add it there.

#![forbid(unsafe_code)]

mod background;
mod client;
mod commands;
mod fixture;
mod generator;
pub mod hold;
mod interface;
mod iommufd;
mod irq;
mod lifetime;
mod logging;
mod mdev;
mod memory;
mod migration_state;
mod module;

use harness::Scenario;

/// All of them.
pub fn scenarios() -> impl Iterator<Item = &'static Scenario> {
    [
        interface::SCENARIOS,
        commands::SCENARIOS,
        memory::SCENARIOS,
        lifetime::SCENARIOS,
        irq::SCENARIOS,
        background::SCENARIOS,
        generator::SCENARIOS,
        migration_state::SCENARIOS,
        logging::SCENARIOS,
        iommufd::SCENARIOS,
        mdev::SCENARIOS,
        client::SCENARIOS,
        module::SCENARIOS,
    ]
    .into_iter()
    .flatten()
}
