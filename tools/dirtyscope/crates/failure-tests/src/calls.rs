// SPDX-License-Identifier: GPL-2.0-only

//! Calls that are no operation of the model.

use crate::sweep::sweep;
use anyhow::Result;
use harness::{Context, Scenario, scenario};
use testbed::Injected;
use vfio_client::{Container, Group, fail_nth::with_failure};

pub const SCENARIOS: &[Scenario] =
    &[scenario("fail-nth/container/first-group", "a container with its first group", first_group)];

const ERRNOS: [i32; 2] = [12, 14];

/// What came of a call that returns an error of the tool.
fn injected<T>(
    n: u32,
    call: impl FnOnce() -> vfio_client::Result<T>,
) -> Result<(Option<T>, Injected)> {
    let (result, used) = with_failure(n, call)?;
    match result {
        Ok(value) if used => Ok((Some(value), Injected::Absorbed)),
        Ok(value) => Ok((Some(value), Injected::Unused)),
        Err(error) if used && ERRNOS.contains(&error.errno()) => Ok((None, Injected::Failed)),
        Err(error) => Err(error.into()),
    }
}

fn first_group(context: &Context<'_>) -> Result<()> {
    let node = context.device(0)?.node()?;
    sweep(context, "a container with its first group", |n| {
        let (container, injected) = injected(n, || Container::new(Group::open(&node)?))?;
        if container.is_none() {
            // Nobody has the group.
            Container::new(Group::open(&node)?)?;
        }
        Ok(injected)
    })
}
