// SPDX-License-Identifier: GPL-2.0-only

use anyhow::{Context as _, Result, bail, ensure};
use std::{
    fs,
    ops::RangeInclusive,
    path::{Path, PathBuf},
};
use vfio_client::DeviceNode;

const DEVICES: &str = "/sys/bus/pci/devices";

/// Vendor and device, as sysfs shows them.
const ID: (&str, &str) = ("0x1234", "0x11e8");

/// An edu of this machine, by its address on the PCI bus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    path: PathBuf,
    group: u32,
}

impl Function {
    /// All that have an IOMMU, by their address.
    pub fn all() -> Result<Vec<Self>> {
        let Ok(entries) = fs::read_dir(DEVICES) else { return Ok(Vec::new()) };
        let mut paths = Vec::new();
        for entry in entries {
            let path = entry?.path();
            let id = (attribute(&path, "vendor")?, attribute(&path, "device")?);
            if (id.0.as_str(), id.1.as_str()) == ID && path.join("iommu_group").exists() {
                paths.push(path);
            }
        }
        paths.sort();
        let one = |path: PathBuf| {
            let group = DeviceNode::from_sysfs(&path)?.group();
            Ok(Self { path, group })
        };
        paths.into_iter().map(one).collect()
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The number of its group.
    pub fn group(&self) -> u32 {
        self.group
    }

    /// How VFIO calls it.
    pub fn node(&self) -> Result<DeviceNode> {
        Ok(DeviceNode::from_sysfs(&self.path)?)
    }

    /// The driver that it is bound to.
    pub fn driver(&self) -> Option<String> {
        let target = fs::read_link(self.path.join("driver")).ok()?;
        Some(target.file_name()?.to_string_lossy().into_owned())
    }

    /// Binds it to a driver, whatever it was bound to. Blocks while it is open.
    pub fn bind(&self, driver: &str) -> Result<()> {
        if self.driver().as_deref() == Some(driver) {
            return Ok(());
        }
        ensure!(
            Path::new("/sys/bus/pci/drivers").join(driver).exists(),
            "there is no PCI driver {driver}: modprobe {driver}"
        );
        self.unbind()?;
        write(&self.path.join("driver_override"), driver)?;
        write(Path::new("/sys/bus/pci/drivers_probe"), &self.address())?;
        match self.driver() {
            Some(bound) if bound == driver => Ok(()),
            other => bail!("{} is bound to {other:?}, not to {driver}", self.path.display()),
        }
    }

    /// Leaves it without a driver.
    pub fn unbind(&self) -> Result<()> {
        if self.driver().is_some() {
            write(&self.path.join("driver/unbind"), &self.address())?;
        }
        write(&self.path.join("driver_override"), "\n")
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
        let path = self.path.join("iommu/intel-iommu");
        let text = attribute(&path, "cap").context("only intel-iommu tells its address width")?;
        let cap = u64::from_str_radix(&text, 16).with_context(|| format!("cap is {text:?}"))?;
        Ok(((cap >> 16) & 0x3f) as u32 + 1)
    }

    /// What is reserved in its group, by ascending address: first and last byte.
    fn reserved(&self) -> Result<Vec<(u64, u64)>> {
        let text = attribute(&self.path.join("iommu_group"), "reserved_regions")?;
        let line = |line: &str| {
            let mut words = line.split_whitespace();
            let mut number = || u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok();
            number().zip(number()).with_context(|| format!("reserved_regions has {line:?}"))
        };
        text.lines().map(line).collect()
    }

    fn address(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }
}

fn attribute(directory: &Path, name: &str) -> Result<String> {
    let path = directory.join(name);
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    Ok(text.trim_end().to_owned())
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("write {text:?} to {}", path.display()))
}
