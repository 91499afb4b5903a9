// SPDX-License-Identifier: GPL-2.0-only

use crate::{Error, Result, fail_nth::counted, sys};
use rustix::io::Errno;
use std::{
    ffi::CString,
    fs::File,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    path::Path,
};
use vfio_bindings::bindings::vfio::{VFIO_GROUP_FLAGS_VIABLE, vfio_group_status};

/// How VFIO names a device: by its name, and the number of its IOMMU group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceNode {
    pub(crate) name: String,
    pub(crate) group: u32,
}

impl DeviceNode {
    /// The device with the directory `sysfs`, e.g. `/sys/bus/mdev/devices/UUID` or
    /// `/sys/bus/pci/devices/ADDRESS`.
    pub fn from_sysfs(sysfs: &Path) -> Result<Self> {
        let no_device = || {
            Error::new(format!("device {}", sysfs.display()), Errno::NODEV)
                .hint("ls /sys/bus/*/devices shows those that exist; a PCI device needs an IOMMU")
        };
        let name = sysfs.file_name().and_then(|name| name.to_str()).ok_or_else(no_device)?;
        let link = sysfs.join("iommu_group");
        let target = std::fs::read_link(link).map_err(|_| no_device())?;
        let group = target.file_name().and_then(|name| name.to_str()?.parse().ok());
        Ok(Self { name: name.to_owned(), group: group.ok_or_else(no_device)? })
    }

    /// The number of its group.
    pub fn group(&self) -> u32 {
        self.group
    }
}

/// An open, viable group that is in no container.
///
/// A group can be open once: `EBUSY` says that somebody else has it.
#[derive(Debug)]
pub struct Group {
    file: File,
    number: u32,
}

impl Group {
    /// Opens the group of a device: `/dev/vfio/GROUP`.
    pub fn open(node: &DeviceNode) -> Result<Self> {
        let number = node.group;
        let path = format!("/dev/vfio/{number}");
        let file = open(&path).map_err(|errno| {
            let hint = match errno {
                Errno::BUSY => "another process, or this one, has the group open; close it there",
                Errno::NOENT => "the driver is not loaded, or udev did not make the node",
                Errno::ACCESS | Errno::PERM => "run as root, or give yourself access to the node",
                _ => "",
            };
            Error::new(format!("open {path}"), errno).hint(hint)
        })?;
        let group = Self { file, number };
        group.check_viable()?;
        Ok(group)
    }

    /// Its number.
    pub fn number(&self) -> u32 {
        self.number
    }

    fn check_viable(&self) -> Result<()> {
        let mut status =
            vfio_group_status { argsz: size_of::<vfio_group_status>() as u32, flags: 0 };
        let what = || format!("VFIO_GROUP_GET_STATUS of group {}", self.number);
        // SAFETY: The kernel fills in no more than the structure, which has no pointers.
        unsafe { sys::ioctl(&self.file, sys::GROUP_GET_STATUS, &mut status) }
            .map_err(|e| Error::new(what(), e))?;
        if status.flags & VFIO_GROUP_FLAGS_VIABLE == 0 {
            return Err(Error::other(format!("{}: not viable", what()))
                .hint("bind all devices of the group to VFIO drivers"));
        }
        Ok(())
    }

    /// `VFIO_GROUP_SET_CONTAINER`
    pub(crate) fn set_container(&self, container: BorrowedFd<'_>) -> Result<()> {
        let mut fd = container.as_raw_fd();
        // SAFETY: The kernel reads the number of a file descriptor, no more.
        unsafe { sys::ioctl(&self.file, sys::GROUP_SET_CONTAINER, &mut fd) }.map_err(|e| {
            Error::new(format!("VFIO_GROUP_SET_CONTAINER of group {}", self.number), e)
        })
    }

    /// `VFIO_GROUP_UNSET_CONTAINER`
    pub(crate) fn unset_container(&self) -> Result<()> {
        // SAFETY: There is no argument.
        unsafe { sys::ioctl_value(&self.file, sys::GROUP_UNSET_CONTAINER, 0) }
            .map_err(|e| {
                Error::new(format!("VFIO_GROUP_UNSET_CONTAINER of group {}", self.number), e)
            })
            .map(drop)
    }

    /// `VFIO_GROUP_GET_DEVICE_FD`
    pub(crate) fn device(&self, name: &str) -> Result<File> {
        let what = || format!("VFIO_GROUP_GET_DEVICE_FD of {name} in group {}", self.number);
        let name = CString::new(name).map_err(|_| Error::new(what(), Errno::INVAL))?;
        sys::open_device(self.file.as_fd(), &name).map_err(|e| Error::new(what(), e))
    }
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Opens a file for reading and writing.
pub(crate) fn open(path: &str) -> std::result::Result<File, Errno> {
    counted(|| File::options().read(true).write(true).open(path))
        .map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))
}
