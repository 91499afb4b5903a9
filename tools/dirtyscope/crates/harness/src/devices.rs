// SPDX-License-Identifier: GPL-2.0-only

//! The mediated devices that scenarios use.

use crate::Skip;
use anyhow::{Context as _, Result, bail};
use mdev_dma::sysfs::{Mdev, MdevType};
use rustix::io::Errno;
use uuid::Uuid;

/// Mediated devices, made when they are asked for. Those it made are removed when it is dropped.
pub struct Devices {
    all: Vec<Mdev>,
    /// The first so many are the user's.
    given: usize,
}

impl Devices {
    /// With the device the user gave, which must exist, or none.
    pub fn new(given: Option<Uuid>) -> Result<Self> {
        let all: Vec<_> = given.into_iter().map(|uuid| Mdev { uuid }).collect();
        for mdev in &all {
            if !mdev.exists() {
                bail!(
                    "no device {}: create it, or leave out --device and one is created",
                    mdev.path().display()
                );
            }
        }
        Ok(Self { given: all.len(), all })
    }

    /// Device number `i`. It is created if it doesn't exist: under the UUID that it had, if it was lost
    /// when the driver was unloaded.
    pub fn get(&mut self, i: usize) -> Result<Mdev> {
        while self.all.len() <= i {
            self.all.push(Mdev { uuid: new_uuid()? });
        }
        let mdev = self.all[i];
        if !mdev.exists() {
            MdevType::find()?.create(mdev.uuid).map_err(|error| match Errno::from_raw_os_error(
                error.errno(),
            ) {
                Errno::USERS => {
                    Skip(format!("needs {} devices, and no more can be made", i + 1)).into()
                }
                _ => anyhow::Error::from(error),
            })?;
        }
        Ok(mdev)
    }
}

/// A UUID that nothing has. Not from `getrandom()`, which waits in a VM until there is entropy.
pub fn new_uuid() -> Result<Uuid> {
    let text = procfs::sys::kernel::random::uuid().context("ask the kernel for a UUID")?;
    text.trim().parse().context("the kernel's UUID")
}

impl Drop for Devices {
    fn drop(&mut self) {
        for mdev in &self.all[self.given..] {
            if mdev.exists() {
                if let Err(error) = mdev.remove() {
                    eprintln!("dirtyscope: {} stays: {error}", mdev.uuid);
                }
            }
        }
    }
}
