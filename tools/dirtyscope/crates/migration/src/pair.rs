// SPDX-License-Identifier: GPL-2.0-only

//! What a case works with: a machine, a second one that it migrates to, and what their memory must
//! contain.

mod qemu;

use crate::{
    contents::{Memory, MemoryContents},
    vmm::{Layout, Machine, MachineConfig, Migration, Registers, Role, Stage, Vmm},
    watch::{Watch, new_directory},
};
use anyhow::{Context as _, Result, ensure};
use events::Event;
use harness::Context;
use mdev_dma::{
    GeneratorConfig, GeneratorStatus, MdevDma, Opcode, PAGE, pattern::seed_at, sysfs::Mdev,
};
use std::{
    fmt, fs,
    ops::Range,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};
use tempfile::TempDir;

/// A quiesced device writes nothing for so long.
const QUIET: Duration = Duration::from_millis(20);

/// A command takes longer than that.
const SOON: Duration = Duration::from_millis(1);

/// Passes of pre-copy that are worth the name: all memory, then what was written meanwhile, twice.
const PASSES: u64 = 3;

/// What is known of one device of the machine.
#[derive(Clone, Default)]
struct DeviceRecord {
    pins: u64,
    generator: Option<GeneratorConfig>,
    /// Writes of the generator that `contents` has.
    written: u64,
    /// The pages that a command in the background writes, with this seed, which `contents` hasn't yet.
    writing: Option<(Range<u64>, u64)>,
}

/// A machine that was started, and its memory.
struct Started<M> {
    machine: M,
    memory: Memory,
}

impl<M: Machine> Started<M> {
    /// What its VMM has said.
    fn says(&mut self) -> String {
        match self.machine.log() {
            log if log.is_empty() => log,
            log => format!("the VMM of {} says:\n{}\n", self.memory.machine, log.trim_end()),
        }
    }
}

/// A machine of a VMM, and where it goes.
pub struct MachinePair<'a, V: Vmm> {
    context: &'a Context<'a>,
    watch: Watch<'a>,
    vmm: &'a V,
    here: Option<Started<V::Machine>>,
    there: Option<Started<V::Machine>>,
    /// Dropped after the machines, whose files it has.
    directory: TempDir,
    contents: Option<MemoryContents>,
    layout: Layout,
    known: Vec<DeviceRecord>,
    /// Machines that were started.
    machines: usize,
    /// Which devices the machine has that is here: those that it migrates to are the others.
    side: usize,
    /// What seeds follow from.
    seed: u64,
    /// So many bytes further than its memory is, devices find it: what an IOMMU makes of it.
    offset: u64,
    /// Bytes that the migration has sent which completed last.
    sent: u64,
    /// What the VMM of the machine has said that was left then.
    left: String,
}

impl<'a, V: Vmm> MachinePair<'a, V> {
    /// With no machine yet.
    pub fn new(context: &'a Context<'a>, watch: Watch<'a>, vmm: &'a V, seed: u64) -> Result<Self> {
        Ok(Self {
            context,
            watch,
            vmm,
            directory: new_directory()?,
            here: None,
            there: None,
            contents: None,
            layout: Layout::of_devices(0),
            known: Vec::new(),
            machines: 0,
            side: 0,
            seed,
            offset: 0,
            sent: 0,
            left: String::new(),
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
        let started = self.machine(Role::Source, self.side)?;
        let seed = self.next_seed();
        self.contents = Some(MemoryContents::fill(&started.memory, &layout, seed)?);
        self.here = Some(started);
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

    /// The machine has taken memory away from a device, which had these pages of it pinned: it must have let
    /// them go.
    pub fn revoked(&mut self, device: usize, pages: &Range<u64>) -> Result<()> {
        self.known[device].pins -= pages.end - pages.start;
        let (pins, left) = (self.here().device(device).pins()?, self.known[device].pins);
        ensure!(pins == left, "device {device} has {pins} pins, of which {left} are mapped");
        Ok(())
    }

    /// Has a device write pages, through pins or by `vfio_dma_rw()`.
    pub fn write(&mut self, device: usize, opcode: Opcode, pages: Range<u64>) -> Result<()> {
        let seed = self.next_seed();
        self.run(device, opcode, pages.clone(), seed)?;
        self.contents().commanded(bytes(&pages), seed);
        Ok(())
    }

    fn run(&mut self, device: usize, opcode: Opcode, pages: Range<u64>, seed: u64) -> Result<()> {
        ensure!(self.settle(device)?, "device {device} still runs a command in the background");
        let (iova, length) = (self.offset + pages.start * PAGE, (pages.end - pages.start) * PAGE);
        let what = format!("device {device}: {opcode} {iova:#x}+{length:#x}");
        self.context.note(&what);
        let seed = seed_at(seed, self.offset);
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
        self.known[device].writing = Some((pages, seed));
        Ok(())
    }

    /// Takes what a command in the background has written into `contents`, if it has ended. Returns whether
    /// none goes on.
    fn settle(&mut self, device: usize) -> Result<bool> {
        let Some((pages, seed)) = self.known[device].writing.clone() else { return Ok(true) };
        let outcome = self.here().device(device).outcome()?;
        if outcome.is_in_progress() {
            return Ok(false);
        }
        let status = outcome.status;
        ensure!(status == 0, "device {device}: DMA_WRITE ended with errno {status}");
        self.contents().commanded(bytes(&pages), seed);
        self.known[device].writing = None;
        Ok(true)
    }

    /// Waits until something is so.
    pub fn until(
        &self,
        what: &'static str,
        is_so: impl Fn(&V::Machine) -> Result<bool>,
    ) -> Result<()> {
        self.context.note(format!("wait {what}"));
        let mut wait = self.watch.wait(what);
        while !is_so(self.here())? {
            wait.poll(|| "not yet".into())?;
        }
        Ok(())
    }

    /// Says something of the case to whoever reads its results.
    pub fn say(&self, text: String) -> Result<()> {
        self.watch.say(Event::Progress { text })
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
        self.start_destination()?;
        self.send(false)
    }

    /// As [`MachinePair::begin`], but the migration will wait once this machine is stopped.
    pub fn begin_with_pause(&mut self) -> Result<()> {
        self.start_destination()?;
        self.send(true)
    }

    /// Starts the machine that this one is to migrate to.
    fn start_destination(&mut self) -> Result<()> {
        self.there = Some(self.machine(Role::Destination, 1 - self.side)?);
        Ok(())
    }

    /// Begins a migration to the machine that was started for it.
    fn send(&mut self, pause: bool) -> Result<()> {
        let here = self.here.as_mut().expect("a machine was started");
        let there = self.there.as_mut().expect("a destination was started");
        here.memory.role = Role::Source;
        let name = &there.memory.machine;
        self.context.note(format!("migrate to {name}"));
        let socket = self.directory.path().join(format!("{name}.sock"));
        there.machine.receive(&socket)?;
        here.machine.migrate(&socket, pause)
    }

    /// Waits until the VMM has asked so often who wrote what.
    pub fn passes(&mut self, passes: u64) -> Result<()> {
        self.context.note(format!("{passes} passes of pre-copy"));
        self.migrating(&[Stage::PreCopy], |migration| migration.passes >= passes).map(drop)
    }

    /// As [`MachinePair::passes`], so often from now on.
    pub fn more_passes(&mut self, passes: u64) -> Result<()> {
        let now = self.here().migration()?.passes;
        self.passes(now + passes)
    }

    /// Cancels the migration. The machine goes on here.
    pub fn cancel(&mut self) -> Result<()> {
        self.context.note("cancel");
        self.here().cancel()?;
        self.stays(Stage::Cancelled)
    }

    /// Kills the machine that it migrates to. It goes on here.
    pub fn destination_dies(&mut self) -> Result<()> {
        self.kill_destination();
        self.stays(Stage::Failed)
    }

    /// Stops this machine, and lets the migration wait. It must have begun with a pause.
    pub fn pause(&mut self) -> Result<()> {
        use Stage::{Paused, PreCopy, StopCopy};
        self.context.note("let it go on to the switchover");
        self.here().end_pre_copy()?;
        self.migrating(&[PreCopy, StopCopy], |migration| migration.stage == Paused)?;
        self.quiesced().map(drop)
    }

    /// As [`MachinePair::destination_dies`], but this machine is stopped already, in a pause.
    pub fn destination_dies_in_pause(&mut self) -> Result<()> {
        use Stage::{Ending, Failed, Paused, PreCopy, StopCopy};
        self.kill_destination();
        self.here().go_on()?;
        self.migrating(&[Paused, PreCopy, StopCopy, Ending], |migration| {
            migration.stage == Failed
        })?;
        self.stays(Failed)
    }

    fn kill_destination(&mut self) {
        self.context.note("the destination dies");
        self.there.as_mut().expect("a migration has begun").machine.kill();
    }

    /// Waits for the end of a migration that can't succeed, and sees that the machine goes on here.
    fn stays(&mut self, end: Stage) -> Result<()> {
        use Stage::{Ending, PreCopy};
        self.migrating(&[PreCopy, Ending], |migration| migration.stage == end)?;
        self.there = None;
        self.runs_on()
    }

    /// Fails unless the machine runs, as it should after a migration that didn't succeed.
    fn runs_on(&mut self) -> Result<()> {
        ensure!(self.here().is_running()?, "the machine doesn't run, it should have gone on");
        self.written(1)
    }

    /// Lets the migration complete, and checks all of the machine's memory. Returns how many pages
    /// the generators have written from then until the devices were stopped.
    pub fn complete(&mut self) -> Result<u64> {
        self.complete_while(|_| Ok(()))
    }

    /// As [`MachinePair::complete`], while a device runs a command in the background, and then another one,
    /// each of which writes these pages: it is in the midst of one when the machine is stopped.
    pub fn complete_in_commands(&mut self, device: usize, pages: Range<u64>) -> Result<()> {
        self.begin_write(device, pages.clone())?;
        let commands = |pair: &mut Self| {
            let mut wait = pair.watch.wait("for the machine to be stopped");
            while pair.here().migration()?.stage == Stage::PreCopy {
                if pair.settle(device)? {
                    pair.begin_write(device, pages.clone())?;
                }
                wait.poll_after(SOON, || "it runs".into())?;
            }
            Ok(())
        };
        self.complete_while(commands).map(drop)
    }

    /// As [`MachinePair::complete`], and does something until the machine is stopped.
    fn complete_while(&mut self, act: impl FnOnce(&mut Self) -> Result<()>) -> Result<u64> {
        use Stage::{Completed, PreCopy, StopCopy};
        self.context.note("let it complete");
        let before = self.counters()?;
        self.here().end_pre_copy()?;
        act(self)?;
        let migration =
            self.migrating(&[PreCopy, StopCopy], |migration| migration.stage == Completed)?;
        self.arrived(migration, before.iter().sum())
    }

    /// Checks all of the memory of the machine, which has migrated. Returns how many pages more than
    /// `before` the generators have written.
    fn arrived(&mut self, migration: Migration, before: u64) -> Result<u64> {
        let counters = self.quiesced()?;
        for device in 0..self.layout.devices {
            // One that was written when the device was stopped already is not run here.
            self.settle(device)?;
        }
        let late = counters.iter().sum::<u64>() - before;
        self.sent = migration.sent;
        let summary = Summary { migration, pages: counters.iter().sum(), late }.to_string();
        self.watch.say(Event::Progress { text: summary })?;
        self.account(&counters);
        self.check_memory()?;
        let there = self.there.take().expect("a migration has begun");
        self.watch.arrived(|| there.machine.migration())?;
        if let Some(mut left) = self.here.replace(there) {
            self.left = left.says();
        }
        self.check_memory()?;
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

    /// Compares all of the memory of the machine that is here.
    fn check_memory(&self) -> Result<()> {
        let started = self.here.as_ref().zip(self.contents.as_ref());
        let (here, contents) = started.expect("a machine was started");
        contents.check(&here.memory)
    }

    /// Lets the machine run where it has arrived, and sees that its devices go on where they stopped.
    fn goes_on(&mut self) -> Result<()> {
        let here = self.here.as_ref().expect("a machine was started");
        self.context.note(format!("go on in {}", here.memory.machine));
        self.forget_late_commands()?;
        self.here().run()?;
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
        self.settled()?;
        self.written(1)?;
        self.stop()?;
        self.check_memory()
    }

    /// Forgets commands that were written after their device's state had been read: they didn't come with
    /// the machine. Those that did come wait for it to run.
    fn forget_late_commands(&mut self) -> Result<()> {
        for device in 0..self.layout.devices {
            if !self.here().device(device).outcome()?.is_in_progress() {
                self.known[device].writing = None;
            }
        }
        Ok(())
    }

    /// Waits for commands in the background.
    fn settled(&mut self) -> Result<()> {
        let mut wait = self.watch.wait("for a command to end");
        for device in 0..self.layout.devices {
            while !self.settle(device)? {
                wait.poll(|| "in progress".into())?;
            }
        }
        Ok(())
    }

    /// Stops all generators.
    pub fn stop(&mut self) -> Result<()> {
        for device in self.devices() {
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

    /// Waits until the migration is as it should be, as long as it is in one of these stages.
    fn migrating(&self, stages: &[Stage], done: impl Fn(&Migration) -> bool) -> Result<Migration> {
        self.watch.migrating(|| self.here().migration(), stages, done)
    }

    /// All devices of the machine.
    fn devices(&self) -> impl Iterator<Item = MdevDma<Registers<'_, V::Machine>>> {
        (0..self.layout.devices).map(|i| self.here().device(i))
    }

    /// What the counters of all generators say.
    fn counters(&self) -> Result<Vec<u64>> {
        self.devices().map(|device| Ok(device.generator()?.counter)).collect()
    }

    /// The devices whose generator was started.
    fn generators(&self) -> impl Iterator<Item = usize> {
        let known = self.known.iter().enumerate();
        known.filter_map(|(i, known)| known.generator.is_some().then_some(i))
    }

    /// Starts a machine, with memory of its own.
    fn machine(&mut self, role: Role, side: usize) -> Result<Started<V::Machine>> {
        let name = format!("machine-{}", self.machines);
        let path = self.file(&format!("{name}.ram"));
        let memory = Memory::new(&path, self.layout.memory, &name, role)?;
        let machine = self.machine_with(&name, role, side, &path);
        let removed = fs::remove_file(&path);
        let machine = machine?;
        removed.context("the machine's memory")?;
        Ok(Started { machine, memory })
    }

    /// Starts a machine of this name, whose memory this file is.
    fn machine_with(
        &mut self,
        name: &str,
        role: Role,
        side: usize,
        memory: &Path,
    ) -> Result<V::Machine> {
        let Layout { devices, .. } = self.layout;
        let mdevs = (0..devices).map(|i| self.vmm.device(self.context, side * devices + i));
        let mdevs = mdevs.collect::<Result<Vec<Mdev>>>()?;
        self.context.note(format!("start {name}"));
        self.machines += 1;
        let machine = self.vmm.start(&MachineConfig {
            name,
            role,
            layout: self.layout,
            mdevs: &mdevs,
            memory,
            directory: self.directory.path(),
        });
        machine.with_context(|| format!("{name} doesn't start"))
    }

    /// The machine that is migrated, where it is now.
    pub fn here(&self) -> &V::Machine {
        &self.here.as_ref().expect("a machine was started").machine
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

    /// What the VMMs have said.
    pub fn logs(&mut self) -> String {
        let now = self.here.iter_mut().chain(&mut self.there).map(Started::says);
        self.left.clone() + &now.collect::<String>()
    }
}

/// The bytes of pages.
pub fn bytes(pages: &Range<u64>) -> Range<u64> {
    pages.start * PAGE..pages.end * PAGE
}

/// How far a generator is, which must not have stopped.
fn running<M: Machine>(device: &MdevDma<Registers<'_, M>>) -> Result<GeneratorStatus> {
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
        let sent = migration.sent >> 10;
        let state = migration.device_state.unwrap_or(0);
        let downtime = migration.downtime.unwrap_or(0);
        write!(f, "{} passes, {sent} KiB sent, {state} bytes of devices, ", migration.passes)?;
        write!(f, "stopped for {downtime} ms, {pages} pages written, {late} of them in the end")
    }
}
