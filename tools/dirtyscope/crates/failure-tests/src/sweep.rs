// SPDX-License-Identifier: GPL-2.0-only

use crate::faults::Faults;
use anyhow::{Result, bail};
use dirty_model::Errno;
use harness::{Context, Failure, locked_memory, pages_pinned};
use std::fmt;
use testbed::{Injected, Op, Testbed, errno_of, program, same};
use vfio_client::fail_nth::with_failure;

/// No operation has so many allocations.
const MANY: u32 = 2000;

/// What came of the allocations of an operation.
#[derive(Default)]
pub struct Counts {
    failed: u32,
    absorbed: u32,
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { failed, absorbed } = self;
        write!(f, "{} allocations, {failed} failed it, {absorbed} didn't", failed + absorbed)
    }
}

/// Has the first allocation fail in what `attempt` does, then the second, and so on until there are no
/// more. What it does leaves nothing behind: no page pinned, no memory locked.
pub fn sweep(
    context: &Context<'_>,
    what: &str,
    mut attempt: impl FnMut(u32) -> Result<Injected>,
) -> Result<()> {
    let _faults = Faults::allow()?;
    let mut counts = Counts::default();
    for n in 1..MANY {
        context.note(format_args!("allocation {n} of {what} fails"));
        let before = (pages_pinned()?, locked_memory()?);
        let injected = attempt(n).map_err(|error| at(error, n))?;
        same("pages pinned", before.0, pages_pinned()?).map_err(|error| at(error, n))?;
        same("VmLck", before.1, locked_memory()?).map_err(|error| at(error, n))?;
        match injected {
            Injected::Unused => {
                context.progress(format_args!("{what}: {counts}"));
                return Ok(());
            }
            Injected::Absorbed => counts.absorbed += 1,
            Injected::Failed => counts.failed += 1,
        }
    }
    bail!("{what} has more than {MANY} allocations")
}

/// Makes a call, of which the `n`th allocation fails, and says what came of it.
pub fn injected<T>(n: u32, call: impl FnOnce() -> Result<T>) -> Result<(Option<T>, Injected)> {
    let (result, used) = with_failure(n, call)?;
    match result {
        Ok(value) if used => Ok((Some(value), Injected::Absorbed)),
        Ok(value) => Ok((Some(value), Injected::Unused)),
        Err(error) if used && matches!(errno_of(&error), Some(Errno::ENOMEM | Errno::EFAULT)) => {
            Ok((None, Injected::Failed))
        }
        Err(error) => Err(Failure::new(error.to_string()).into()),
    }
}

/// The same failure, and which allocation it was.
fn at(error: anyhow::Error, n: u32) -> anyhow::Error {
    match error.downcast::<Failure>() {
        Ok(mut failure) => {
            failure.0.what = format!("allocation {n} fails: {}", failure.0.what);
            failure.into()
        }
        Err(error) => error.context(format!("allocation {n} fails")),
    }
}

/// Has allocations of `op` fail, after `setup` on a container of its own with the groups of both
/// mediated devices, the first of which is open; `then` is done in the end.
pub fn operation(context: &Context<'_>, setup: &str, op: &str, then: &str) -> Result<()> {
    let (setup, op) = (program::parse(setup)?, op.parse::<Op>()?);
    let then = program::parse(then)?;
    sweep(context, &op.to_string(), |n| once(context, [&setup, &then], &op, n))
}

fn once(context: &Context<'_>, [setup, then]: [&[Op]; 2], op: &Op, n: u32) -> Result<Injected> {
    let mut bed = Testbed::new(context)?;
    bed.must(Op::Join { device: 1 })?;
    bed.count_locked_memory()?;
    for op in setup {
        bed.must(op.clone())?;
    }
    let injected = bed.apply_with_failure(op, n)?;
    compare(&mut bed)?;
    if injected == Injected::Failed {
        bed.apply(op.clone())?;
        compare(&mut bed)?;
    }
    for op in then {
        bed.apply(op.clone())?;
    }
    release(&mut bed)?;
    Ok(injected)
}

/// Compares all that can be asked for, dirty pages too if they weren't being tracked.
fn compare(bed: &mut Testbed<'_>) -> Result<()> {
    bed.apply(Op::Check)?;
    if bed.contract().model.groups().len() == 0 {
        return Ok(());
    }
    if bed.contract().model.tracking() {
        bed.read_all()?;
        return Ok(());
    }
    // Refused, as nothing is tracked.
    let first = bed.contract().model.mappings().next().map(|one| (one.iova, one.size));
    if let Some((iova, size)) = first {
        bed.apply(Op::get_bitmap(iova, size))?;
    }
    bed.must(Op::Start)?;
    bed.read_all()?;
    bed.must(Op::Stop)
}

/// Gives back all that can be given back while the container is there.
fn release(bed: &mut Testbed<'_>) -> Result<()> {
    if bed.contract().model.groups().len() > 0 {
        bed.must(Op::unmap_all())?;
    }
    bed.apply(Op::Check).map(drop)
}
