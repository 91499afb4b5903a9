// SPDX-License-Identifier: GPL-2.0-only

//! QEMU's `edu`, a PCI function that does DMA through an IOMMU: where it is found, how it is bound to a
//! VFIO driver, and how it is driven from userspace.
//!
//! Follows `docs/specs/edu.rst` of QEMU. Addresses and sizes are in bytes.

#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod engine;
mod function;

pub use engine::{Edu, LENGTH_MAX};
pub use function::Function;
