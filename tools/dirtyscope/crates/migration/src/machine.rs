// SPDX-License-Identifier: GPL-2.0-only

//! A machine to migrate: QEMU without a guest, with `rust_mdev_dma` devices.

use crate::function::Function;
use anyhow::{Context as _, Result};
use mdev_dma::{MdevDma, sysfs::Mdev};
use qemu_client::{Bar, Monitor, Qemu, Qtest};
use std::{
    fs::{self, File, OpenOptions},
    path::Path,
};

/// Bytes of a machine's memory.
pub const RAM: u64 = 32 << 20;

/// The slot of a machine's first device.
const FIRST_SLOT: u8 = 4;

/// Whether a machine runs, or waits for one to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Source,
    Destination,
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
    devices: u8,
}

impl Machine {
    /// Starts it, with these devices. A destination stays stopped when the other machine has come.
    pub fn start(
        program: &str,
        directory: &Path,
        name: &str,
        mdevs: &[Mdev],
        role: Role,
    ) -> Result<Self> {
        let path = directory.join(format!("{name}.ram"));
        let mut open = OpenOptions::new();
        let ram = open.read(true).write(true).create_new(true).open(&path);
        let ram = ram.with_context(|| path.display().to_string())?;
        ram.set_len(RAM).context("the machine's memory")?;
        let backend =
            format!("memory-backend-file,id=ram,size={RAM},share=on,mem-path={}", path.display());
        let mut arguments: Vec<String> =
            ["-machine", "q35,memory-backend=ram", "-object", &backend].map(Into::into).into();
        arguments.extend(["-m".into(), format!("{}M", RAM >> 20)]);
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
        Ok(Self { name: name.into(), role, qemu, qtest, ram, devices: mdevs.len() as u8 })
    }

    /// The machine as its CPU sees it.
    pub fn qtest(&self) -> &Qtest {
        &self.qtest
    }

    /// QEMU's own commands.
    pub fn monitor(&self) -> &Monitor {
        self.qemu.monitor()
    }

    /// The file that is its memory: what is at an address is at this offset.
    pub fn ram(&self) -> &File {
        &self.ram
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
        (0..usize::from(self.devices)).map(|i| self.device(i))
    }

    /// Sets up all of its devices.
    pub fn set_up(&self) -> Result<()> {
        (0..usize::from(self.devices)).try_for_each(|i| self.function(i).set_up())
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
