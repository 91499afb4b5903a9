// SPDX-License-Identifier: GPL-2.0-only

//! Scenarios about what `rust_mdev_dma` has of the parts of VFIO that are up to a driver: interrupts,
//! migration, what it costs the host, DMA logging, use by iommufd, and what tests itself.
//!
//! A family has a file, whose `SCENARIOS` lists what is in it. To add a scenario, write a function
//! and add it there.

#![forbid(unsafe_code)]

mod cost;
mod hostile;
mod iommufd;
mod irq;
mod logging;
mod migration_state;
mod raw_pin;
mod stream;
mod unit;

use harness::Scenario;

/// All of them.
pub fn scenarios() -> impl Iterator<Item = &'static Scenario> {
    [
        irq::SCENARIOS,
        migration_state::SCENARIOS,
        hostile::SCENARIOS,
        cost::SCENARIOS,
        raw_pin::SCENARIOS,
        logging::SCENARIOS,
        logging::start::SCENARIOS,
        logging::report::SCENARIOS,
        logging::random::SCENARIOS,
        iommufd::SCENARIOS,
        unit::SCENARIOS,
    ]
    .into_iter()
    .flatten()
}

/// What drivers with raw pins owe.
pub fn raw_pins() -> impl Iterator<Item = &'static Scenario> {
    raw_pin::RAW.iter()
}
