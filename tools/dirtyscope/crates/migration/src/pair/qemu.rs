// SPDX-License-Identifier: GPL-2.0-only

//! What only QEMU can do with a machine, or is asked for.

use super::{DeviceRecord, MachinePair, Started};
use crate::{
    qemu::{FIRST_SLOT, QemuVmm},
    vmm::{Machine as _, Migration, RAM, Role, Stage},
};
use anyhow::{Result, ensure};
use events::Event;
use mdev_dma::{Opcode, PAGE};
use qemu_client::MigrationCapability;
use std::ops::Range;

/// Bytes per second of a pass that is to last: a MiB takes as long as a case might need.
const SLOW: u64 = 128 << 10;

impl MachinePair<'_, QemuVmm> {
    /// As [`MachinePair::begin`], with these capabilities.
    pub fn begin_with(&mut self, capabilities: &[MigrationCapability]) -> Result<()> {
        self.start_destination()?;
        for started in self.here.iter().chain(&self.there) {
            started.machine.monitor().set_capabilities(capabilities, true)?;
        }
        self.send(false)
    }

    /// Migrates the machine to one that has the same memory, of which QEMU then sends nothing.
    pub fn migrate_sharing(&mut self) -> Result<()> {
        let name = format!("machine-{}", self.machines);
        let here = self.here.as_ref().expect("a machine was started");
        let memory = here.memory.shared(&name, Role::Destination)?;
        let machine = self.machine_with(&name, Role::Destination, 1 - self.side, &memory.path())?;
        self.there = Some(Started { machine, memory });
        for started in self.here.iter().chain(&self.there) {
            let ignore = [MigrationCapability::x_ignore_shared];
            started.machine.monitor().set_capabilities(&ignore, true)?;
        }
        self.send(false)?;
        self.passes(1)?;
        self.complete()?;
        ensure!(self.sent < RAM / 2, "{} bytes were sent, and memory is shared", self.sent);
        Ok(())
    }

    /// Begins a migration with these capabilities, which QEMU must refuse and say this. The machine
    /// goes on, without them.
    pub fn refused(&mut self, capabilities: &[MigrationCapability], saying: &str) -> Result<()> {
        let why = match self.begin_with(capabilities) {
            Err(error) => format!("{error:#}"),
            Ok(()) => {
                let stages = [Stage::None, Stage::PreCopy, Stage::Ending];
                let failed = self.migrating(&stages, |now| now.stage == Stage::Failed)?;
                failed.error.unwrap_or_default()
            }
        };
        self.watch.say(Event::Progress { text: why.clone() })?;
        ensure!(why.contains(saying), "the migration was refused, but QEMU says {why:?}");
        self.here().monitor().set_capabilities(capabilities, false)?;
        self.there = None;
        self.runs_on()
    }

    /// Resets the machine, and sets up its devices as after a boot: they have no pins then, and their
    /// generators have stopped. None may run.
    pub fn reset(&mut self) -> Result<()> {
        self.context.note("system_reset");
        self.here().monitor().system_reset()?;
        self.known.fill(DeviceRecord::default());
        self.here().set_up()?;
        for device in self.devices() {
            let pins = device.pins()?;
            ensure!(pins == 0, "after a reset there are {pins} pins");
        }
        Ok(())
    }

    /// Has QEMU measure for a second how much is written, which can't be nothing while a generator runs.
    pub fn measure_dirty_rate(&self) -> Result<()> {
        self.context.note("measure the dirty rate");
        self.here().monitor().calc_dirty_rate(1)?;
        let mut wait = self.watch.wait("for the dirty rate");
        let rate = loop {
            match self.here().monitor().dirty_rate()? {
                Some(rate) => break rate,
                None => wait.poll(|| "not measured yet".into())?,
            }
        };
        self.watch.say(Event::Progress { text: format!("QEMU measured {rate} MiB/s") })?;
        ensure!(rate > 0, "QEMU has measured that nothing is written, and a generator runs");
        Ok(())
    }

    /// Turns on the machine's IOMMU, for the first device, by tables that can map these pages.
    pub fn enable_iommu(&mut self, pages: &Range<u64>) -> Result<()> {
        self.enable_iommu_at(pages, 0)
    }

    /// As [`MachinePair::enable_iommu`], but devices find memory so many bytes further than it is: what
    /// says which pages they pin or write, is of memory all the same.
    pub fn enable_iommu_at(&mut self, pages: &Range<u64>, offset: u64) -> Result<()> {
        self.context.note("turn on the IOMMU");
        self.offset = offset;
        self.here().iommu().enable(FIRST_SLOT, offset + pages.start * PAGE)
    }

    /// Takes all memory away from the first device, at once.
    pub fn detach_from_iommu(&self) -> Result<()> {
        self.context.note("the device has no context any more");
        self.here().iommu().detach(FIRST_SLOT)
    }

    /// Lets the migration complete, or fail: then the machine goes on, and the next one must complete.
    pub fn complete_or_again(&mut self) -> Result<()> {
        use Stage::{Completed, Ending, Failed, PreCopy, StopCopy};
        self.context.note("let it complete, or fail");
        let before = self.counters()?.iter().sum();
        self.here().end_pre_copy()?;
        let ended = |migration: &Migration| [Completed, Failed].contains(&migration.stage);
        let migration = self.migrating(&[PreCopy, StopCopy, Ending], ended)?;
        if migration.stage == Completed {
            return self.arrived(migration, before).map(drop);
        }
        let text = format!("the migration fails: {}", migration.error.unwrap_or_default());
        self.watch.say(Event::Progress { text })?;
        self.stays(Failed)?;
        self.migrate()
    }

    /// Has a device write pages, a MiB or more, and QEMU send them slowly: until the migration is let
    /// complete, QEMU doesn't ask again who wrote what.
    pub fn slow_pass(&mut self, device: usize, pages: Range<u64>) -> Result<()> {
        let bytes = (pages.end - pages.start) * PAGE;
        // In the first pass all memory is still to be sent.
        self.passes(2)?;
        self.here().monitor().limit_bandwidth(SLOW)?;
        self.write(device, Opcode::DmaWrite, pages)?;
        self.context.note("a slow pass");
        // In between two passes all is sent.
        self.migrating(&[Stage::PreCopy], |migration| migration.remaining > bytes / 2).map(drop)
    }
}
