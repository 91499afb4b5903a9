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

/// Runs the command. Lines that are no operations, as `is_input` says, depend on no others.
pub fn shrink(arguments: &ShrinkArguments, is_input: fn(&str) -> bool) -> Result<ExitCode> {
    let file = &arguments.file;
    let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    let lines: Vec<_> = text.lines().filter(|line| !line.starts_with('#')).collect();
    let texts: Vec<String> = if lines.iter().all(|line| is_input(line)) {
        let all = shorter(&lines, |_| true).into_iter().chain([lines]);
        all.map(|lines| lines.join("\n") + "\n").collect()
    } else {
        let ops = read_program(file)?;
        let all = shorter(&ops, is_possible).into_iter().chain([ops]);
        all.map(|ops| program::text(&ops)).collect()
    };
    for (number, text) in texts.iter().enumerate() {
        let path = arguments.directory.join(format!("{number:04}.ops"));
        fs::write(&path, text).with_context(|| path.display().to_string())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What is left when a part is left out, large parts first, if that is possible.
fn shorter<T: Clone>(ops: &[T], is_possible: fn(&[T]) -> bool) -> Vec<Vec<T>> {
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

/// Whether devices are opened before they are used.
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
        let texts: Vec<_> =
            shorter(&ops, is_possible).iter().map(|ops| program::text(ops)).collect();
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
