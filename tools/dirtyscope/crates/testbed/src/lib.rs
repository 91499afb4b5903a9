// SPDX-License-Identifier: GPL-2.0-only

//! Drives the kernel and the model side by side.
//!
//! An [`Op`] is data, [`Testbed::apply`] does it on both sides and compares the answers. What a
//! scenario, or a generator of sequences, says beyond that are questions: [`Testbed::check`].

#![forbid(unsafe_code)]

mod contract;
pub mod direct;
mod expected;
mod failing;
pub mod fixture;
mod live;
pub mod logging;
mod op;
pub mod program;
mod regions;
mod rehearsal;
mod rights;
mod shadow;
pub mod slots;
mod steps;
mod testbed;
mod text;

pub use contract::{Contract, Owed, RAW_PAGES, limits_of};
pub use failing::{Injected, errno_of};
pub use live::status;
pub use mdev_dma::PAGE;
pub use op::{Answer, Buffer, BufferMemory, Op, operation};
pub use rehearsal::rehearse;
pub use rights::Rights;
pub use steps::{at, command, map, pages};
pub use testbed::{Besides, Testbed, same, to_iova};
