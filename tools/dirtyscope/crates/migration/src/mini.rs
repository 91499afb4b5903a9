// SPDX-License-Identifier: GPL-2.0-only

//! The minimal VMM of `mini-vmm`, in this process: a thread of its own sends or receives a machine.

mod cases;

pub use cases::CASES;

use crate::vmm::{ABOVE_4G, Layout, Machine, MachineConfig, Migration, Stage, Vmm};
use anyhow::{Context as _, Result, ensure};
use mdev_dma::Width;
use mini_vmm::{Error, Policy, Progress, Ram};
use std::{
    fs::File,
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// How long it waits after a pass of pre-copy.
const INTERVAL: Duration = Duration::from_millis(20);

/// The minimal VMM.
pub struct MiniVmm;

impl Vmm for MiniVmm {
    type Machine = MiniMachine;

    const FAMILY: &'static str = "mini-vmm";

    fn start(&self, config: &MachineConfig<'_>) -> Result<MiniMachine> {
        let Layout { memory, below_4g, iommu_tables, .. } = config.layout;
        ensure!(iommu_tables == 0, "mini-vmm has no IOMMU");
        let low = memory.min(below_4g);
        let ram = [(0, 0, low), (ABOVE_4G, low, memory - low)].into_iter();
        let ram = ram.filter(|&(.., length)| length > 0).map(|(address, offset, length)| {
            let file = File::options().read(true).write(true).open(config.memory)?;
            Ok(Ram { address, length: length as usize, file: Some((file, offset)) })
        });
        let ram = ram.collect::<Result<_>>().context("the machine's memory")?;
        let sysfs: Vec<_> = config.mdevs.iter().map(|mdev| mdev.path()).collect();
        let vmm = Arc::new(mini_vmm::Vmm::open(&sysfs, ram)?);
        Ok(MiniMachine { vmm, migrations: Arc::default(), thread: None })
    }
}

/// A machine of the minimal VMM.
pub struct MiniMachine {
    vmm: Arc<mini_vmm::Vmm>,
    migrations: Arc<Migrations>,
    /// What sends or receives it, or has.
    thread: Option<JoinHandle<()>>,
}

impl MiniMachine {
    /// Begins a migration: a thread of its own does `work`.
    fn begin(
        &mut self,
        state: State,
        work: impl FnOnce(&mini_vmm::Vmm, &Migrations) -> mini_vmm::Result<Progress> + Send + 'static,
    ) {
        self.end();
        *self.migrations.lock() = state;
        let (vmm, migrations) = (self.vmm.clone(), self.migrations.clone());
        self.thread = Some(thread::spawn(move || {
            let result = work(&vmm, &migrations);
            // Once this is known, the devices may be opened by others.
            drop(vmm);
            migrations.ended(result);
        }));
    }

    /// Has pre-copy wait after the pass that goes on, or go on again: a machine that waits hasn't asked for
    /// dirty pages since that pass began.
    fn wait_after_pass(&self, wait: bool) {
        self.migrations.change(|state| state.wait = wait);
    }

    /// Hides the memory from the devices that begins at this address.
    fn hide(&self, address: u64) -> Result<()> {
        Ok(self.vmm.hide(address)?)
    }

    /// Shows it to them again.
    fn show(&self, address: u64) -> Result<()> {
        Ok(self.vmm.show(address)?)
    }

    fn waits(&self) -> bool {
        self.migrations.lock().waits
    }

    /// Waits for the migration to end, which it does without its connection.
    fn end(&mut self) {
        self.migrations.disconnect();
        if let Some(thread) = self.thread.take() {
            thread.join().expect("mini-vmm doesn't panic");
        }
    }
}

impl Machine for MiniMachine {
    fn read(&self, device: usize, register: u32, width: Width) -> Result<u64> {
        Ok(self.vmm.device(device).read(register, width)?)
    }

    fn write(&self, device: usize, register: u32, width: Width, value: u64) -> Result<()> {
        Ok(self.vmm.device(device).write(register, width, value)?)
    }

    fn receive(&mut self, socket: &Path) -> Result<()> {
        let listener = UnixListener::bind(socket).context("listen for a machine")?;
        let state = State { listens: Some(socket.into()), ..State::new(Stage::PreCopy) };
        self.begin(state, move |vmm, migrations| {
            let (connection, _) = listener.accept()?;
            migrations.connect(&connection)?;
            mini_vmm::receive(vmm, connection).map(|()| Progress::default())
        });
        Ok(())
    }

    fn migrate(&mut self, socket: &Path, pause: bool) -> Result<()> {
        let connection = UnixStream::connect(socket).context("connect to where a machine goes")?;
        let copy = connection.try_clone()?;
        let state = State { pause, connection: Some(copy), ..State::new(Stage::PreCopy) };
        self.begin(state, |vmm, mut migrations| mini_vmm::send(vmm, connection, &mut migrations));
        Ok(())
    }

    fn end_pre_copy(&self) -> Result<()> {
        self.migrations.change(|state| state.end_pre_copy = true);
        Ok(())
    }

    fn go_on(&self) -> Result<()> {
        self.migrations.change(|state| state.pause = false);
        Ok(())
    }

    fn cancel(&self) -> Result<()> {
        self.migrations.change(|state| state.cancel = true);
        Ok(())
    }

    fn migration(&self) -> Result<Migration> {
        Ok(self.migrations.lock().migration.clone())
    }

    fn run(&self) -> Result<()> {
        Ok(self.vmm.run()?)
    }

    fn is_running(&self) -> Result<bool> {
        Ok(self.vmm.is_running()?)
    }

    fn kill(&mut self) {
        self.end();
    }

    fn log(&mut self) -> String {
        self.migrations.lock().migration.error.clone().unwrap_or_default()
    }
}

impl Drop for MiniMachine {
    fn drop(&mut self) {
        self.end();
    }
}

/// How the migration stands that began last, and what is wanted of it.
#[derive(Default)]
struct Migrations {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    migration: Migration,
    end_pre_copy: bool,
    pause: bool,
    cancel: bool,
    /// Whether pre-copy is to wait, and whether it does.
    wait: bool,
    waits: bool,
    /// When that began by which the machine was stopped.
    stopped: Option<Instant>,
    /// Where it listens, until somebody comes.
    listens: Option<PathBuf>,
    connection: Option<UnixStream>,
    /// Whether there is to be no connection any more.
    disconnected: bool,
}

impl State {
    fn new(stage: Stage) -> Self {
        let migration = Migration {
            stage,
            passes: 0,
            sent: 0,
            remaining: 0,
            downtime: None,
            device_state: None,
            error: None,
        };
        Self {
            migration,
            end_pre_copy: false,
            pause: false,
            cancel: false,
            wait: false,
            waits: false,
            stopped: None,
            listens: None,
            connection: None,
            disconnected: false,
        }
    }

    fn show(&mut self, progress: &Progress) {
        let &Progress { passes, sent, last_pass, device_data } = progress;
        let migration = &mut self.migration;
        (migration.passes, migration.sent, migration.remaining) = (passes, sent, last_pass);
        migration.device_state = Some(device_data);
    }
}

impl Default for State {
    fn default() -> Self {
        Self::new(Stage::None)
    }
}

impl Migrations {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    /// Somebody has come.
    fn connect(&self, connection: &UnixStream) -> mini_vmm::Result<()> {
        let mut state = self.lock();
        if state.disconnected {
            return Err(Error::Cancelled);
        }
        state.listens = None;
        state.connection = Some(connection.try_clone()?);
        Ok(())
    }

    /// Has whoever waits for the other side, or for what is wanted, wait no longer.
    fn disconnect(&self) {
        self.change(|state| {
            (state.disconnected, state.cancel) = (true, true);
            if let Some(socket) = state.listens.take() {
                // This alone ends accept(). If it fails, somebody has come.
                let _ = UnixStream::connect(socket);
            }
            if let Some(connection) = state.connection.take() {
                // If it fails, the other side was faster.
                let _ = connection.shutdown(Shutdown::Both);
            }
        });
    }

    fn ended(&self, result: mini_vmm::Result<Progress>) {
        self.change(|state| {
            // Else the other side would wait for more.
            state.connection = None;
            match result {
                Ok(progress) => {
                    state.show(&progress);
                    state.migration.stage = Stage::Completed;
                    let downtime = state.stopped.map(|since| since.elapsed().as_millis() as u64);
                    state.migration.downtime = downtime;
                }
                Err(Error::Cancelled) => state.migration.stage = Stage::Cancelled,
                Err(error) => {
                    state.migration.stage = Stage::Failed;
                    state.migration.error = Some(error.to_string());
                }
            }
        });
    }
}

impl Policy for &Migrations {
    fn after_pass(&mut self, progress: &Progress) -> mini_vmm::Result<bool> {
        let mut state = self.lock();
        state.show(progress);
        // After the pass that is to be the last, too: what devices write then is in the last bitmap only.
        let stop = state.end_pre_copy;
        let waits = |state: &mut State| !state.cancel && (stop || !state.end_pre_copy);
        let waited = self.changed.wait_timeout_while(state, INTERVAL, waits);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.waits = state.wait;
        let waited = self.changed.wait_while(state, |state| state.wait && !state.cancel);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        state.waits = false;
        state.stopped = stop.then(Instant::now);
        if state.cancel { Err(Error::Cancelled) } else { Ok(stop) }
    }

    fn stopped(&mut self, progress: &Progress) -> mini_vmm::Result<()> {
        let mut state = self.lock();
        state.show(progress);
        state.migration.stage = Stage::Paused;
        let waits = |state: &mut State| state.pause && !state.cancel;
        let waited = self.changed.wait_while(state, waits);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        state.migration.stage = Stage::StopCopy;
        if state.cancel { Err(Error::Cancelled) } else { Ok(()) }
    }
}
