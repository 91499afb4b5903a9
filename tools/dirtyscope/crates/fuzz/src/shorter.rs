// SPDX-License-Identifier: GPL-2.0-only

//! Sequences that are shorter than one that kills the kernel, to be tried in another boot.

use crate::read_program;
use anyhow::{Context as _, Result};
use std::{fs, path::PathBuf, process::ExitCode};
use testbed::{Op, limits_of, program};

/// Write all sequences to try that are shorter than one, and it itself as the last
#[derive(clap::Args)]
pub struct ShrinkArguments {
    /// The sequence
    file: PathBuf,
    /// An empty directory for the others, which are numbered
    directory: PathBuf,
}

/// Runs the command.
pub fn shrink(arguments: &ShrinkArguments) -> Result<ExitCode> {
    let ops = read_program(&arguments.file)?;
    let all = shorter(&ops).into_iter().chain([ops]);
    for (number, ops) in (0..).zip(all) {
        let path = arguments.directory.join(format!("{number:04}.ops"));
        fs::write(&path, program::text(&ops)).with_context(|| path.display().to_string())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What is left when a part is left out, large parts first, as long as devices are opened before they
/// are used.
fn shorter(ops: &[Op]) -> Vec<Vec<Op>> {
    let mut all = Vec::new();
    let mut len = ops.len().div_ceil(2);
    while len > 0 {
        // The end is most often what kills: what was long before it goes first.
        for start in (0..ops.len()).step_by(len) {
            let rest = [&ops[..start], &ops[ops.len().min(start + len)..]].concat();
            if !rest.is_empty() && is_possible(&rest) {
                all.push(rest);
            }
        }
        len /= 2;
    }
    all
}

fn is_possible(ops: &[Op]) -> bool {
    let mut contract = program::contract(u32::MAX, limits_of(u64::MAX, u64::MAX));
    ops.iter().all(|op| {
        let allowed = contract.allows(op);
        if allowed {
            contract.apply(op);
        }
        allowed
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_is_left_out() {
        let ops = program::parse("START\ndevice 1 OPEN\ndevice 1 RESET\nSTOP\n").unwrap();
        let texts: Vec<_> = shorter(&ops).iter().map(|ops| program::text(ops)).collect();
        // A device that isn't open can't be reset.
        assert_eq!(
            texts,
            [
                "START\ndevice 1 OPEN\n",
                "device 1 OPEN\ndevice 1 RESET\nSTOP\n",
                "START\ndevice 1 OPEN\nSTOP\n",
                "START\ndevice 1 OPEN\ndevice 1 RESET\n",
            ]
        );
    }
}
