// SPDX-License-Identifier: GPL-2.0-only

//! What a case works with: a machine with a guest, and a second one that it migrates to.

use super::machine::{BOOT_LIMIT, GuestMachine, LIMIT};
use crate::{
    qemu::{is_running, migrate, migration, receive},
    vmm::{Migration, Stage},
    watch::{Watch, new_directory},
};
use anyhow::{Context as _, Result, bail, ensure};
use events::Event;
use harness::{Context, Recorder};
use mdev_dma::sysfs::Mdev;
use qemu_client::MigrationCapability;
use std::{cell::RefCell, fmt, path::Path, time::Duration};
use tempfile::TempDir;

/// Pages per second, and pages, of each of the writers in the guest, whose CPU is slow.
const LOAD: &str = "--rate 50 --pages 64";

/// The same, for the generator not to have made its burst when it is interrupted.
const SLOW_LOAD: &str = "--rate 25 --pages 128";

/// Passes of pre-copy: all memory, then what was written meanwhile.
const PASSES: u64 = 3;

/// The guest has found memory that isn't what was written there.
#[derive(Debug)]
pub struct WrongInGuest {
    text: String,
    /// Whether the machine had migrated: else nothing can have been lost.
    pub migrated: bool,
}

impl fmt::Display for WrongInGuest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the guest says:\n{}", self.text.trim_end())
    }
}

impl std::error::Error for WrongInGuest {}

/// A machine with a guest, and where it goes.
pub struct GuestPair<'a> {
    context: &'a Context<'a>,
    recorder: &'a RefCell<Recorder>,
    watch: Watch<'a>,
    qemu: &'a str,
    /// The directory with the guest.
    guest: &'a Path,
    directory: TempDir,
    here: Option<GuestMachine>,
    there: Option<GuestMachine>,
    /// Machines that were started.
    machines: usize,
    /// Which device the machine has that is here: the one that it migrates to has the other.
    side: usize,
    /// Whether it has migrated.
    migrated: bool,
    /// Whether it has the device.
    plugged: bool,
    /// Whether device and CPU write.
    writing: bool,
    /// How much they do.
    load: &'static str,
}

impl<'a> GuestPair<'a> {
    /// With no machine yet.
    pub fn new(
        context: &'a Context<'a>,
        recorder: &'a RefCell<Recorder>,
        qemu: &'a str,
        guest: &'a Path,
    ) -> Result<Self> {
        Ok(Self {
            context,
            recorder,
            watch: Watch::new(recorder, LIMIT),
            qemu,
            guest,
            directory: new_directory()?,
            here: None,
            there: None,
            machines: 0,
            side: 0,
            migrated: false,
            plugged: false,
            writing: false,
            load: LOAD,
        })
    }

    /// Has a machine whose guest has booted, plugs in the device, and lets it write.
    pub fn start(&mut self) -> Result<()> {
        let machine = self.machine(None)?;
        let state = self.guest.join("state");
        machine.monitor().migrate_incoming(&format!("file:{}", state.display()))?;
        self.watch.arrived(|| migration(machine.monitor()))?;
        self.here = Some(machine);
        self.plug()?;
        self.begin_to_write()
    }

    /// Plugs in the device, and waits until the guest has it.
    pub fn plug(&mut self) -> Result<()> {
        self.context.note("plug in the device");
        self.here().plug(&self.context.device(self.side)?)?;
        self.plugged = true;
        self.guest_has_device()
    }

    fn guest_has_device(&self) -> Result<()> {
        let mut wait = self.watch.wait("for the guest to notice");
        let has = || {
            let (code, _) = self.here().run("grep -q 0x4d44 /sys/bus/pci/devices/*/device")?;
            anyhow::Ok(code == 0)
        };
        while !has()? {
            wait.poll(|| "not yet".into())?;
        }
        Ok(())
    }

    /// Has the guest let go of the device.
    pub fn unplug(&mut self) -> Result<()> {
        self.context.note("unplug the device");
        self.here().unplug()?;
        let mut wait = self.watch.wait("for the guest to let go of the device");
        while self.here().is_plugged()? {
            wait.poll(|| "not yet".into())?;
        }
        self.plugged = false;
        Ok(())
    }

    /// Lets device and CPU write.
    pub fn begin_to_write(&mut self) -> Result<()> {
        let report = self.start_workload()?;
        self.goes_on_from(&report)
    }

    /// The same, after the machine was reset: the device mustn't have written to memory of the new guest.
    pub fn begin_anew(&mut self) -> Result<()> {
        let report = self.start_workload()?;
        ensure!(
            report.contains(" had made 0 writes"),
            "the device has written since the machine was reset: {}",
            report.trim_end()
        );
        self.goes_on_from(&report)
    }

    fn start_workload(&mut self) -> Result<String> {
        let report = self.guest(&format!("start --seed {} {}", self.machines, self.load))?;
        self.writing = true;
        Ok(report)
    }

    /// Has device and CPU write less often, to more pages, when they begin.
    pub fn write_slowly(&mut self) {
        self.load = SLOW_LOAD;
    }

    /// Has device and CPU write no more, after all memory was checked.
    pub fn stop(&mut self) -> Result<()> {
        self.guest("stop")?;
        self.writing = false;
        Ok(())
    }

    /// Has the guest reset the device while that writes, and check its memory.
    pub fn reset_device(&self) -> Result<()> {
        let text = self.guest("reset")?;
        let resets = text.lines().find(|line| line.starts_with("resets: "));
        let resets =
            resets.with_context(|| format!("the guest says nothing of resets:\n{text}"))?;
        self.note(resets)?;
        ensure!(!resets.contains("last 0 writes"), "the device had stopped before it was reset");
        self.writes_more(&text)
    }

    /// Has the guest reboot while all write, and waits for its kernel to begin: until then SeaBIOS resets the
    /// machine once more.
    pub fn reboot(&mut self) -> Result<()> {
        self.context.note("in the guest: reboot -f");
        let here = self.here();
        here.tell("reboot -f")?;
        let mut wait = Watch::new(self.recorder, BOOT_LIMIT).wait("for the guest to reboot");
        while !here.console().contains("] Linux version ") {
            wait.poll_after(Duration::from_secs(1), || "not yet".into())?;
        }
        self.writing = false;
        Ok(())
    }

    /// Waits until the guest has booted, where it is now, and has the device.
    pub fn booted(&self) -> Result<()> {
        self.context.note("wait for the guest to boot");
        self.here().booted()?;
        self.guest_has_device()
    }

    /// Has the guest run `dirtyscope guest`.
    pub fn guest(&self, arguments: &str) -> Result<String> {
        self.context.note(format!("in the guest: dirtyscope guest {arguments}"));
        let (code, text) = self.here().run(&format!("dirtyscope guest {arguments}"))?;
        if text.contains("wrong pages: ") {
            bail!(WrongInGuest { text, migrated: self.migrated });
        }
        ensure!(code == 0, "dirtyscope guest {arguments} ended with {code}: {}", text.trim_end());
        Ok(text)
    }

    /// Says something of the case.
    pub fn note(&self, text: &str) -> Result<()> {
        self.watch.say(Event::Progress { text: text.into() })
    }

    /// Has the guest check its memory, waits until all that write there have written more, and has it
    /// check again.
    pub fn goes_on(&self) -> Result<()> {
        self.goes_on_from(&self.check()?)
    }

    /// The same, from where all were when the guest said this.
    fn goes_on_from(&self, report: &str) -> Result<()> {
        self.writes_more(report)?;
        self.check().map(drop)
    }

    /// Waits until all that write in the guest have written more than they had when it said this.
    fn writes_more(&self, report: &str) -> Result<()> {
        let before = written(report);
        ensure!(before.len() == 4, "four write, not {before:?}");
        let mut wait = self.watch.wait("for device and CPU to write");
        loop {
            let now = written(&self.guest("status")?);
            // The generator's writes are counted when it has made a burst of them.
            if now.iter().zip(&before).all(|(now, before)| now > before) {
                return Ok(());
            }
            wait.poll(|| format!("{now:?} pages written"))?;
        }
    }

    /// Has the guest check its memory.
    fn check(&self) -> Result<String> {
        let text = self.guest("check")?;
        self.note(&format!("{}: {}", self.here().name, text.trim_end().replace('\n', "; ")))?;
        Ok(text)
    }

    /// Migrates the machine while all write, and has it check its memory there.
    pub fn migrate(&mut self) -> Result<()> {
        self.begin(&[])?;
        self.passes()?;
        self.complete()
    }

    /// Begins a migration with these capabilities, which then stays in pre-copy.
    pub fn begin(&mut self, capabilities: &[MigrationCapability]) -> Result<()> {
        let mdev = self.plugged.then(|| self.context.device(1 - self.side)).transpose()?;
        let there = self.machine(mdev)?;
        let socket = self.directory.path().join(format!("{}.sock", there.name));
        self.context.note(format!("migrate to {}", there.name));
        let there = self.there.insert(there);
        let here = self.here.as_ref().expect("a machine was started");
        here.monitor().set_capabilities(capabilities, true)?;
        there.monitor().set_capabilities(capabilities, true)?;
        receive(there.monitor(), &socket)?;
        migrate(here.monitor(), &socket)
    }

    /// Waits until QEMU has asked some times who wrote what, and until all have written to pages that were
    /// sent already: in the first pass much is written before it is sent.
    pub fn passes(&self) -> Result<()> {
        let now = || migration(self.here().monitor());
        self.watch.migrating(now, &[Stage::PreCopy], |now| now.passes >= PASSES)?;
        match self.writing {
            true => self.writes_more(&self.guest("status")?),
            false => Ok(()),
        }
    }

    /// Lets the migration complete, and has the guest check its memory where it has arrived.
    pub fn complete(&mut self) -> Result<()> {
        use Stage::{Completed, PreCopy, StopCopy};
        self.context.note("let it complete");
        let here = self.here().monitor();
        here.end_pre_copy()?;
        let now = || migration(here);
        self.watch.migrating(now, &[PreCopy, StopCopy], |now| now.stage == Completed)?;
        self.arrived()
    }

    /// The same, or else the migration fails, as it does after a reset: then the machine goes on, and the next one
    /// must complete.
    pub fn complete_or_again(&mut self) -> Result<()> {
        use Stage::{Completed, Ending, Failed, PreCopy, StopCopy};
        self.context.note("let it complete, or fail");
        let here = self.here().monitor();
        here.end_pre_copy()?;
        let now = || migration(here);
        let ended = |now: &Migration| [Completed, Failed].contains(&now.stage);
        let migration = self.watch.migrating(now, &[PreCopy, StopCopy, Ending], ended)?;
        if migration.stage == Completed {
            return self.arrived();
        }
        self.note(&format!("the migration fails: {}", migration.error.unwrap_or_default()))?;
        self.stays()?;
        self.migrate()
    }

    /// Has the guest check its memory where it has arrived.
    fn arrived(&mut self) -> Result<()> {
        let there = self.there.take().expect("a migration has begun");
        self.watch.arrived(|| migration(there.monitor()))?;
        // It mustn't be able to go on here.
        self.here = Some(there);
        self.side = 1 - self.side;
        self.migrated = true;
        self.goes_on_if_writing()
    }

    /// Cancels the migration. The machine goes on here.
    pub fn cancel(&mut self) -> Result<()> {
        use Stage::{Cancelled, Ending, PreCopy};
        self.context.note("cancel");
        let here = self.here().monitor();
        here.migrate_cancel()?;
        let now = || migration(here);
        self.watch.migrating(now, &[PreCopy, Ending], |now| now.stage == Cancelled)?;
        self.stays()
    }

    /// The machine goes on here, and nowhere else.
    fn stays(&mut self) -> Result<()> {
        self.there = None;
        ensure!(
            is_running(self.here().monitor())?,
            "the machine doesn't run, it should have gone on"
        );
        self.goes_on_if_writing()
    }

    fn goes_on_if_writing(&self) -> Result<()> {
        match self.writing {
            true => self.goes_on(),
            false => Ok(()),
        }
    }

    /// A machine that waits for one to come, which has this device.
    fn machine(&mut self, mdev: Option<Mdev>) -> Result<GuestMachine> {
        let name = format!("machine-{}", self.machines);
        self.context.note(format!("start {name}"));
        self.machines += 1;
        GuestMachine::start(self.qemu, self.guest, self.directory.path(), &name, mdev.as_ref())
    }

    /// The machine, where it is now.
    pub fn here(&self) -> &GuestMachine {
        self.here.as_ref().expect("a machine was started")
    }

    /// What the QEMUs and the guest have said.
    pub fn logs(&mut self) -> String {
        let machines = self.here.iter_mut().chain(&mut self.there);
        machines.map(|machine| machine.log()).collect()
    }
}

/// How many pages each has written, according to `dirtyscope guest status`.
fn written(text: &str) -> Vec<u64> {
    let lines = text.lines().filter(|line| line.starts_with("written by "));
    let counts = lines.filter_map(|line| line.split(": ").nth(1)?.split(' ').next()?.parse().ok());
    counts.collect()
}

#[cfg(test)]
mod tests {
    use super::written;

    #[test]
    fn status_says_how_many_pages_each_has_written() {
        let status = "device: 0000:01:00.0, whose generator had made 0 writes\n\
            interrupts: 4, by uio_pci_generic\n\
            written by the device's generator: 192 pages, to those from 0x3c00000 on\n\
            written by the CPU: 40 pages, to those from 0x6a00000 on\n\
            checked: 2 times as a whole, and each page before it was written again\n\
            state: all is as it must be\n";
        assert_eq!(written(status), [192, 40]);
        assert!(written("state: failed").is_empty());
    }
}
