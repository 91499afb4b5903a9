// SPDX-License-Identifier: GPL-2.0-only

//! Operations one after the other, from a file or from a generator.

use crate::{Besides, Contract, Op, Testbed};
use anyhow::{Context as _, Result, ensure};
use dirty_model::Limits;
use harness::{Context, Skip};
use std::fmt::Write as _;

/// Why an operation can't be done.
pub(crate) const NOT_ALLOWED: &str = "there is no such device, or its group is, or isn't, in the container, or it is, or isn't, open";

/// How a program failed.
pub struct Failed {
    /// Operations that were done, the one that failed included. One more than there are if it was the
    /// check at the end that failed.
    pub done: usize,
    pub error: anyhow::Error,
}

/// Reads operations: a line each, but for empty ones and what is behind a #.
pub fn parse(text: &str) -> Result<Vec<Op>> {
    let lines = (1..).zip(text.lines());
    let lines = lines.map(|(n, line)| (n, line.split('#').next().unwrap_or_default().trim()));
    let lines = lines.filter(|(_, line)| !line.is_empty());
    lines.map(|(n, line)| line.parse().with_context(|| format!("line {n}"))).collect()
}

/// Writes operations as [`parse`] reads them.
pub fn text(program: &[Op]) -> String {
    program.iter().fold(String::new(), |mut text, op| {
        let _ = writeln!(text, "{op}");
        text
    })
}

/// Begins a program: with the groups of both mediated devices, the first of which is open.
pub(crate) const BEGIN: [Op; 3] =
    [Op::Join { device: 0 }, Op::Open { device: 0 }, Op::Join { device: 1 }];

/// What the kernel owes when a program begins, see [`Contract::new`].
pub fn contract(dma_entry_limit: u32, limits: Limits) -> Contract {
    let mut contract = Contract::new(dma_entry_limit, limits);
    for op in &BEGIN {
        contract.apply(op);
    }
    contract
}

/// Does a program on a container of its own, which begins with [`BEGIN`]. At the end, all that is dirty is
/// read, and everything is compared.
pub fn run(context: &Context<'_>, program: &[Op]) -> Result<Result<(), Failed>> {
    run_after(context, program, &mut None)
}

/// As [`run`], after another program that left behind what is locked and pinned `besides`; which isn't looked up
/// again then. Should this one have passed, so is it afterwards.
pub fn run_after(
    context: &Context<'_>,
    program: &[Op],
    besides: &mut Option<Besides>,
) -> Result<Result<(), Failed>> {
    let [_, _, join_second] = BEGIN;
    let mut bed = Testbed::new(context)?;
    bed.must(join_second)?;
    bed.count_from(besides.take())?;
    for (i, op) in program.iter().enumerate() {
        ensure!(bed.contract().allows(op), "{op}: {NOT_ALLOWED}");
        match bed.apply(op.clone()) {
            Ok(_) => {}
            // This machine lacks what it needs: that is no failure.
            Err(error) if error.is::<Skip>() => return Err(error),
            Err(error) => return Ok(Err(Failed { done: i + 1, error })),
        }
    }
    let mut end = || -> Result<()> {
        if bed.contract().model.tracking() {
            bed.read_all()?;
        }
        bed.apply(Op::Check).map(drop)
    };
    if let Err(error) = end() {
        return Ok(Err(Failed { done: program.len() + 1, error }));
    }
    *besides = bed.besides();
    bed.close();
    Ok(Ok(()))
}
