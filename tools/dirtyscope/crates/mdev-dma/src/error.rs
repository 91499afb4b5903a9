// SPDX-License-Identifier: GPL-2.0-only

use std::io;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// VFIO refused.
    #[error(transparent)]
    Vfio(#[from] vfio_client::Error),
    /// This is no device that we know how to drive.
    #[error("{0}")]
    Unknown(String),
    /// A file of sysfs could not be used.
    #[error("{what}: {source}")]
    Sysfs {
        /// What was tried on which file.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// There is no driver that makes such devices.
    #[error("no mdev type {0}-* below /sys/class/mdev_bus; insmod {0}.ko")]
    NoDriver(String),
}

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// The errno, as in `errno.h`; 0 if no call failed.
    pub fn errno(&self) -> i32 {
        match self {
            Self::Vfio(error) => error.errno(),
            Self::Sysfs { source, .. } => source.raw_os_error().unwrap_or(0),
            Self::Unknown(_) | Self::NoDriver(_) => 0,
        }
    }
}
