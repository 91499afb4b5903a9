// SPDX-License-Identifier: GPL-2.0

//! Safe abstractions that the `kernel` crate lacks, each as if it were a patch to that crate. They
//! know no driver.
//!
//! Kernel modules written in Rust can't export anything to each other: each driver compiles its own
//! copy of these files, by `#[path]`.

// As in a library, not every user uses all.
#![allow(dead_code, unused_imports)]

pub(crate) mod anon_inode;
pub(crate) mod class;
pub(crate) mod eventfd;
pub(crate) mod kcov;
pub(crate) mod mdev;
pub(crate) mod page;
#[cfg(CONFIG_PCI)]
pub(crate) mod pci;
pub(crate) mod task;
pub(crate) mod vfio;
pub(crate) mod workqueue;
