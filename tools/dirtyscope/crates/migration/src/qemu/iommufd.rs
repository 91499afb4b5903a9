// SPDX-License-Identifier: GPL-2.0-only

//! QEMU with an address space of iommufd in place of a container of type1. Nobody has an account there of
//! what devices write but they themselves: the log of each (`VFIO_DEVICE_FEATURE_DMA_LOGGING_*`) is what
//! these migrations go by.

use super::{QemuMachine, QemuVmm};
use crate::{
    cases::{MachineCase, above_4g},
    runner::case,
    vmm::{MachineConfig, Vmm},
};
use anyhow::Result;
use harness::{Context, Skip};
use mdev_dma::sysfs::{Mdev, MdevType};
use std::cell::RefCell;

/// Those beyond what all VMMs have.
pub fn cases<'a>() -> [MachineCase<IommufdVmm<'a>>; 1] {
    [case("iommufd/above-4g", "written above 4 GiB, where addresses aren't offsets", above_4g)]
}

/// QEMU, whose devices are of the type that logs. They are removed when it is dropped.
pub struct IommufdVmm<'a> {
    qemu: &'a QemuVmm,
    devices: RefCell<Vec<Mdev>>,
}

impl<'a> IommufdVmm<'a> {
    pub fn new(qemu: &'a QemuVmm) -> Self {
        Self { qemu, devices: RefCell::default() }
    }
}

impl Vmm for IommufdVmm<'_> {
    type Machine = QemuMachine;

    const FAMILY: &'static str = "iommufd";

    fn device(&self, context: &Context<'_>, number: usize) -> Result<Mdev> {
        let mut devices = self.devices.borrow_mut();
        while devices.len() <= number {
            let Some(logging) = MdevType::named("dma-log")? else {
                return Err(Skip("this kernel can't serve DMA logging".into()).into());
            };
            devices.push(logging.create(context.new_uuid()?)?);
        }
        Ok(devices[number])
    }

    fn start(&self, config: &MachineConfig<'_>) -> Result<QemuMachine> {
        self.qemu.start_with(config, ",iommufd=space", &["-object", "iommufd,id=space"])
    }
}

impl Drop for IommufdVmm<'_> {
    fn drop(&mut self) {
        for mdev in self.devices.borrow().iter() {
            if let Err(error) = mdev.remove() {
                eprintln!("dirtyscope: {} stays: {error}", mdev.uuid);
            }
        }
    }
}
