// SPDX-License-Identifier: GPL-2.0-only

//! What a case works with: a machine, a second one that it migrates to, and what their memory must
//! contain.

use crate::{
    contents::MemoryContents,
    qemu::{FIRST_SLOT, Layout, Machine, Role},
    watch::{Watch, begin, new_directory, runs_on},
};
use anyhow::{Context as _, Result, ensure};
use events::Event;
use harness::Context;
use mdev_dma::{GeneratorConfig, GeneratorStatus, MdevDma, Opcode, PAGE, sysfs::Mdev};
use qemu_client::{Bar, Migration, MigrationCapability, MigrationStatus};
use std::{fmt, ops::Range, path::PathBuf, thread, time::Duration};
use tempfile::TempDir;

/// A quiesced device writes nothing for so long.
const QUIET: Duration = Duration::from_millis(20);

/// Bytes per second of a pass that is to last: a MiB takes as long as a case might need.
const SLOW: u64 = 128 << 10;

/// Passes of pre-copy that are worth the name: all memory, then what was written meanwhile, twice.
const PASSES: u64 = 3;

/// What is known of one device of the machine.
#[derive(Clone, Default)]
struct DeviceRecord {
    pins: u64,
    generator: Option<GeneratorConfig>,
    /// Writes of the generator that `contents` has.
    written: u64,
}

/// A machine and where it goes.
pub struct MachinePair<'a> {
    context: &'a Context<'a>,
    watch: Watch<'a>,
    qemu: &'a str,
    directory: TempDir,
    here: Option<Machine>,
    there: Option<Machine>,
    contents: Option<MemoryContents>,
    layout: Layout,
    known: Vec<DeviceRecord>,
    /// Machines that were started.
    machines: usize,
    /// Which devices the machine has that is here: those that it migrates to are the others.
    side: usize,
    /// What seeds follow from.
    seed: u64,
}

impl<'a> MachinePair<'a> {
    /// With no machine yet.
    pub fn new(
        context: &'a Context<'a>,
        watch: Watch<'a>,
        qemu: &'a str,
        seed: u64,
    ) -> Result<Self> {
        Ok(Self {
            context,
            watch,
            qemu,
            directory: new_directory()?,
            here: None,
            there: None,
            contents: None,
            layout: Layout::of_devices(0),
            known: Vec::new(),
            machines: 0,
            side: 0,
            seed,
        })
    }

    /// Starts a machine with so many devices, and fills its memory.
    pub fn start(&mut self, devices: usize) -> Result<()> {
        self.start_as(Layout::of_devices(devices))
    }

    /// As [`MachinePair::start`], a machine that isn't a usual one.
    pub fn start_as(&mut self, layout: Layout) -> Result<()> {
        self.layout = layout;
        self.known = vec![DeviceRecord::default(); layout.devices];
        let machine = self.machine(Role::Source, self.side)?;
        machine.set_up()?;
        self.contents = Some(MemoryContents::fill(&machine, self.next_seed())?);
        self.here = Some(machine);
        Ok(())
    }

    /// Pins pages with a device.
    pub fn pin(&mut self, device: usize, pages: Range<u64>) -> Result<()> {
        self.known[device].pins += pages.end - pages.start;
        self.run(device, Opcode::Pin, pages, 0)
    }

    /// Unpins pages.
    pub fn unpin(&mut self, device: usize, pages: Range<u64>) -> Result<()> {
        self.known[device].pins -= pages.end - pages.start;
        self.run(device, Opcode::Unpin, pages, 0)
    }

    /// Has a device write pages, through pins or by `vfio_dma_rw()`.
    pub fn write(&mut self, device: usize, opcode: Opcode, pages: Range<u64>) -> Result<()> {
        let seed = self.next_seed();
        self.run(device, opcode, pages.clone(), seed)?;
        self.contents().commanded(bytes(&pages), seed);
        Ok(())
    }

    fn run(&self, device: usize, opcode: Opcode, pages: Range<u64>, seed: u64) -> Result<()> {
        let (iova, length) = (pages.start * PAGE, (pages.end - pages.start) * PAGE);
        let what = format!("device {device}: {opcode} {iova:#x}+{length:#x}");
        self.context.note(&what);
        let outcome = self.here().device(device).run(opcode as u32, iova, length, seed)?;
        ensure!(outcome.status == 0, "{what} ended with errno {}", outcome.status);
        Ok(())
    }

    /// As [`MachinePair::write`] by `vfio_dma_rw()`, but the command runs in the background.
    pub fn begin_write(&mut self, device: usize, pages: Range<u64>) -> Result<()> {
        let seed = self.next_seed();
        let (iova, length) = (pages.start * PAGE, (pages.end - pages.start) * PAGE);
        self.context.note(format!("device {device}: begin DMA_WRITE {iova:#x}+{length:#x}"));
        self.here().device(device).run_in_background(Opcode::DmaWrite, iova, length, seed)?;
        self.contents().commanded(bytes(&pages), seed);
        Ok(())
    }

    /// Waits until something is so.
    pub fn until(
        &self,
        what: &'static str,
        is_so: impl Fn(&Machine) -> Result<bool>,
    ) -> Result<()> {
        self.context.note(format!("wait {what}"));
        let mut wait = self.watch.wait(what);
        while !is_so(self.here())? {
            wait.poll(|| "not yet".into())?;
        }
        Ok(())
    }

    /// Starts the generator of a device: in these pages, in these ways, so many pages per second.
    pub fn generate(
        &mut self,
        device: usize,
        pages: Range<u64>,
        mode: u32,
        rate: u32,
    ) -> Result<()> {
        let (iova, length) = (pages.start * PAGE, (pages.end - pages.start) * PAGE);
        let seed = self.next_seed();
        let config = GeneratorConfig { iova, length, seed, limit: 0, rate, mode };
        self.context.note(format!("device {device}: {config:x?}"));
        self.here().device(device).start_generator(&config)?;
        running(&self.here().device(device))?;
        let known = &mut self.known[device];
        (known.generator, known.written) = (Some(config), 0);
        Ok(())
    }

    /// Waits until every generator that was started has made so many more writes.
    pub fn written(&mut self, more: u64) -> Result<()> {
        let counters = |pair: &Self| -> Result<Vec<u64>> {
            let running = pair.generators().map(|i| running(&pair.here().device(i)));
            running.map(|status| Ok(status?.counter)).collect()
        };
        let before = counters(self)?;
        let mut wait = self.watch.wait("for the generators to write");
        loop {
            let now = counters(self)?;
            if now.iter().zip(&before).all(|(now, before)| *now >= before + more) {
                return Ok(());
            }
            wait.poll(|| format!("{now:?} pages written"))?;
        }
    }

    /// Migrates the machine while its devices go on, and checks all of its memory. It is here
    /// afterwards, with its generators stopped.
    pub fn migrate(&mut self) -> Result<()> {
        self.begin()?;
        self.passes(PASSES)?;
        self.complete().map(drop)
    }

    /// Begins a migration, which then stays in pre-copy.
    pub fn begin(&mut self) -> Result<()> {
        self.here().monitor().pause_before_switchover(false)?;
        self.begin_with(&[])
    }

    /// As [`MachinePair::begin`], but the migration will wait once this machine is stopped.
    pub fn begin_with_pause(&mut self) -> Result<()> {
        self.here().monitor().pause_before_switchover(true)?;
        self.begin_with(&[])
    }

    /// As [`MachinePair::begin`], with these capabilities.
    pub fn begin_with(&mut self, capabilities: &[MigrationCapability]) -> Result<()> {
        self.here.as_mut().expect("a machine was started").role = Role::Source;
        let there = self.machine(Role::Destination, 1 - self.side)?;
        let socket = self.file(&format!("{}.sock", there.name));
        self.context.note(format!("migrate to {}", there.name));
        let there = self.there.insert(there);
        let here = self.here.as_ref().expect("a machine was started");
        begin(here.monitor(), there.monitor(), &socket, capabilities)
    }

    /// Begins a migration with these capabilities, which QEMU must refuse and say this. The machine
    /// goes on, without them.
    pub fn refused(&mut self, capabilities: &[MigrationCapability], saying: &str) -> Result<()> {
        use MigrationStatus::{Active, Failed, Failing, None, Setup};
        let why = match self.begin_with(capabilities) {
            Err(error) => format!("{error:#}"),
            Ok(()) => {
                let states = [None, Setup, Active, Failing];
                let failed = self.migrating(&states, |migration| migration.status == Failed)?;
                failed.error.unwrap_or_default()
            }
        };
        self.watch.say(Event::Progress { text: why.clone() })?;
        ensure!(why.contains(saying), "the migration was refused, but QEMU says {why:?}");
        self.here().monitor().set_capabilities(capabilities, false)?;
        self.there = Option::None;
        runs_on(self.here().monitor())?;
        self.written(1)
    }

    /// Resets the machine, and sets up its devices as after a boot: they have no pins then, and their
    /// generators have stopped. None may run.
    pub fn reset(&mut self) -> Result<()> {
        self.context.note("system_reset");
        self.here().monitor().system_reset()?;
        self.known.fill(DeviceRecord::default());
        self.here().set_up()?;
        for device in self.here().devices() {
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
                Option::None => wait.poll(|| "not measured yet".into())?,
            }
        };
        self.watch.say(Event::Progress { text: format!("QEMU measured {rate} MiB/s") })?;
        ensure!(rate > 0, "QEMU has measured that nothing is written, and a generator runs");
        Ok(())
    }

    /// Turns on the machine's IOMMU, for the first device, by tables that can map these pages.
    pub fn enable_iommu(&self, pages: &Range<u64>) -> Result<()> {
        self.context.note("turn on the IOMMU");
        self.here().iommu().enable(FIRST_SLOT, pages.start * PAGE)
    }

    /// Lets the migration complete, or fail: then the machine goes on, and the next one must complete.
    pub fn complete_or_again(&mut self) -> Result<()> {
        use MigrationStatus::{Active, Completed, Device, Failed, Failing};
        self.context.note("let it complete, or fail");
        let before = self.counters()?.iter().sum();
        self.here().monitor().end_pre_copy()?;
        let states = [Active, Device, Failing];
        let ended = |migration: &Migration| [Completed, Failed].contains(&migration.status);
        let migration = self.migrating(&states, ended)?;
        if migration.status == Completed {
            return self.arrived(migration, before).map(drop);
        }
        let text = format!("the migration fails: {}", migration.error.unwrap_or_default());
        self.watch.say(Event::Progress { text })?;
        self.stays(Failed)?;
        self.migrate()
    }

    /// Waits until QEMU has asked so often who wrote what.
    pub fn passes(&mut self, passes: u64) -> Result<()> {
        self.context.note(format!("{passes} passes of pre-copy"));
        let active = [MigrationStatus::Setup, MigrationStatus::Active];
        self.migrating(&active, |migration| migration.dirty_syncs >= passes).map(drop)
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
        self.migrating(&[MigrationStatus::Active], |migration| migration.remaining > bytes / 2)
            .map(drop)
    }

    /// Cancels the migration. The machine goes on here.
    pub fn cancel(&mut self) -> Result<()> {
        self.context.note("cancel");
        self.here().monitor().migrate_cancel()?;
        self.stays(MigrationStatus::Cancelled)
    }

    /// Kills the machine that it migrates to. It goes on here.
    pub fn destination_dies(&mut self) -> Result<()> {
        self.kill_destination();
        self.stays(MigrationStatus::Failed)
    }

    /// Stops this machine, and lets the migration wait. It must have begun with a pause.
    pub fn pause(&mut self) -> Result<()> {
        use MigrationStatus::{Active, Device, PreSwitchover};
        self.context.note("let it go on to the switchover");
        self.here().monitor().end_pre_copy()?;
        self.migrating(&[Active, Device], |migration| migration.status == PreSwitchover)?;
        self.quiesced().map(drop)
    }

    /// As [`MachinePair::destination_dies`], but this machine is stopped already, in a pause.
    pub fn destination_dies_in_pause(&mut self) -> Result<()> {
        use MigrationStatus::{Active, Device, Failed, Failing, PreSwitchover};
        self.kill_destination();
        self.here().monitor().migrate_continue()?;
        self.migrating(&[PreSwitchover, Active, Device, Failing], |migration| {
            migration.status == Failed
        })?;
        self.stays(Failed)
    }

    fn kill_destination(&mut self) {
        self.context.note("the destination dies");
        self.there.as_mut().expect("a migration has begun").kill();
    }

    /// Waits for the end of a migration that can't succeed, and sees that the machine goes on here.
    fn stays(&mut self, end: MigrationStatus) -> Result<()> {
        use MigrationStatus::{Active, Cancelling, Failing};
        self.migrating(&[Active, Cancelling, Failing], |migration| migration.status == end)?;
        self.there = None;
        runs_on(self.here().monitor())?;
        self.written(1)
    }

    /// Lets the migration complete, and checks all of the machine's memory. Returns how many pages
    /// the generators have written from then until the devices were stopped.
    pub fn complete(&mut self) -> Result<u64> {
        use MigrationStatus::{Active, Completed, Device, Setup};
        self.context.note("let it complete");
        let before = self.counters()?;
        self.here().monitor().end_pre_copy()?;
        let migration =
            self.migrating(&[Setup, Active, Device], |migration| migration.status == Completed)?;
        self.arrived(migration, before.iter().sum())
    }

    /// Checks all of the memory of the machine, which has migrated. Returns how many pages more than
    /// `before` the generators have written.
    fn arrived(&mut self, migration: Migration, before: u64) -> Result<u64> {
        let counters = self.quiesced()?;
        let late = counters.iter().sum::<u64>() - before;
        let summary = Summary { migration, pages: counters.iter().sum(), late }.to_string();
        self.watch.say(Event::Progress { text: summary })?;
        self.account(&counters);
        self.check_memory(self.here())?;
        let there = self.there.take().expect("a migration has begun");
        self.watch.arrived(there.monitor())?;
        self.check_memory(&there)?;
        self.here = Some(there);
        self.side = 1 - self.side;
        self.goes_on()?;
        Ok(late)
    }

    /// Fails if a device of the machine that was left still writes. Returns their counters.
    fn quiesced(&self) -> Result<Vec<u64>> {
        let counters = self.counters()?;
        thread::sleep(QUIET);
        let later = self.counters()?;
        ensure!(later == counters, "a stopped device has written: {counters:?}, then {later:?}");
        Ok(counters)
    }

    /// Takes the writes of the generators up to these counters into `contents`.
    fn account(&mut self, counters: &[u64]) {
        let contents = self.contents.as_mut().expect("a machine was started");
        for (i, (known, &counter)) in self.known.iter_mut().zip(counters).enumerate() {
            if let Some(config) = &known.generator {
                contents.generated(i, config, known.written..counter);
                known.written = counter;
            }
        }
    }

    fn check_memory(&self, machine: &Machine) -> Result<()> {
        self.contents.as_ref().expect("a machine was started").check(machine)
    }

    /// Lets the machine run where it has arrived, and sees that its devices go on where they stopped.
    fn goes_on(&mut self) -> Result<()> {
        self.context.note(format!("go on in {}", self.here().name));
        self.here().monitor().cont()?;
        for (i, known) in self.known.iter().enumerate() {
            let device = self.here().device(i);
            device.check().context("the device isn't where it was")?;
            let pins = device.pins()?;
            ensure!(pins == known.pins, "device {i} has {pins} pins, not {}", known.pins);
            let Some(config) = &known.generator else { continue };
            let found = device.generator_config()?;
            ensure!(found == *config, "device {i} has {found:x?}, not {config:x?}");
            let counter = running(&device)?.counter;
            ensure!(
                counter >= known.written,
                "device {i} has written {counter} pages, it was at {} when it stopped",
                known.written
            );
        }
        self.written(1)?;
        self.stop()?;
        self.check_memory(self.here())
    }

    /// Stops all generators.
    pub fn stop(&mut self) -> Result<()> {
        for device in self.here().devices() {
            device.stop_generator()?;
        }
        let counters = self.counters()?;
        self.account(&counters);
        Ok(())
    }

    /// Lets the generators go on that were stopped.
    pub fn resume(&mut self) -> Result<()> {
        for i in self.generators() {
            self.here().device(i).resume_generator()?;
        }
        Ok(())
    }

    /// Waits until the migration is as it should be, as long as it is in one of these states.
    fn migrating(
        &self,
        states: &[MigrationStatus],
        done: impl Fn(&Migration) -> bool,
    ) -> Result<Migration> {
        self.watch.migrating(self.here().monitor(), states, done)
    }

    /// What the counters of all generators say.
    fn counters(&self) -> Result<Vec<u64>> {
        self.here().devices().map(|device| Ok(device.generator()?.counter)).collect()
    }

    /// The devices whose generator was started.
    fn generators(&self) -> impl Iterator<Item = usize> {
        let known = self.known.iter().enumerate();
        known.filter_map(|(i, known)| known.generator.is_some().then_some(i))
    }

    fn machine(&mut self, role: Role, side: usize) -> Result<Machine> {
        let name = format!("machine-{}", self.machines);
        let devices = self.layout.devices;
        let mdevs = (0..devices).map(|i| self.context.device(side * devices + i));
        let mdevs = mdevs.collect::<Result<Vec<Mdev>>>()?;
        self.context.note(format!("start {name}"));
        self.machines += 1;
        Machine::start(self.qemu, self.directory.path(), &name, self.layout, &mdevs, role)
    }

    /// The machine that is migrated, where it is now.
    pub fn here(&self) -> &Machine {
        self.here.as_ref().expect("a machine was started")
    }

    fn contents(&mut self) -> &mut MemoryContents {
        self.contents.as_mut().expect("a machine was started")
    }

    fn next_seed(&mut self) -> u64 {
        self.seed = self.seed.wrapping_add(1);
        self.seed
    }

    /// Where a file can be put that goes when the case ends.
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// What the QEMUs have said.
    pub fn logs(&mut self) -> String {
        let mut text = String::new();
        for machine in self.here.iter_mut().chain(&mut self.there) {
            let log = machine.log();
            if !log.is_empty() {
                text += &format!("QEMU of {} says:\n{}\n", machine.name, log.trim_end());
            }
        }
        text
    }
}

/// The bytes of pages.
pub fn bytes(pages: &Range<u64>) -> Range<u64> {
    pages.start * PAGE..pages.end * PAGE
}

/// How far a generator is, which must not have stopped.
fn running(device: &MdevDma<Bar<'_>>) -> Result<GeneratorStatus> {
    let status = device.generator()?;
    ensure!(status.is_running(), "the generator has stopped: {status:?}");
    Ok(status)
}

/// A migration that has completed, in a line.
struct Summary {
    migration: Migration,
    pages: u64,
    late: u64,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { migration, pages, late } = self;
        let sent = migration.transferred >> 10;
        let state = migration.device_state.unwrap_or(0);
        let downtime = migration.downtime.unwrap_or(0);
        write!(f, "{} passes, {sent} KiB sent, {state} bytes of devices, ", migration.dirty_syncs)?;
        write!(f, "stopped for {downtime} ms, {pages} pages written, {late} of them in the end")
    }
}
