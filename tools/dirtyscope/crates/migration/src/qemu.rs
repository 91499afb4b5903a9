// SPDX-License-Identifier: GPL-2.0-only

//! A machine to migrate: QEMU without a guest, with `rust_mdev_dma` devices.

mod function;
mod iommu;
pub mod pci;
pub mod reported;

use crate::contents::Piece;
use anyhow::{Context as _, Result};
use function::Function;
use iommu::Iommu;
use mdev_dma::{MdevDma, PAGE, sysfs::Mdev};
use qemu_client::{Bar, Monitor, Qemu, Qtest};
use std::{
    fs::{self, File, OpenOptions},
    path::Path,
};

/// Bytes of a machine's memory.
pub const RAM: u64 = 32 << 20;

/// Where memory goes on that isn't below 4 GiB.
pub const ABOVE_4G: u64 = 4 << 30;

/// The slot of a machine's first device.
pub const FIRST_SLOT: u8 = 4;

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
    /// So many of them are below 4 GiB at most; the others are from [`ABOVE_4G`] on.
    pub below_4g: u64,
    /// Whether the devices have an IOMMU in front of them.
    pub iommu: bool,
}

impl Layout {
    /// A usual machine with so many devices.
    pub const fn of_devices(devices: usize) -> Self {
        Self { devices, memory: RAM, below_4g: ABOVE_4G, iommu: false }
    }

    /// What QEMU is to be told of it, but for its devices.
    fn arguments(&self, ram: &Path) -> Vec<String> {
        let Self { memory, below_4g, iommu, .. } = self;
        let machine = format!("q35,memory-backend=ram,max-ram-below-4g={below_4g}");
        let ram = ram.display();
        let backend = format!("memory-backend-file,id=ram,size={memory},share=on,mem-path={ram}");
        let memory = format!("{}M", memory >> 20);
        // Of addresses, the usual CPU has too few for much memory.
        let cpu = "qemu64,phys-bits=48";
        let mut arguments =
            vec!["-machine", &machine, "-object", &backend, "-m", &memory, "-cpu", cpu];
        if *iommu {
            // Before the devices, which must find it.
            arguments.extend(["-device", "intel-iommu,caching-mode=on,intremap=off"]);
        }
        arguments.into_iter().map(Into::into).collect()
    }
}

/// A machine. Its memory is a file of its own, which this program reads and nobody else shares.
pub struct Machine {
    /// What failures call it.
    pub name: String,
    /// What it is in the migration that began last.
    pub role: Role,
    qemu: Qemu,
    qtest: Qtest,
    ram: File,
    layout: Layout,
}

impl Machine {
    /// Starts it, with as many devices as its layout has. A destination stays stopped when the other
    /// machine has come.
    pub fn start(
        program: &str,
        directory: &Path,
        name: &str,
        layout: Layout,
        mdevs: &[Mdev],
        role: Role,
    ) -> Result<Self> {
        let path = directory.join(format!("{name}.ram"));
        let mut open = OpenOptions::new();
        let ram = open.read(true).write(true).create_new(true).open(&path);
        let ram = ram.with_context(|| path.display().to_string())?;
        ram.set_len(layout.memory).context("the machine's memory")?;
        let mut arguments = layout.arguments(&path);
        for (i, mdev) in mdevs.iter().enumerate() {
            let path = mdev.path();
            let (path, slot) = (path.display(), FIRST_SLOT + i as u8);
            let device =
                format!("vfio-pci,id=dma{i},addr={slot:#x},sysfsdev={path},enable-migration=on");
            arguments.extend(["-device".into(), device]);
        }
        if role == Role::Destination {
            arguments.extend(["-S", "-incoming", "defer"].map(Into::into));
        }
        let started = Qemu::start(program, &arguments, &directory.join(format!("{name}.log")));
        let removed = fs::remove_file(&path);
        let (qemu, qtest) = started.with_context(|| format!("{name} doesn't start"))?;
        removed.context("the machine's memory")?;
        Ok(Self { name: name.into(), role, qemu, qtest, ram, layout })
    }

    /// The machine as its CPU sees it.
    pub fn qtest(&self) -> &Qtest {
        &self.qtest
    }

    /// QEMU's own commands.
    pub fn monitor(&self) -> &Monitor {
        self.qemu.monitor()
    }

    /// The file that is its memory.
    pub fn ram(&self) -> &File {
        &self.ram
    }

    /// The parts of it that are filled and compared: all, but for the tables of an IOMMU.
    pub fn pieces(&self) -> Vec<Piece> {
        let Layout { below_4g, iommu, .. } = self.layout;
        let low = if iommu { 0..self.tables() } else { 0..below_4g.min(RAM) };
        let offset = below_4g.min(RAM);
        let high = Piece { addresses: ABOVE_4G..ABOVE_4G + RAM - offset, offset };
        let pieces = [Piece { addresses: low, offset: 0 }, high].into_iter();
        pieces.filter(|piece| !piece.addresses.is_empty()).collect()
    }

    /// The IOMMU that is in front of its devices.
    pub fn iommu(&self) -> Iommu<'_> {
        Iommu::new(&self.qtest, self.tables())
    }

    /// Where the tables of its IOMMU are: at the end of memory below 4 GiB.
    fn tables(&self) -> u64 {
        self.layout.below_4g.min(RAM) - Iommu::TABLES * PAGE
    }

    /// One of its devices, as a PCI function.
    pub fn function(&self, i: usize) -> Function<'_> {
        Function::new(&self.qtest, FIRST_SLOT + i as u8)
    }

    /// One of its devices, which was set up.
    pub fn device(&self, i: usize) -> MdevDma<Bar<'_>> {
        self.function(i).device()
    }

    /// All of its devices.
    pub fn devices(&self) -> impl Iterator<Item = MdevDma<Bar<'_>>> {
        (0..self.layout.devices).map(|i| self.device(i))
    }

    /// Sets up all of its devices.
    pub fn set_up(&self) -> Result<()> {
        (0..self.layout.devices).try_for_each(|i| self.function(i).set_up())
    }

    /// Kills it.
    pub fn kill(&mut self) {
        self.qemu.kill();
    }

    /// What QEMU has said.
    pub fn log(&mut self) -> String {
        self.qemu.log()
    }
}
