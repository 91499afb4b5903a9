// SPDX-License-Identifier: GPL-2.0-only

//! Typed, owned access to VFIO: container, group, device, and the memory that devices get at.
//!
//! What the kernel wants to happen in order follows from what owns what, so that another order
//! can't be written:
//!
//! ```text
//! Group       an open group, not in a container yet
//!   v  moved into
//! Container   with a first group, so its IOMMU driver is set and it can map; owns its groups,
//!   ^         and shares the Memory of what it has mapped
//!   |  shared by
//! Device      an open device of one of these groups
//! ```
//!
//! Everything that can be called is safe: an ioctl whose arguments are malformed on purpose can be
//! made, but only with pointers to memory that the kernel may use for as long as it may use it.
//!
//! The kernel's side is documented in `include/uapi/linux/vfio.h`. Addresses and sizes are in bytes.

#![deny(missing_docs)]

pub mod calls;
mod container;
pub mod coverage;
mod device;
mod error;
pub mod fail_nth;
mod fork;
mod group;
pub mod hostile;
mod iommufd;
mod irq;
mod logging;
mod memory;
mod migration;
mod mmio;
mod pci;
mod signals;
mod sys;
mod unserved;

pub use container::{
    BitmapArgs, Container, DirtyTracking, IommuInfo, Leave, MapArgs, Mapper, MigrationInfo,
    UnmapArgs,
};
pub use device::{Device, DeviceInfo, IrqInfo, RegionInfo};
pub use error::{Error, Result};
pub use fork::Fork;
pub use group::{DeviceNode, Group};
pub use iommufd::Ioas;
pub use irq::{EventFd, IrqData, SetIrqs};
pub use memory::{Access, Memory};
pub use migration::{DataFile, MigState, PrecopyInfo};
pub use mmio::Mmio;
pub use pci::PciFunction;
pub use signals::Signals;
pub use unserved::{Served, Unserved};
/// Constants and structures of `include/uapi/linux/vfio.h`.
pub use vfio_bindings::bindings::vfio as uapi;
