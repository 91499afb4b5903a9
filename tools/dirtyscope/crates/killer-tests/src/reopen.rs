// SPDX-License-Identifier: GPL-2.0-only

//! A group whose file is closed and opened again while its device is open by iommufd.

use crate::{PANIC_ON_OOPS, or_stuck};
use anyhow::Result;
use harness::{Context, Scenario, Setting, Shows, Signature, defect};
use mdev_dma::MdevDma;
use testbed::fixture::Fixture;
use vfio_client::{Container, Leave};

pub const SCENARIOS: &[Scenario] = &[defect(
    "type1/killer/D17-group-reopened",
    "a group whose device is open by iommufd can't be opened again, and put into a container of type1",
    group_reopened,
    Signature {
        defect: "D17",
        shows: Shows::Hang(&["closing the device does not return"]),
        complaints: &["BUG: kernel NULL pointer dereference, address: *", "Oops: Oops: *"],
    },
)];

/// The device is open by iommufd, then by a container of type1 as well, which closes it last: the core takes it
/// from the devices of that container, where it was never registered.
fn group_reopened(context: &Context<'_>) -> Result<()> {
    let fixture = Fixture::by_iommufd(context, 1)?;
    let Some(group) = fixture.reopen_group(Leave::Close)? else { return Ok(()) };
    let container = Container::new(group)?;
    let other = MdevDma::open(&container, &context.device(0)?.node()?)?;
    drop(fixture);
    let _no_panic = Setting::new(PANIC_ON_OOPS, "0")?;
    or_stuck("closing the device", (), move |()| drop(other))
}
