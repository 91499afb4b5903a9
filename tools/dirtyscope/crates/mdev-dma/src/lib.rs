// SPDX-License-Identifier: GPL-2.0-only

//! How to drive a `rust_mdev_dma` device: commands, what they write, and where such devices come
//! from.
//!
//! Follows `include/uapi/linux/rust_mdev_dma.h`, from which [`uapi`] is made. Addresses and lengths
//! are in bytes.

#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod device;
mod error;
mod generator;
pub mod pattern;
pub mod sysfs;

pub use device::{IN_PROGRESS, Limits, MdevDma, Op, Outcome, Width};
pub use error::{Error, Result};
pub use generator::{Program, Progress};

/// Bytes of a page: what devices and type1 count in.
pub const PAGE: u64 = uapi::RUST_MDEV_DMA_PATTERN_BLOCK as u64;

pub mod uapi {
    //! The constants of `include/uapi/linux/rust_mdev_dma.h`.
    #![allow(missing_docs, non_camel_case_types)]

    include!(concat!(env!("OUT_DIR"), "/uapi.rs"));
}
