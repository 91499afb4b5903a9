// SPDX-License-Identifier: GPL-2.0-only

use crate::{Container, DeviceNode, Error, Ioas, Memory, Result, sys};
use rustix::ioctl::Opcode;
use std::{
    fs::File,
    io::{IoSlice, IoSliceMut},
    os::fd::{AsFd, BorrowedFd},
    path::Path,
    sync::Arc,
};
use vfio_bindings::bindings::vfio::{
    vfio_device_feature, vfio_device_info, vfio_irq_info, vfio_region_info,
};

/// What `VFIO_DEVICE_GET_INFO` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// `VFIO_DEVICE_FLAGS_*`
    pub flags: u32,
    /// Number of regions; indices are below.
    pub num_regions: u32,
    /// Number of interrupt indices.
    pub num_irqs: u32,
}

/// What `VFIO_DEVICE_GET_REGION_INFO` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionInfo {
    /// `VFIO_REGION_INFO_FLAG_*`
    pub flags: u32,
    /// Bytes.
    pub size: u64,
    /// Where it begins in the device's file.
    pub offset: u64,
}

/// What `VFIO_DEVICE_GET_IRQ_INFO` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IrqInfo {
    /// `VFIO_IRQ_INFO_*`
    pub flags: u32,
    /// Number of interrupts.
    pub count: u32,
}

/// An open device. Closed when dropped.
///
/// Where a method takes `argsz`, `None` stands for the size of the structure.
#[derive(Debug)]
pub struct Device {
    // Dropped in this order.
    file: File,
    memory: SeenMemory,
    name: String,
}

/// What has the memory that a device sees.
#[derive(Debug)]
enum SeenMemory {
    Container(Arc<Container>),
    Ioas(Arc<Ioas>),
}

impl Device {
    /// Opens a device whose group is in `container`.
    pub fn open(container: &Arc<Container>, node: &DeviceNode) -> Result<Self> {
        let file = container.open_device(node)?;
        let memory = SeenMemory::Container(container.clone());
        Ok(Self { file, memory, name: node.name.clone() })
    }

    /// Opens the device with the directory `sysfs`, e.g. `/sys/bus/mdev/devices/UUID`, by iommufd.
    /// Fails with `ENOENT` if the kernel has no `/dev/vfio/devices`.
    pub fn open_in(ioas: &Arc<Ioas>, sysfs: &Path) -> Result<Self> {
        let file = ioas.open_device(sysfs)?;
        let memory = SeenMemory::Ioas(ioas.clone());
        Ok(Self { file, memory, name: sysfs.display().to_string() })
    }

    /// The container that its group is in. Panics if it was opened by iommufd.
    pub fn container(&self) -> &Arc<Container> {
        match &self.memory {
            SeenMemory::Container(container) => container,
            SeenMemory::Ioas(ioas) => panic!("{} is in {ioas:?}, no container", self.name),
        }
    }

    /// `VFIO_DEVICE_GET_INFO`
    pub fn info(&self, argsz: Option<u32>) -> Result<DeviceInfo> {
        let argsz = argsz.unwrap_or(size_of::<vfio_device_info>() as u32);
        let info = vfio_device_info { argsz, ..Default::default() };
        let info = self.ask("VFIO_DEVICE_GET_INFO", sys::DEVICE_GET_INFO, argsz, info)?;
        let vfio_device_info { flags, num_regions, num_irqs, .. } = info;
        Ok(DeviceInfo { flags, num_regions, num_irqs })
    }

    /// `VFIO_DEVICE_GET_REGION_INFO`
    pub fn region_info(&self, index: u32, argsz: Option<u32>) -> Result<RegionInfo> {
        let argsz = argsz.unwrap_or(size_of::<vfio_region_info>() as u32);
        let info = vfio_region_info { argsz, index, ..Default::default() };
        let what = "VFIO_DEVICE_GET_REGION_INFO";
        let info = self.ask(what, sys::DEVICE_GET_REGION_INFO, argsz, info)?;
        let vfio_region_info { flags, size, offset, .. } = info;
        Ok(RegionInfo { flags, size, offset })
    }

    /// Maps a region into the process, for a container to map: the process itself doesn't access it.
    /// The device stays open as long as this is there. Panics if the region isn't whole pages.
    pub fn map_region(&self, region: &RegionInfo) -> Result<Memory> {
        Memory::of_region(&self.file, region.offset, region.size as usize)
    }

    /// As [`Self::map_region`], in place of the pages that `memory` has from byte `at` on. Panics if these
    /// aren't whole pages inside.
    pub fn map_region_over(&self, region: &RegionInfo, memory: &Memory, at: usize) -> Result<()> {
        memory.replace_by_region(at..at + region.size as usize, &self.file, region.offset)
    }

    /// `VFIO_DEVICE_GET_IRQ_INFO`
    pub fn irq_info(&self, index: u32, argsz: Option<u32>) -> Result<IrqInfo> {
        let argsz = argsz.unwrap_or(size_of::<vfio_irq_info>() as u32);
        let info = vfio_irq_info { argsz, index, ..Default::default() };
        let info = self.ask("VFIO_DEVICE_GET_IRQ_INFO", sys::DEVICE_GET_IRQ_INFO, argsz, info)?;
        let vfio_irq_info { flags, count, .. } = info;
        Ok(IrqInfo { flags, count })
    }

    /// `VFIO_DEVICE_FEATURE` with `flags` (`VFIO_DEVICE_FEATURE_*`), and data that is all zero.
    pub fn feature(&self, flags: u32, argsz: Option<u32>) -> Result<()> {
        let argsz = argsz.unwrap_or(size_of::<vfio_device_feature>() as u32);
        let feature = vfio_device_feature { argsz, flags, ..Default::default() };
        self.ask("VFIO_DEVICE_FEATURE", sys::DEVICE_FEATURE, argsz, feature).map(drop)
    }

    /// `VFIO_DEVICE_FEATURE` with data. Returns what the kernel made of it.
    ///
    /// # Safety
    ///
    /// The data is of the type that belongs to the feature in `flags`, and what pointers in it point
    /// to is valid for what the kernel does with it.
    pub(crate) unsafe fn feature_with<T>(&self, flags: u32, data: T) -> Result<T> {
        #[repr(C)]
        struct Feature<T> {
            argsz: u32,
            flags: u32,
            data: T,
        }

        let argsz = size_of::<Feature<T>>() as u32;
        let mut feature = Feature { argsz, flags, data };
        // SAFETY: As the caller promises.
        unsafe { self.ioctl("VFIO_DEVICE_FEATURE", sys::DEVICE_FEATURE, &mut feature) }?;
        Ok(feature.data)
    }

    /// `VFIO_DEVICE_RESET`
    pub fn reset(&self) -> Result<()> {
        self.ask_null("VFIO_DEVICE_RESET", sys::DEVICE_RESET)
    }

    /// The ioctl that comes `nr` after `VFIO_BASE`, with a null argument.
    pub fn ioctl_null(&self, nr: u8) -> Result<()> {
        self.ask_null(&format!("ioctl VFIO_BASE + {nr}"), sys::vfio(nr.into()))
    }

    /// Reads from the device's file. One call reads once, and may read less.
    pub fn read_at(&self, offset: u64, to: &mut [u8]) -> Result<usize> {
        let len = to.len();
        sys::call(|| rustix::io::pread(&self.file, to, offset))
            .map_err(|e| self.error(&format!("pread of {len} bytes at {offset:#x}"), e))
    }

    /// Writes to the device's file. One call writes once, and may write less.
    pub fn write_at(&self, offset: u64, from: &[u8]) -> Result<usize> {
        let len = from.len();
        sys::call(|| rustix::io::pwrite(&self.file, from, offset))
            .map_err(|e| self.error(&format!("pwrite of {len} bytes at {offset:#x}"), e))
    }

    /// Reads parts that follow one another, by one call: the kernel has the driver read each by itself.
    /// Returns the bytes of them all that were read: those of parts up to one that can't be, unless that is the
    /// first.
    pub fn read_parts_at<'a>(
        &self,
        offset: u64,
        parts: impl Iterator<Item = &'a mut [u8]>,
    ) -> Result<usize> {
        let mut parts: Vec<_> = parts.map(IoSliceMut::new).collect();
        let count = parts.len();
        sys::call(|| rustix::io::preadv(&self.file, &mut parts, offset))
            .map_err(|e| self.error(&format!("preadv of {count} parts at {offset:#x}"), e))
    }

    /// As [`Self::read_parts_at`], for writing.
    pub fn write_parts_at<'a>(
        &self,
        offset: u64,
        parts: impl Iterator<Item = &'a [u8]>,
    ) -> Result<usize> {
        let parts: Vec<_> = parts.map(IoSlice::new).collect();
        let count = parts.len();
        sys::call(|| rustix::io::pwritev(&self.file, &parts, offset))
            .map_err(|e| self.error(&format!("pwritev of {count} parts at {offset:#x}"), e))
    }

    /// Makes an ioctl that fills in `argsz` bytes: `head`, which begins with `argsz`, and zeroes
    /// behind it. Where the structure has pointers, they are among the zeroes. Panics if there
    /// aren't as many.
    fn ask<T>(&self, what: &str, request: Opcode, argsz: u32, head: T) -> Result<T> {
        let mut arg = Padded { head, zeroes: [0; ROOM] };
        assert!(argsz as usize <= size_of_val(&arg), "argsz {argsz}");
        // SAFETY: The kernel fills in what `arg` has room for; all pointers in it are null.
        unsafe { sys::ioctl(&self.file, request, &mut arg) }.map_err(|e| self.error(what, e))?;
        Ok(arg.head)
    }

    /// Makes an ioctl.
    ///
    /// # Safety
    ///
    /// As for [`sys::ioctl`].
    pub(crate) unsafe fn ioctl<T>(&self, what: &str, request: Opcode, arg: &mut T) -> Result<()> {
        // SAFETY: As the caller promises.
        unsafe { sys::ioctl(&self.file, request, arg) }.map_err(|e| self.error(what, e))
    }

    fn ask_null(&self, what: &str, request: Opcode) -> Result<()> {
        // SAFETY: The argument is 0.
        unsafe { sys::ioctl_value(&self.file, request, 0) }
            .map_err(|e| self.error(what, e))
            .map(drop)
    }

    fn error(&self, what: &str, errno: rustix::io::Errno) -> Error {
        Error::new(format!("{what} of {}", self.name), errno)
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Words that may follow a structure: capabilities, the data of a feature.
const ROOM: usize = 512;

#[repr(C)]
struct Padded<T> {
    head: T,
    zeroes: [u64; ROOM],
}
