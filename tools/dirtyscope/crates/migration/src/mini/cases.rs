// SPDX-License-Identifier: GPL-2.0-only

//! The cases that only the minimal VMM has, or that others have under another name.

use super::MiniVmm;
use crate::{
    cases::{HIGH_WINDOW, MachineCase, above_4g},
    pair::MachinePair,
    runner::case,
    vmm::{ABOVE_4G, Layout},
};
use anyhow::Result;
use mdev_dma::Opcode;

/// These cases.
pub const CASES: &[MachineCase<MiniVmm>] = &[
    case("mini-vmm/above-4g", "written above 4 GiB, where addresses aren't offsets", above_4g),
    case("mini-vmm/memory-hidden", "memory is hidden from the device and shown again", hidden),
];

fn hidden(pair: &mut MachinePair<'_, MiniVmm>) -> Result<()> {
    let middle = HIGH_WINDOW.start + (HIGH_WINDOW.end - HIGH_WINDOW.start) / 2;
    let (pinned, other) = (HIGH_WINDOW.start..middle, middle..HIGH_WINDOW.end);
    pair.start_as(Layout::split(1))?;
    pair.pin(0, pinned.clone())?;
    pair.begin()?;
    pair.passes(2)?;
    // No GET_BITMAP comes between the writes and UNMAP, which would say what UNMAP has to.
    pair.here().wait_after_pass(true);
    pair.until("for a pass to end", |machine| Ok(machine.waits()))?;
    pair.write(0, Opcode::Write, pinned.clone())?;
    pair.write(0, Opcode::DmaWrite, other.clone())?;
    pair.here().hide(ABOVE_4G)?;
    pair.revoked(0, &pinned)?;
    // It is sent while it is hidden, and nobody asks for its bitmap.
    pair.here().wait_after_pass(false);
    pair.more_passes(2)?;
    pair.here().show(ABOVE_4G)?;
    pair.write(0, Opcode::DmaWrite, other.start..other.start + 64)?;
    pair.complete().map(drop)
}
