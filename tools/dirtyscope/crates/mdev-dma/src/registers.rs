// SPDX-License-Identifier: GPL-2.0-only

use crate::{Error, Result, sysfs::Mdev, uapi};
use std::sync::Arc;
use vfio_client::{Container, Device, DeviceNode, Ioas, RegionInfo, uapi as vfio};

/// Bytes of an access to a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Width {
    /// 1
    Byte = 1,
    /// 2
    Word = 2,
    /// 4
    Long = 4,
    /// 8
    Quad = 8,
}

impl Width {
    /// Bytes.
    pub fn bytes(self) -> usize {
        self as usize
    }
}

/// Access to the registers of a device, on whatever path.
///
/// `register` is an offset into BAR 0: `RUST_MDEV_DMA_REG_*`, or one into a register.
pub trait RegisterAccess {
    /// What an access fails with.
    type Error: From<Error>;

    /// Reads a register, or part of one.
    fn read(&self, register: u32, width: Width) -> Result<u64, Self::Error>;

    /// Writes a register, or part of one.
    fn write(&self, register: u32, width: Width, value: u64) -> Result<(), Self::Error>;
}

/// BAR 0 of an open VFIO device: registers by its file descriptor.
#[derive(Debug)]
pub struct DeviceFile {
    pub(crate) device: Device,
    pub(crate) bar: RegionInfo,
}

impl DeviceFile {
    /// Opens a device whose group is in `container`.
    pub(crate) fn open(container: &Arc<Container>, node: &DeviceNode) -> Result<Self> {
        Self::new(Device::open(container, node)?)
    }

    /// Opens a device by iommufd: see [`Device::open_in`].
    pub(crate) fn open_in(ioas: &Arc<Ioas>, mdev: &Mdev) -> Result<Self> {
        Self::new(Device::open_in(ioas, &mdev.path())?)
    }

    fn new(device: Device) -> Result<Self> {
        let bar = device.region_info(vfio::VFIO_PCI_BAR0_REGION_INDEX, None)?;
        if bar.size != u64::from(uapi::RUST_MDEV_DMA_BAR_SIZE) {
            return Err(Error::Unknown(format!("BAR 0 has {:#x} bytes", bar.size)));
        }
        Ok(Self { device, bar })
    }

    fn offset(&self, register: u32) -> u64 {
        self.bar.offset + u64::from(register)
    }
}

impl RegisterAccess for DeviceFile {
    type Error = Error;

    fn read(&self, register: u32, width: Width) -> Result<u64> {
        let mut bytes = [0; 8];
        let n = self.device.read_at(self.offset(register), &mut bytes[..width.bytes()])?;
        whole(n, width)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn write(&self, register: u32, width: Width, value: u64) -> Result<()> {
        let bytes = value.to_le_bytes();
        whole(self.device.write_at(self.offset(register), &bytes[..width.bytes()])?, width)
    }
}

fn whole(n: usize, width: Width) -> Result<()> {
    if n == width.bytes() {
        return Ok(());
    }
    Err(Error::Unknown(format!("{n} of {} bytes of a register were transferred", width.bytes())))
}
