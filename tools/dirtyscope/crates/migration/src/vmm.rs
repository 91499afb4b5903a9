// SPDX-License-Identifier: GPL-2.0-only

//! What a VMM is to do for its migrations to be tested: [`Vmm`] starts machines, [`Machine`] is one.
//!
//! To add yours, implement both in a file of its own, and add a line to `all_cases` in `lib.rs`: the
//! cases of `cases` are run with it then. `qemu.rs` and `mini.rs` are such files. Nothing is asked of
//! a VMM that these cases don't need. They act as the guest: there need not be one, nor a CPU, as
//! long as registers of the device can be accessed; a VMM whose machines have to have a guest runs
//! one that does that for the test.

use crate::contents::Piece;
use anyhow::Result;
use harness::Context;
use mdev_dma::{MdevDma, PAGE, RegisterAccess, Width, sysfs::Mdev};
use std::path::Path;

/// Bytes of a usual machine's memory.
pub const RAM: u64 = 32 << 20;

/// Where memory goes on that isn't below 4 GiB.
pub const ABOVE_4G: u64 = 4 << 30;

/// Whether a machine runs, or waits for one to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Source,
    Destination,
}

/// What a machine has.
#[derive(Clone, Copy)]
pub struct Layout {
    /// So many devices of ours.
    pub devices: usize,
    /// Bytes of its memory, [`RAM`] of which are filled and compared.
    pub memory: u64,
    /// So many of them are below 4 GiB at most, from address 0 on; the others are from [`ABOVE_4G`] on.
    pub below_4g: u64,
    /// So many pages at the end of memory below 4 GiB are not filled and compared: they are the tables of
    /// an IOMMU in front of the devices, which there is unless this is 0.
    pub iommu_tables: u64,
}

impl Layout {
    /// A usual machine with so many devices.
    pub const fn of_devices(devices: usize) -> Self {
        Self { devices, memory: RAM, below_4g: ABOVE_4G, iommu_tables: 0 }
    }

    /// One whose memory is half above 4 GiB.
    pub const fn split(devices: usize) -> Self {
        Self { below_4g: RAM / 2, ..Self::of_devices(devices) }
    }

    /// The parts of its memory that are filled and compared.
    pub fn pieces(&self) -> Vec<Piece> {
        let low = Piece { addresses: 0..self.tables(), offset: 0 };
        let offset = self.below_4g.min(RAM);
        let high = Piece { addresses: ABOVE_4G..ABOVE_4G + RAM - offset, offset };
        [low, high].into_iter().filter(|piece| !piece.addresses.is_empty()).collect()
    }

    /// Where the tables of an IOMMU are.
    pub fn tables(&self) -> u64 {
        self.below_4g.min(RAM) - self.iommu_tables * PAGE
    }
}

/// A machine that is to be started.
pub struct MachineConfig<'a> {
    /// What failures call it, which no other machine in `directory` is called.
    pub name: &'a str,
    pub role: Role,
    pub layout: Layout,
    /// Its devices, as many as `layout` says.
    pub mdevs: &'a [Mdev],
    /// The file that is its memory, zeroed, and of `layout.memory` bytes: what is at address 0 comes first,
    /// what is at [`ABOVE_4G`] follows what is below. It is to be mapped shared (`MAP_SHARED`), since this
    /// program fills it, and reads it to compare. It is removed once the machine has started.
    pub memory: &'a Path,
    /// Where the VMM can put files, which go when the case ends.
    pub directory: &'a Path,
}

/// A VMM whose machines are migrated.
pub trait Vmm {
    /// One of its machines.
    type Machine: Machine;

    /// The first part of its cases' names.
    const FAMILY: &'static str;

    /// A device for its machines that nobody has open; the same one for the same number.
    fn device(&self, context: &Context<'_>, number: usize) -> Result<Mdev> {
        context.device(number)
    }

    /// Starts a machine. That of [`Role::Source`] runs: BAR 0 of each device can be accessed, and it may do
    /// DMA to all memory, with addresses of the guest for IOVAs. That of [`Role::Destination`] waits for
    /// [`Machine::receive`].
    ///
    /// The error is `harness::Skip` if the VMM isn't there.
    fn start(&self, config: &MachineConfig<'_>) -> Result<Self::Machine>;
}

/// A machine of a VMM. It ends when it is dropped, and its devices can be used by others then.
///
/// None of these may wait for a migration, but for [`Machine::kill`] and being dropped.
pub trait Machine: Sized {
    /// Reads `width` bytes at byte `register` of BAR 0 of a device, as a CPU of the machine does. That
    /// works in a machine that is stopped, too.
    fn read(&self, device: usize, register: u32, width: Width) -> Result<u64>;

    /// Writes BAR 0 of a device: see [`Machine::read`].
    fn write(&self, device: usize, register: u32, width: Width, value: u64) -> Result<()>;

    /// Makes a Unix socket at this path, and lets a machine come by it, in whose place this one is then. It
    /// doesn't run before [`Machine::run`]. What becomes of that, [`Machine::migration`] says.
    fn receive(&mut self, socket: &Path) -> Result<()>;

    /// Begins to migrate to where [`Machine::receive`] was called with this path. Memory isn't shared with
    /// it: all of it is to be sent. Pre-copy goes on, pass after pass, until [`Machine::end_pre_copy`].
    ///
    /// With `pause` the migration waits, once machine and devices are stopped, for [`Machine::go_on`].
    /// The error is `harness::Skip` if the VMM can't.
    fn migrate(&mut self, socket: &Path, pause: bool) -> Result<()>;

    /// Lets the migration complete, whatever the downtime.
    fn end_pre_copy(&self) -> Result<()>;

    /// Lets the migration go on that waits.
    fn go_on(&self) -> Result<()>;

    /// Cancels the migration, if its stage is [`Stage::PreCopy`]. The machine goes on here.
    fn cancel(&self) -> Result<()>;

    /// How the migration stands that began last, from here or to here.
    fn migration(&self) -> Result<Migration>;

    /// Lets a machine run that has come.
    fn run(&self) -> Result<()>;

    /// Whether it runs.
    fn is_running(&self) -> Result<bool>;

    /// Ends it at once, as if its host had died.
    fn kill(&mut self);

    /// What the VMM has said, for who is told that a case has failed.
    fn log(&mut self) -> String;

    /// One of its devices.
    fn device(&self, number: usize) -> MdevDma<Registers<'_, Self>> {
        MdevDma::new(Registers { machine: self, device: number })
    }
}

/// The registers of a device in a machine.
pub struct Registers<'a, M> {
    machine: &'a M,
    device: usize,
}

impl<M: Machine> RegisterAccess for Registers<'_, M> {
    type Error = anyhow::Error;

    fn read(&self, register: u32, width: Width) -> Result<u64> {
        self.machine.read(self.device, register, width)
    }

    fn write(&self, register: u32, width: Width, value: u64) -> Result<()> {
        self.machine.write(self.device, register, width, value)
    }
}

/// How far a migration is. They come in this order, but for those that end one that doesn't complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// There was none.
    None,
    /// The machine runs, and its memory is sent.
    PreCopy,
    /// Machine and devices are stopped, and it waits for [`Machine::go_on`].
    Paused,
    /// Machine and devices are stopped, and what is left is sent.
    StopCopy,
    /// The machine is at the destination.
    Completed,
    /// It doesn't complete, and that isn't over yet.
    Ending,
    /// It was cancelled; the machine goes on at the source.
    Cancelled,
    /// It has failed; the machine goes on at the source.
    Failed,
    /// Something that none of our migrations should be.
    Other,
}

/// How a migration stands. Of one that is received, only `stage` and `error` need be right.
#[derive(Clone, Debug)]
pub struct Migration {
    /// How far it is.
    pub stage: Stage,
    /// How often the VMM has begun to send what is dirty: 1 in the first pass, in which all memory is.
    pub passes: u64,
    /// Bytes of memory and devices that were sent.
    pub sent: u64,
    /// Bytes of memory that are still to be sent, as far as the VMM knows.
    pub remaining: u64,
    /// Milliseconds from stop to completion.
    pub downtime: Option<u64>,
    /// Bytes of the devices' state that were sent.
    pub device_state: Option<u64>,
    /// Why it failed.
    pub error: Option<String>,
}
