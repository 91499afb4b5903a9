// SPDX-License-Identifier: GPL-2.0-only

//! Scenarios about type1: what memory is mapped, of files, of huge pages, of devices; whose it is; what
//! becomes of it while devices have it; how much of it there may be; and memory for type1's answers.
//!
//! A family has a file, whose `SCENARIOS` lists what is in it.

#![forbid(unsafe_code)]

mod buffer;
mod charge;
mod limit;
mod mapper;
mod memory;
mod process;
mod region;

use harness::Scenario;

/// All of them.
pub fn scenarios() -> impl Iterator<Item = &'static Scenario> {
    [
        limit::SCENARIOS,
        charge::SCENARIOS,
        buffer::SCENARIOS,
        memory::SCENARIOS,
        mapper::SCENARIOS,
        region::SCENARIOS,
        process::SCENARIOS,
    ]
    .into_iter()
    .flatten()
}
