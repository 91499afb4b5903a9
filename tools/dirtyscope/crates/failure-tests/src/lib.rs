// SPDX-License-Identifier: GPL-2.0-only

//! Scenarios in which an allocation of the kernel fails: in an operation the first, then the second, and
//! so on until there are no more. After each, kernel and model must agree, whether the operation failed
//! or not; it must succeed when it is done again; and all that it took must be there again in the end.
//!
//! They need a kernel that can make allocations fail, and are no part of other runs:
//! `dirtyscope verify --fail-nth`.

#![forbid(unsafe_code)]

mod calls;
mod driver;
mod faults;
mod features;
mod leaks;
mod sweep;
mod type1;

use harness::Scenario;

/// All of them.
pub fn scenarios() -> impl Iterator<Item = &'static Scenario> {
    [type1::SCENARIOS, calls::SCENARIOS, driver::SCENARIOS, features::SCENARIOS, leaks::SCENARIOS]
        .into_iter()
        .flatten()
}
