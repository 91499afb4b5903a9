// SPDX-License-Identifier: GPL-2.0-only

//! What VFIO type1 owes its user about dirty pages, as a program.
//!
//! [`Container`] is a type1 v2 container with devices that do their DMA by the CPU: every ioctl and
//! every command of the device is a method, which returns what the kernel must return. It follows
//! the contract in `include/uapi/linux/vfio.h` (and that of the device, in
//! `include/uapi/linux/rust_mdev_dma.h`), not what a kernel happens to do: where the two differ, the
//! kernel has a defect. Where it leaves open which of several errnos is the answer, the model answers
//! with [`Errnos`]: one of these.
//!
//! A page is dirty from the moment a device may have written it to the read of the bitmap that says
//! so; while it is pinned it may be written at any time, so it is dirty in every read. A page that
//! was written and isn't reported is *lost*, one that is reported and was neither written nor pinned
//! is *spurious*.
//!
//! [`DeviceLog`] is the other account there is: that of a device which logs its own writes.
//!
//! The model does no I/O, and has no memory: what a device writes is the harness's business.
//! Addresses and sizes are in bytes, bitmaps have one bit a page.

#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod bitmap;
mod buffer;
mod container;
mod device;
mod device_log;
mod errno;
mod mapping;

pub use bitmap::{Bitmap, BitmapDifference};
pub use buffer::{BITMAP_PAGES_MAX, BitmapBuffer};
pub use container::{Container, DeviceId, GroupKind, MappingView, PinFailure};
pub use device::{Command, CommandKind, CommandOutcome, Limits, RawPin};
pub use device_log::{DeviceLog, LOG_RANGES_MAX, LogReport};
pub use errno::{Errno, Errnos};
pub use mapping::{Mapping, Protection};
