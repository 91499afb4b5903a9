// SPDX-License-Identifier: GPL-2.0-only

//! Scenarios about type1: what the kernel owes to a user that tracks dirty pages.
//!
//! A family has a file, whose `SCENARIOS` lists what is in it. To add a scenario, write a function
//! and add it there.

#![forbid(unsafe_code)]

mod container;
mod defect;
mod dirty;
mod many;
mod map;
mod pin;
mod process;
mod raw_defect;
mod raw_pin;
mod selftest;
mod v1;

use harness::Scenario;

/// All but those in [`lockdep`] and [`raw_pins`].
pub fn scenarios() -> impl Iterator<Item = &'static Scenario> {
    [
        selftest::SCENARIOS,
        dirty::SCENARIOS,
        map::SCENARIOS,
        many::SCENARIOS,
        pin::SCENARIOS,
        container::SCENARIOS,
        process::SCENARIOS,
        v1::SCENARIOS,
        defect::SCENARIOS,
    ]
    .into_iter()
    .flatten()
}

/// What lockdep has to say of type1, before any other scenario.
pub fn lockdep() -> impl Iterator<Item = &'static Scenario> {
    [&defect::LOCK_ORDER].into_iter()
}

/// Those of pins from any IOVA with any protection, which devices have if the driver was loaded with
/// `raw_pins=1`.
pub fn raw_pins() -> impl Iterator<Item = &'static Scenario> {
    [raw_pin::SCENARIOS, raw_defect::SCENARIOS].into_iter().flatten()
}
