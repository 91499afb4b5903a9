// SPDX-License-Identifier: GPL-2.0-only

//! QEMU, as a VMM whose machines are migrated: without a guest, with `rust_mdev_dma` devices.

mod function;
mod iommu;
pub mod iommufd;
pub mod log_sync;
pub mod pci;
pub mod reported;

use crate::vmm::{Layout, Machine, MachineConfig, Migration, Role, Stage, Vmm};
use anyhow::{Result, anyhow};
use function::Function;
use harness::Skip;
use iommu::Iommu;
use mdev_dma::{RegisterAccess, Width};
use qemu_client::{Error, MigrationStatus, Monitor, Qemu, Qtest, RunState};
use std::{io::ErrorKind, path::Path};

/// The slot of a machine's first device.
pub const FIRST_SLOT: u8 = 4;

/// QEMU.
pub struct QemuVmm {
    /// The program.
    pub program: String,
}

impl Vmm for QemuVmm {
    type Machine = QemuMachine;

    const FAMILY: &'static str = "migrate";

    fn start(&self, config: &MachineConfig<'_>) -> Result<QemuMachine> {
        self.start_with(config, "", &[])
    }
}

impl QemuVmm {
    /// Starts a machine whose devices have this option, too, and which has these others.
    fn start_with(
        &self,
        config: &MachineConfig<'_>,
        option: &str,
        others: &[&str],
    ) -> Result<QemuMachine> {
        let mut arguments = arguments(&config.layout, config.memory);
        arguments.extend(others.iter().map(|&other| other.into()));
        for (i, mdev) in config.mdevs.iter().enumerate() {
            let path = mdev.path();
            let (path, slot) = (path.display(), FIRST_SLOT + i as u8);
            let device = format!("vfio-pci,id=dma{i},addr={slot:#x},sysfsdev={path}");
            let device = format!("{device},enable-migration=on{option}");
            arguments.extend(["-device".into(), device]);
        }
        if config.role == Role::Destination {
            arguments.extend(["-S", "-incoming", "defer"].map(Into::into));
        }
        let log = config.directory.join(format!("{}.log", config.name));
        let (qemu, qtest) = or_skip(Qemu::start(&self.program, &arguments, &log))?;
        let machine = QemuMachine { qemu, qtest, layout: config.layout };
        if config.role == Role::Source {
            machine.set_up()?;
        }
        Ok(machine)
    }
}

/// Says what QEMU is to be told of a machine, but for its devices.
fn arguments(layout: &Layout, memory: &Path) -> Vec<String> {
    let &Layout { memory: bytes, below_4g, iommu_tables, .. } = layout;
    let machine = format!("q35,memory-backend=ram,max-ram-below-4g={below_4g}");
    let path = memory.display();
    let backend = format!("memory-backend-file,id=ram,size={bytes},share=on,mem-path={path}");
    let memory = format!("{}M", bytes >> 20);
    // Of addresses, the usual CPU has too few for much memory.
    let cpu = "qemu64,phys-bits=48";
    let mut arguments = vec!["-machine", &machine, "-object", &backend, "-m", &memory, "-cpu", cpu];
    if iommu_tables > 0 {
        // Before the devices, which must find it.
        arguments.extend(["-device", "intel-iommu,caching-mode=on,intremap=off"]);
    }
    arguments.into_iter().map(Into::into).collect()
}

/// Where there is no QEMU, nothing of it can be tested, which is no failure.
pub fn or_skip<T>(started: qemu_client::Result<T>) -> Result<T> {
    started.map_err(|error| match &error {
        Error::Start { source, .. } if source.kind() == ErrorKind::NotFound => {
            anyhow!(Skip(format!("{error}; --qemu says where it is")))
        }
        _ => error.into(),
    })
}

/// A machine of QEMU.
pub struct QemuMachine {
    qemu: Qemu,
    qtest: Qtest,
    layout: Layout,
}

impl QemuMachine {
    /// The machine as its CPU sees it.
    pub fn qtest(&self) -> &Qtest {
        &self.qtest
    }

    /// QEMU's own commands.
    pub fn monitor(&self) -> &Monitor {
        self.qemu.monitor()
    }

    /// The IOMMU that is in front of its devices.
    pub fn iommu(&self) -> Iommu<'_> {
        Iommu::new(&self.qtest, self.layout.tables())
    }

    /// One of its devices, as a PCI function.
    pub fn function(&self, i: usize) -> Function<'_> {
        Function::new(&self.qtest, FIRST_SLOT + i as u8)
    }

    /// Sets up all of its devices, as firmware does.
    pub fn set_up(&self) -> Result<()> {
        (0..self.layout.devices).try_for_each(|i| self.function(i).set_up())
    }
}

impl Machine for QemuMachine {
    fn read(&self, device: usize, register: u32, width: Width) -> Result<u64> {
        Ok(self.function(device).registers().read(register, width)?)
    }

    fn write(&self, device: usize, register: u32, width: Width, value: u64) -> Result<()> {
        Ok(self.function(device).registers().write(register, width, value)?)
    }

    fn receive(&mut self, socket: &Path) -> Result<()> {
        receive(self.monitor(), socket)
    }

    fn migrate(&mut self, socket: &Path, pause: bool) -> Result<()> {
        self.monitor().pause_before_switchover(pause)?;
        migrate(self.monitor(), socket)
    }

    fn end_pre_copy(&self) -> Result<()> {
        Ok(self.monitor().end_pre_copy()?)
    }

    fn go_on(&self) -> Result<()> {
        Ok(self.monitor().migrate_continue()?)
    }

    fn cancel(&self) -> Result<()> {
        Ok(self.monitor().migrate_cancel()?)
    }

    fn migration(&self) -> Result<Migration> {
        migration(self.monitor())
    }

    fn run(&self) -> Result<()> {
        Ok(self.monitor().cont()?)
    }

    fn is_running(&self) -> Result<bool> {
        is_running(self.monitor())
    }

    fn kill(&mut self) {
        self.qemu.kill();
    }

    fn log(&mut self) -> String {
        self.qemu.log()
    }
}

/// Waits for a machine to come by this socket.
pub fn receive(monitor: &Monitor, socket: &Path) -> Result<()> {
    Ok(monitor.migrate_incoming(&uri(socket))?)
}

/// Begins to migrate by this socket; the migration stays in pre-copy.
pub fn migrate(monitor: &Monitor, socket: &Path) -> Result<()> {
    monitor.hold_pre_copy()?;
    Ok(monitor.migrate(&uri(socket))?)
}

fn uri(socket: &Path) -> String {
    format!("unix:{}", socket.display())
}

/// How the migration stands.
pub fn migration(monitor: &Monitor) -> Result<Migration> {
    let migration = monitor.migration()?;
    Ok(Migration {
        stage: match migration.status {
            MigrationStatus::None => Stage::None,
            MigrationStatus::Setup | MigrationStatus::Active => Stage::PreCopy,
            MigrationStatus::PreSwitchover => Stage::Paused,
            MigrationStatus::Device => Stage::StopCopy,
            MigrationStatus::Completed => Stage::Completed,
            MigrationStatus::Cancelling | MigrationStatus::Failing => Stage::Ending,
            MigrationStatus::Cancelled => Stage::Cancelled,
            MigrationStatus::Failed => Stage::Failed,
            MigrationStatus::Other => Stage::Other,
        },
        passes: migration.dirty_syncs,
        sent: migration.transferred,
        remaining: migration.remaining,
        downtime: migration.downtime,
        device_state: migration.device_state,
        error: migration.error,
    })
}

/// Whether the machine runs.
pub fn is_running(monitor: &Monitor) -> Result<bool> {
    Ok(monitor.run_state()? == RunState::running)
}
