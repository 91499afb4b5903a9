// SPDX-License-Identifier: GPL-2.0-only

//! The devices that scenarios use.

use crate::Skip;
use anyhow::{Context as _, Result, bail};
use edu_client::Function;
use mdev_dma::sysfs::{Mdev, MdevType};
use rustix::io::Errno;
use uuid::Uuid;

/// PCI functions that do DMA through an IOMMU.
#[derive(Clone, Debug)]
pub struct Edus {
    /// In a group of its own each.
    pub singles: [Function; 2],
    /// In a group that they share.
    pub pair: [Function; 2],
}

/// Mediated devices, made when they are asked for, and PCI functions. Those it made are removed when it
/// is dropped, and the PCI functions have the drivers again that they had.
pub struct Devices {
    all: Vec<Mdev>,
    /// The first so many are the user's.
    given: usize,
    edus: Option<Edus>,
    /// Those, with the drivers that they had before.
    drivers: Vec<(Function, Option<String>)>,
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
        Ok(Self { given: all.len(), all, edus: None, drivers: Vec::new() })
    }

    /// Device number `i`. It is created if it doesn't exist: under the UUID that it had, if it was lost
    /// when the driver was unloaded.
    pub fn get(&mut self, i: usize) -> Result<Mdev> {
        while self.all.len() <= i {
            self.all.push(Mdev { uuid: new_uuid()? });
        }
        let mdev = self.all[i];
        if !mdev.exists() {
            mdev_type(self.all[0])?.create(mdev.uuid).map_err(|error| {
                match Errno::from_raw_os_error(error.errno()) {
                    Errno::USERS => {
                        Skip(format!("needs {} devices, and no more can be made", i + 1)).into()
                    }
                    _ => anyhow::Error::from(error),
                }
            })?;
        }
        Ok(mdev)
    }

    /// The PCI functions of this machine. Skips the scenario if it hasn't enough.
    pub fn edus(&mut self) -> Result<Edus> {
        if self.edus.is_none() {
            let edus = Edus::find()?;
            let all = edus.singles.iter().chain(&edus.pair);
            self.drivers = all.map(|edu| (edu.clone(), edu.driver())).collect();
            self.edus = Some(edus);
        }
        self.edus.clone().context("no PCI functions")
    }
}

impl Edus {
    /// Those of this machine, if it has them.
    fn find() -> Result<Self> {
        let all = Function::all()?;
        let in_group = |group| all.iter().filter(|one| one.group() == group).count();
        let of_groups_of = |count| {
            let some = all.iter().filter(|one| in_group(one.group()) == count).cloned();
            <[Function; 2]>::try_from(some.take(2).collect::<Vec<_>>())
        };
        let (Ok(singles), Ok(pair)) = (of_groups_of(1), of_groups_of(2)) else {
            let why = "needs an IOMMU, two of QEMU's edu with a group each, and two that share one";
            bail!(Skip(format!("{why}: tools/vm/qemu shows how")));
        };
        Ok(Self { singles, pair })
    }
}

/// The type of a device if it exists, so that all are of one driver; else the one there is.
fn mdev_type(first: Mdev) -> mdev_dma::Result<MdevType> {
    if first.exists() { first.mdev_type() } else { MdevType::find() }
}

/// A UUID that nothing has. Not from `getrandom()`, which waits in a VM until there is entropy.
pub fn new_uuid() -> Result<Uuid> {
    let text = procfs::sys::kernel::random::uuid().context("ask the kernel for a UUID")?;
    text.trim().parse().context("the kernel's UUID")
}

impl Drop for Devices {
    fn drop(&mut self) {
        for (edu, driver) in &self.drivers {
            let restored = match driver {
                Some(driver) => edu.bind(driver),
                None => edu.unbind(),
            };
            if let Err(error) = restored {
                eprintln!("dirtyscope: {} stays bound: {error:#}", edu.path().display());
            }
        }
        for mdev in &self.all[self.given..] {
            if mdev.exists() {
                if let Err(error) = mdev.remove() {
                    eprintln!("dirtyscope: {} stays: {error}", mdev.uuid);
                }
            }
        }
    }
}
