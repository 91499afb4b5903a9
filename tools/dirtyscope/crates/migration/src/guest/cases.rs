// SPDX-License-Identifier: GPL-2.0-only

//! The cases of migration with a guest.

use super::pair::GuestPair;
use crate::runner::{Case, case};
use anyhow::{Context as _, Result};
use qemu_client::MigrationCapability;

/// A case with machines that have a guest.
pub type GuestCase = Case<fn(&mut GuestPair<'_>) -> Result<()>>;

/// These cases.
pub const CASES: &[GuestCase] = &[
    case("guest/back-and-forth", "to another machine, and back", back_and_forth),
    case("guest/cancelled", "a migration is cancelled, the next one is good", cancelled),
    case("guest/multifd", "memory is sent by several threads", multifd),
    case("guest/postcopy", "postcopy is refused, and the machine goes on", postcopy),
    case("guest/device-reset", "the guest resets the device in pre-copy", device_reset),
    case("guest/reboot", "the guest reboots in pre-copy, and migrates while it boots", reboot),
    case("guest/replugged", "unplugged before, and plugged in afterwards", replugged),
];

fn back_and_forth(pair: &mut GuestPair<'_>) -> Result<()> {
    pair.start()?;
    pair.migrate()?;
    pair.migrate()?;
    pair.stop()
}

fn cancelled(pair: &mut GuestPair<'_>) -> Result<()> {
    pair.start()?;
    pair.begin(&[])?;
    pair.passes()?;
    pair.cancel()?;
    pair.migrate()
}

fn multifd(pair: &mut GuestPair<'_>) -> Result<()> {
    pair.start()?;
    pair.begin(&[MigrationCapability::multifd])?;
    pair.passes()?;
    pair.complete()
}

fn postcopy(pair: &mut GuestPair<'_>) -> Result<()> {
    pair.start()?;
    // QEMU may say so at any of these.
    let begun = pair.begin(&[MigrationCapability::postcopy_ram]).and_then(|()| {
        pair.passes()?;
        Ok(pair.here().monitor().start_postcopy()?)
    });
    let refusal = begun.err().context("a device that can't wait for its pages was let do so")?;
    pair.note(&format!("QEMU refuses: {refusal:#}"))?;
    pair.goes_on()
}

fn device_reset(pair: &mut GuestPair<'_>) -> Result<()> {
    pair.start()?;
    pair.begin(&[])?;
    pair.passes()?;
    pair.reset_device()?;
    pair.complete_or_again()
}

fn reboot(pair: &mut GuestPair<'_>) -> Result<()> {
    pair.write_slowly();
    pair.start()?;
    pair.begin(&[])?;
    pair.passes()?;
    pair.reboot()?;
    pair.complete_or_again()?;
    pair.booted()?;
    pair.begin_anew()
}

fn replugged(pair: &mut GuestPair<'_>) -> Result<()> {
    pair.start()?;
    pair.stop()?;
    pair.unplug()?;
    pair.migrate()?;
    pair.plug()?;
    pair.begin_to_write()
}
