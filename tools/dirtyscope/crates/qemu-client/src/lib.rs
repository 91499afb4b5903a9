// SPDX-License-Identifier: GPL-2.0-only

//! A QEMU, with a guest or without: `-accel qtest` has no CPU, its client accesses memory and devices
//! instead.
//!
//! [`Qemu`] is the process, [`Qtest`] accesses a machine without a guest as its CPU, [`Monitor`] has
//! QEMU's own commands. Addresses and lengths are in bytes. Every wait has a limit.

#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod error;
mod monitor;
mod process;
mod qtest;

pub use error::{Error, Result};
pub use monitor::{Migration, MigrationStatus, Monitor};
pub use process::Qemu;
pub use qapi::qmp::{MigrationCapability, RunState};
pub use qtest::{Bar, Qtest};
