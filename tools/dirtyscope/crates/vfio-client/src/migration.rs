// SPDX-License-Identifier: GPL-2.0-only

use crate::{Device, Error, Result, sys};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::OFlags,
};
use std::{
    fmt,
    fs::File,
    os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd},
};
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FEATURE_GET as GET, VFIO_DEVICE_FEATURE_MIG_DATA_SIZE,
    VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, VFIO_DEVICE_FEATURE_MIGRATION,
    VFIO_DEVICE_FEATURE_SET as SET, vfio_device_feature_mig_data_size,
    vfio_device_feature_mig_state, vfio_device_feature_migration, vfio_precopy_info,
};

/// `enum vfio_device_mig_state`
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
#[allow(missing_docs)]
pub enum MigState {
    Error = 0,
    Stop = 1,
    Running = 2,
    StopCopy = 3,
    Resuming = 4,
    RunningP2p = 5,
    PreCopy = 6,
    PreCopyP2p = 7,
}

impl MigState {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 8] = [
        Self::Error,
        Self::Stop,
        Self::Running,
        Self::StopCopy,
        Self::Resuming,
        Self::RunningP2p,
        Self::PreCopy,
        Self::PreCopyP2p,
    ];
}

impl fmt::Display for MigState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Error => "ERROR",
            Self::Stop => "STOP",
            Self::Running => "RUNNING",
            Self::StopCopy => "STOP_COPY",
            Self::Resuming => "RESUMING",
            Self::RunningP2p => "RUNNING_P2P",
            Self::PreCopy => "PRE_COPY",
            Self::PreCopyP2p => "PRE_COPY_P2P",
        })
    }
}

/// What `VFIO_MIG_GET_PRECOPY_INFO` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrecopyInfo {
    /// Bytes to read that there were from the start.
    pub initial_bytes: u64,
    /// Bytes to read that came since.
    pub dirty_bytes: u64,
}

/// The file that a device's state is read from, or written to.
#[derive(Debug)]
pub struct DataFile(File);

impl DataFile {
    /// Reads once, which may be less. Fails with `ENOMSG` if there is nothing yet.
    pub fn read(&self, to: &mut [u8]) -> Result<usize> {
        sys::call(|| rustix::io::read(&self.0, to))
            .map_err(|e| Error::new("read of migration data", e))
    }

    /// Reads to the end, which there is in STOP_COPY, so many bytes at once.
    pub fn read_to_end(&self, at_once: usize) -> Result<Vec<u8>> {
        let (mut all, mut part) = (Vec::new(), vec![0; at_once]);
        loop {
            match self.read(&mut part)? {
                0 => return Ok(all),
                n => all.extend_from_slice(&part[..n]),
            }
        }
    }

    /// Writes once, which may be less.
    pub fn write(&self, from: &[u8]) -> Result<usize> {
        sys::call(|| rustix::io::write(&self.0, from))
            .map_err(|e| Error::new("write of migration data", e))
    }

    /// Whether a read would not wait for more to come.
    pub fn is_readable(&self) -> Result<bool> {
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&now)).map_err(|e| Error::new("poll of migration data", e))?;
        Ok(fds[0].revents().contains(PollFlags::IN))
    }

    /// Whether it can be read, and whether it can be written.
    pub fn access(&self) -> Result<(bool, bool)> {
        let flags = rustix::fs::fcntl_getfl(&self.0).map_err(|e| Error::new("F_GETFL", e))?;
        let mode = flags & OFlags::RWMODE;
        Ok((mode != OFlags::WRONLY, mode != OFlags::RDONLY))
    }

    /// `VFIO_MIG_GET_PRECOPY_INFO`
    pub fn precopy_info(&self, argsz: Option<u32>) -> Result<PrecopyInfo> {
        let argsz = argsz.unwrap_or(size_of::<vfio_precopy_info>() as u32);
        let mut info = vfio_precopy_info { argsz, ..Default::default() };
        // SAFETY: The kernel fills in no more than the structure, which has no pointers.
        unsafe { sys::ioctl(&self.0, sys::MIG_GET_PRECOPY_INFO, &mut info) }
            .map_err(|e| Error::new("VFIO_MIG_GET_PRECOPY_INFO", e))?;
        let vfio_precopy_info { initial_bytes, dirty_bytes, .. } = info;
        Ok(PrecopyInfo { initial_bytes, dirty_bytes })
    }
}

impl Device {
    /// `VFIO_DEVICE_FEATURE_MIGRATION`: `VFIO_MIGRATION_*`
    pub fn migration_flags(&self) -> Result<u64> {
        let data = vfio_device_feature_migration::default();
        Ok(self.migration_feature(GET | VFIO_DEVICE_FEATURE_MIGRATION, data)?.flags)
    }

    /// `VFIO_DEVICE_FEATURE_MIG_DATA_SIZE`: bytes that STOP_COPY would read.
    pub fn migration_data_size(&self) -> Result<u64> {
        let data = vfio_device_feature_mig_data_size::default();
        let data = self.migration_feature(GET | VFIO_DEVICE_FEATURE_MIG_DATA_SIZE, data)?;
        Ok(data.stop_copy_length)
    }

    /// `VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE`: what state it is in.
    pub fn migration_state(&self) -> Result<MigState> {
        let data = vfio_device_feature_mig_state::default();
        let data = self.migration_feature(GET | VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, data)?;
        let state = MigState::ALL.get(data.device_state as usize).copied();
        state.ok_or_else(|| Error::other(format!("migration state {}", data.device_state)))
    }

    /// `VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE`: brings it to a state. A state that begins to transfer
    /// data comes with a file.
    pub fn set_migration_state(&self, state: MigState) -> Result<Option<DataFile>> {
        self.set_migration_state_number(state as u32)
    }

    /// As [`Self::set_migration_state`], with a number that may be no state.
    pub fn set_migration_state_number(&self, state: u32) -> Result<Option<DataFile>> {
        let data = vfio_device_feature_mig_state { device_state: state, data_fd: -1 };
        let data = self.migration_feature(SET | VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, data)?;
        Ok((data.data_fd >= 0).then(|| {
            // SAFETY: The kernel just opened this file descriptor for us, nobody else knows of it.
            DataFile(unsafe { OwnedFd::from_raw_fd(data.data_fd) }.into())
        }))
    }

    fn migration_feature<T>(&self, flags: u32, data: T) -> Result<T> {
        // SAFETY: The callers pass the data that belongs to the feature; it has no pointers.
        unsafe { self.feature_with(flags, data) }
    }
}

impl AsFd for DataFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
