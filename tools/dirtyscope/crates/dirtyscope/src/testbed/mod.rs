// SPDX-License-Identifier: GPL-2.0-only

//! Drives the kernel and the model side by side.
//!
//! An [`Op`] is data, [`Testbed::apply`] does it on both sides and compares the answers. What a
//! scenario, or a generator of sequences, says beyond that are questions: [`Testbed::check`].

mod bed;
mod contract;
mod expected;
mod failure;
mod kernel;
mod op;
pub mod program;
mod regions;
mod steps;
mod text;

pub use bed::{PAGE, Testbed, locked_memory, same};
pub use contract::Contract;
pub use failure::Failure;
pub use kernel::status;
pub use op::{Answer, Buffer, BufferMemory, Op, operation};
pub use steps::{at, command, map, pages};
