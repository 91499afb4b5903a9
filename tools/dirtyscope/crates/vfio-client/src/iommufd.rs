// SPDX-License-Identifier: GPL-2.0-only

//! iommufd: an I/O address space, and devices that are opened without group and container.

use crate::{DeviceNode, Error, Memory, Result, group::open, sys};
use iommufd_bindings::{
    IOMMUFD_CMD_IOAS_ALLOC, IOMMUFD_CMD_IOAS_MAP, IOMMUFD_CMD_IOAS_UNMAP, iommu_ioas_alloc,
    iommu_ioas_map, iommu_ioas_unmap,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA as FIXED_IOVA,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE as READABLE,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE as WRITEABLE,
};
use rustix::io::Errno;
use std::{
    fs::{File, read_dir},
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};
use vfio_bindings::bindings::vfio::{vfio_device_attach_iommufd_pt, vfio_device_bind_iommufd};

impl DeviceNode {
    /// The file of the device with the directory `sysfs`, for iommufd. Fails with `ENOENT` if the kernel
    /// has none for devices.
    pub fn cdev(sysfs: &Path) -> Result<PathBuf> {
        let node = read_dir(sysfs.join("vfio-dev")).ok().and_then(|mut nodes| nodes.next()?.ok());
        let what = || format!("vfio-dev of {}", sysfs.display());
        let node = node.ok_or_else(|| Error::new(what(), Errno::NOENT))?.file_name();
        Ok(Path::new("/dev/vfio/devices").join(node))
    }
}

const IOMMU: &str = "/dev/iommu";

/// An I/O address space, which devices see the memory in that is mapped there.
#[derive(Debug)]
pub struct Ioas {
    file: File,
    id: u32,
    /// What is, or was, mapped: it outlives the address space.
    memory: Mutex<Vec<Arc<Memory>>>,
}

impl Ioas {
    /// One without any memory. Fails with `ENOENT` if the kernel has no iommufd.
    pub fn new() -> Result<Arc<Self>> {
        let file = open(IOMMU)
            .map_err(|e| Error::new(format!("open {IOMMU}"), e).hint("CONFIG_IOMMUFD is off"))?;
        let size = size_of::<iommu_ioas_alloc>() as u32;
        let mut alloc = iommu_ioas_alloc { size, ..Default::default() };
        // SAFETY: The kernel fills in no more than the structure, which has no pointers.
        unsafe { sys::ioctl(&file, sys::iommufd(IOMMUFD_CMD_IOAS_ALLOC), &mut alloc) }
            .map_err(|e| Error::new("IOMMU_IOAS_ALLOC", e))?;
        Ok(Arc::new(Self { file, id: alloc.out_ioas_id, memory: Mutex::default() }))
    }

    /// Maps all of `memory` at `iova`, to read and write.
    pub fn map(&self, memory: &Arc<Memory>, iova: u64) -> Result<()> {
        let mut map = iommu_ioas_map {
            size: size_of::<iommu_ioas_map>() as u32,
            flags: FIXED_IOVA | READABLE | WRITEABLE,
            ioas_id: self.id,
            user_va: memory.address(0),
            length: memory.len() as u64,
            iova,
            ..Default::default()
        };
        self.memory.lock().unwrap_or_else(PoisonError::into_inner).push(memory.clone());
        // SAFETY: The memory is ours, and `self` has a share of it for as long as the kernel has it
        // mapped, and longer.
        unsafe { sys::ioctl(&self.file, sys::iommufd(IOMMUFD_CMD_IOAS_MAP), &mut map) }
            .map_err(|e| Error::new(format!("IOMMU_IOAS_MAP at {iova:#x}"), e))
    }

    /// Unmaps what is mapped in a range. Returns how many bytes that were.
    pub fn unmap(&self, iova: u64, length: u64) -> Result<u64> {
        let size = size_of::<iommu_ioas_unmap>() as u32;
        let mut unmap = iommu_ioas_unmap { size, ioas_id: self.id, iova, length };
        // SAFETY: The structure has no pointers.
        unsafe { sys::ioctl(&self.file, sys::iommufd(IOMMUFD_CMD_IOAS_UNMAP), &mut unmap) }
            .map_err(|e| Error::new(format!("IOMMU_IOAS_UNMAP at {iova:#x}"), e))?;
        Ok(unmap.length)
    }

    /// Opens a device, binds and attaches it: see [`crate::Device::open_in`].
    pub(crate) fn open_device(&self, sysfs: &Path) -> Result<File> {
        let what = |step: &str| format!("{step} of {}", sysfs.display());
        let path = DeviceNode::cdev(sysfs)?.to_string_lossy().into_owned();
        let file = open(&path).map_err(|e| Error::new(format!("open {path}"), e))?;

        let mut bind = vfio_device_bind_iommufd {
            argsz: size_of::<vfio_device_bind_iommufd>() as u32,
            iommufd: self.file.as_raw_fd(),
            ..Default::default()
        };
        // SAFETY: The kernel fills in no more than the structure, whose pointer isn't used.
        unsafe { sys::ioctl(&file, sys::DEVICE_BIND_IOMMUFD, &mut bind) }
            .map_err(|e| Error::new(what("VFIO_DEVICE_BIND_IOMMUFD"), e))?;
        let mut attach = vfio_device_attach_iommufd_pt {
            argsz: size_of::<vfio_device_attach_iommufd_pt>() as u32,
            pt_id: self.id,
            ..Default::default()
        };
        // SAFETY: The kernel fills in no more than the structure, which has no pointers.
        unsafe { sys::ioctl(&file, sys::DEVICE_ATTACH_IOMMUFD_PT, &mut attach) }
            .map_err(|e| Error::new(what("VFIO_DEVICE_ATTACH_IOMMUFD_PT"), e))?;
        Ok(file)
    }
}
