// SPDX-License-Identifier: GPL-2.0-only

use anyhow::{Context as _, Result};
use std::{fs, ops::RangeInclusive, path::Path};
use vfio_client::{DeviceNode, PciFunction};

const DEVICES: &str = "/sys/bus/pci/devices";

/// Vendor and device, as sysfs shows them.
const ID: (&str, &str) = ("0x1234", "0x11e8");

/// An edu of this machine, by its address on the PCI bus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    pci: PciFunction,
    group: u32,
}

impl Function {
    /// All that have an IOMMU, by their address.
    pub fn all() -> Result<Vec<Self>> {
        let Ok(entries) = fs::read_dir(DEVICES) else { return Ok(Vec::new()) };
        let mut functions = Vec::new();
        for entry in entries {
            let pci = PciFunction::new(entry?.path());
            let id = (pci.read("vendor")?, pci.read("device")?);
            if (id.0.as_str(), id.1.as_str()) == ID && pci.path().join("iommu_group").exists() {
                functions.push(pci);
            }
        }
        functions.sort();
        let one = |pci: PciFunction| {
            let group = DeviceNode::from_sysfs(pci.path())?.group();
            Ok(Self { pci, group })
        };
        functions.into_iter().map(one).collect()
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        self.pci.path()
    }

    /// The number of its group.
    pub fn group(&self) -> u32 {
        self.group
    }

    /// How VFIO calls it.
    pub fn node(&self) -> Result<DeviceNode> {
        Ok(DeviceNode::from_sysfs(self.path())?)
    }

    /// The driver that it is bound to.
    pub fn driver(&self) -> Option<String> {
        self.pci.driver()
    }

    /// Binds it to a driver, whatever it was bound to. Blocks while it is open.
    pub fn bind(&self, driver: &str) -> Result<()> {
        Ok(self.pci.bind(driver)?)
    }

    /// Leaves it without a driver.
    pub fn unbind(&self) -> Result<()> {
        Ok(self.pci.unbind()?)
    }

    /// What its IOMMU can map, as the IOMMU's driver says: the address width, less what is reserved.
    pub fn iova_ranges(&self) -> Result<Vec<RangeInclusive<u64>>> {
        let mut next = 0;
        let mut ranges = Vec::new();
        let end = 1 << self.address_width()?;
        for (first, last) in self.reserved()? {
            if first > next {
                ranges.push(next..=first - 1);
            }
            next = last + 1;
        }
        ranges.push(next..=end - 1);
        Ok(ranges)
    }

    /// Bits of an IOVA: MGAW of the capability register, in the VT-d specification.
    fn address_width(&self) -> Result<u32> {
        let text = self.pci.read("iommu/intel-iommu/cap");
        let text = text.context("only intel-iommu tells its address width")?;
        let cap = u64::from_str_radix(&text, 16).with_context(|| format!("cap is {text:?}"))?;
        Ok(((cap >> 16) & 0x3f) as u32 + 1)
    }

    /// What is reserved in its group, by ascending address: first and last byte.
    fn reserved(&self) -> Result<Vec<(u64, u64)>> {
        let text = self.pci.read("iommu_group/reserved_regions")?;
        let line = |line: &str| {
            let mut words = line.split_whitespace();
            let mut number = || u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok();
            number().zip(number()).with_context(|| format!("reserved_regions has {line:?}"))
        };
        text.lines().map(line).collect()
    }
}
