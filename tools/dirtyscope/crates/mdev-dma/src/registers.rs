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

    /// Reads registers that follow one another, `register` the first of them, each by an access of its own.
    fn read_all<const N: usize>(
        &self,
        register: u32,
        widths: [Width; N],
    ) -> Result<[u64; N], Self::Error> {
        let (mut values, mut next) = ([0; N], register);
        for (value, width) in values.iter_mut().zip(widths) {
            *value = self.read(next, width)?;
            next += width as u32;
        }
        Ok(values)
    }

    /// The same for writing.
    fn write_all(&self, register: u32, values: &[(Width, u64)]) -> Result<(), Self::Error> {
        let mut next = register;
        for &(width, value) in values {
            self.write(next, width, value)?;
            next += width as u32;
        }
        Ok(())
    }
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

    /// By one call, of which the kernel makes an access for each register. One that fails ends it, and is
    /// made again to say why.
    fn read_all<const N: usize>(&self, register: u32, widths: [Width; N]) -> Result<[u64; N]> {
        let mut bytes = [[0; 8]; N];
        let parts = bytes.iter_mut().zip(widths).map(|(bytes, width)| &mut bytes[..width.bytes()]);
        let done = self.device.read_parts_at(self.offset(register), parts)?;
        let mut values = bytes.map(u64::from_le_bytes);
        let mut at = 0;
        for (value, width) in values.iter_mut().zip(widths) {
            if at + width.bytes() > done {
                *value = self.read(register + at as u32, width)?;
            }
            at += width.bytes();
        }
        Ok(values)
    }

    /// As [`Self::read_all`].
    fn write_all(&self, register: u32, values: &[(Width, u64)]) -> Result<()> {
        let bytes: Vec<_> = values.iter().map(|(_, value)| value.to_le_bytes()).collect();
        let parts = bytes.iter().zip(values).map(|(bytes, (width, _))| &bytes[..width.bytes()]);
        let done = self.device.write_parts_at(self.offset(register), parts)?;
        let mut at = 0;
        for &(width, value) in values {
            if at + width.bytes() > done {
                self.write(register + at as u32, width, value)?;
            }
            at += width.bytes();
        }
        Ok(())
    }
}

fn whole(n: usize, width: Width) -> Result<()> {
    if n == width.bytes() {
        return Ok(());
    }
    Err(Error::Unknown(format!("{n} of {} bytes of a register were transferred", width.bytes())))
}
