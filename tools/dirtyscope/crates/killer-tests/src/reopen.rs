// SPDX-License-Identifier: GPL-2.0-only

//! A group whose file is closed and opened again while its device is open by iommufd.

use crate::{PANIC_ON_OOPS, or_stuck};
use anyhow::Result;
use harness::{Context, Scenario, Setting, Shows, Signature, defect};
use mdev_dma::MdevDma;
use std::sync::Mutex;
use testbed::reopened::Reopened;
use vfio_client::Container;

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

/// What was opened by iommufd is closed last by somebody who has it by type1: then it leaves an
/// IOMMU that it has never come to.
fn group_reopened(context: &Context<'_>) -> Result<()> {
    let Some(Reopened { node, device, group, .. }) = Reopened::new(context)? else {
        return Ok(());
    };
    let container = Container::new(group)?;
    let other = MdevDma::open(&container, &node)?;
    drop(device);
    let _no_panic = Setting::new(PANIC_ON_OOPS, "0")?;
    or_stuck("closing the device", Mutex::new(Some(other)), |other| {
        drop(other.lock().map(|mut other| other.take()));
    })
}
