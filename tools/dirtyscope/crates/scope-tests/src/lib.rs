// SPDX-License-Identifier: GPL-2.0-only

//! Scenarios about type1 with devices that have an IOMMU beside those that haven't: what is dirty then,
//! what can be mapped, and what is locked.
//!
//! A family has a file, whose `SCENARIOS` lists what is in it.

#![forbid(unsafe_code)]

mod defect;
mod demotion;
mod mapping;
mod promotion;
mod vaddr;

use harness::Scenario;
use testbed::Op;
use vfio_client::Leave;

/// All of them.
pub fn scenarios() -> impl Iterator<Item = &'static Scenario> {
    [
        demotion::SCENARIOS,
        promotion::SCENARIOS,
        mapping::SCENARIOS,
        vaddr::SCENARIOS,
        defect::SCENARIOS,
    ]
    .into_iter()
    .flatten()
}

/// The group of the device in a slot joins the container.
fn join(device: usize) -> Op {
    Op::Join { device }
}

/// It leaves, by `VFIO_GROUP_UNSET_CONTAINER`.
fn leave(device: usize) -> Op {
    Op::Leave { device, by: Leave::Unset }
}
