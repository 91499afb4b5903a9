// SPDX-License-Identifier: GPL-2.0-only

//! How to drive a `rust_mdev_dma` device: commands and the generator, over any access to its
//! registers; what they write; and where such devices come from.
//!
//! Follows `include/uapi/linux/rust_mdev_dma.h`, from which [`uapi`] is made. Addresses and lengths
//! are in bytes.

#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod contents;
mod device;
mod error;
mod generator;
pub mod pattern;
mod registers;
pub mod sysfs;

pub use contents::Contents;
pub use device::{DeviceLimits, IN_PROGRESS, MdevDma, Opcode, Outcome};
pub use error::{Error, Result};
pub use generator::{GeneratorConfig, GeneratorStatus};
pub use registers::{DeviceFile, RegisterAccess, Width};

/// Bytes of a page: what devices and type1 count in.
pub const PAGE: u64 = uapi::RUST_MDEV_DMA_PATTERN_BLOCK as u64;

pub mod uapi {
    //! The constants of `include/uapi/linux/rust_mdev_dma.h`.
    #![allow(missing_docs, non_camel_case_types)]

    include!(concat!(env!("OUT_DIR"), "/uapi.rs"));
}
