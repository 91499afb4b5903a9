// SPDX-License-Identifier: GPL-2.0-only

//! The device itself: what it says of itself, its registers, its commands' errors, its end.

mod commands;
mod interface;
mod lifetime;

pub use commands::SCENARIOS as COMMANDS;
pub use interface::SCENARIOS as INTERFACE;
pub use lifetime::SCENARIOS as LIFETIME;
