// SPDX-License-Identifier: GPL-2.0-only

//! The device in a machine, as the driver in a guest would see it.

use anyhow::{Result, bail, ensure};
use mdev_dma::{IN_PROGRESS, Op, Program, Progress, uapi};
use qemu_client::{Qtest, Width};

// PCI configuration space, as in `include/uapi/linux/pci_regs.h`.
const PCI_VENDOR_ID: u8 = 0x00;
const PCI_COMMAND: u8 = 0x04;
const PCI_COMMAND_MEMORY: u32 = 0x2;
const PCI_COMMAND_MASTER: u32 = 0x4;
const PCI_BASE_ADDRESS_0: u8 = 0x10;
const PCI_CAPABILITY_LIST: u8 = 0x34;
const PCI_CAP_ID_MSI: u32 = 0x05;
const PCI_MSI_FLAGS: u8 = 2;
const PCI_MSI_FLAGS_ENABLE: u32 = 0x1;
const PCI_MSI_FLAGS_QMASK: u32 = 0xe;
const PCI_MSI_FLAGS_QSIZE_SHIFT: u32 = 4;
const PCI_MSI_ADDRESS_LO: u8 = 4;
const PCI_MSI_ADDRESS_HI: u8 = 8;
const PCI_MSI_DATA_64: u8 = 12;

/// Where our BARs are put: behind all memory and below what a PC has itself. A slot has 64 KiB.
const BARS: u64 = 0xe000_0000;

/// The device in slot `slot` of a machine's PCI bus 0.
pub struct Device<'a> {
    qtest: &'a Qtest,
    slot: u8,
}

impl<'a> Device<'a> {
    /// The device in this slot.
    pub fn new(qtest: &'a Qtest, slot: u8) -> Self {
        Self { qtest, slot }
    }

    fn bar(&self) -> u64 {
        BARS + u64::from(self.slot) * 0x1_0000
    }

    /// Does what firmware does: finds the device, gives its BAR an address, enables memory accesses
    /// and DMA.
    pub fn set_up(&self) -> Result<()> {
        self.check_config()?;
        let write = |offset, value| self.qtest.config_write(self.slot, offset, Width::Long, value);
        write(PCI_BASE_ADDRESS_0, !0)?;
        let mask = self.qtest.config_read(self.slot, PCI_BASE_ADDRESS_0, Width::Long)?;
        let size = !(mask & !0xf) + 1;
        ensure!(size == uapi::RUST_MDEV_DMA_BAR_SIZE, "BAR 0 has {size:#x} bytes");
        write(PCI_BASE_ADDRESS_0, self.bar() as u32)?;
        write(PCI_COMMAND, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER)?;
        self.check()
    }

    /// Sees that there is such a device. Doesn't touch its registers.
    pub fn check_config(&self) -> Result<()> {
        let id = self.qtest.config_read(self.slot, PCI_VENDOR_ID, Width::Long)?;
        let ours = (uapi::RUST_MDEV_DMA_PCI_DEVICE_ID << 16) | uapi::RUST_MDEV_DMA_PCI_VENDOR_ID;
        ensure!(id == ours, "slot {} of the PCI bus has {id:08x}, not {ours:08x}", self.slot);
        Ok(())
    }

    /// Sees that the device is where [`Device::set_up`] has put it.
    pub fn check(&self) -> Result<()> {
        let magic = self.read_long(uapi::RUST_MDEV_DMA_REG_MAGIC)?;
        ensure!(magic == uapi::RUST_MDEV_DMA_MAGIC, "the device's MAGIC is {magic:#x}");
        Ok(())
    }

    /// The 256 bytes of configuration space.
    pub fn config_space(&self) -> Result<Vec<u8>> {
        let bytes = (0..=u8::MAX).map(|at| self.qtest.config_read(self.slot, at, Width::Byte));
        Ok(bytes.map(|byte| Ok(byte? as u8)).collect::<qemu_client::Result<_>>()?)
    }

    /// Has the device send all its messages: `data`, with the vector's number in it, to `address`.
    pub fn enable_msi(&self, address: u32, data: u16) -> Result<()> {
        let msi = self.capability(PCI_CAP_ID_MSI)?;
        let write =
            |offset, width, value| self.qtest.config_write(self.slot, msi + offset, width, value);
        let flags = self.qtest.config_read(self.slot, msi + PCI_MSI_FLAGS, Width::Word)?;
        write(PCI_MSI_ADDRESS_LO, Width::Long, address)?;
        write(PCI_MSI_ADDRESS_HI, Width::Long, 0)?;
        write(PCI_MSI_DATA_64, Width::Word, data.into())?;
        let all = (flags & PCI_MSI_FLAGS_QMASK) >> 1 << PCI_MSI_FLAGS_QSIZE_SHIFT;
        write(PCI_MSI_FLAGS, Width::Word, flags | all | PCI_MSI_FLAGS_ENABLE)?;
        Ok(())
    }

    /// Where a capability is in configuration space.
    fn capability(&self, id: u32) -> Result<u8> {
        let mut at = self.qtest.config_read(self.slot, PCI_CAPABILITY_LIST, Width::Byte)? as u8;
        while at != 0 {
            let header = self.qtest.config_read(self.slot, at, Width::Word)?;
            if header & 0xff == id {
                return Ok(at);
            }
            at = (header >> 8) as u8;
        }
        bail!("the device has no capability {id:#x}")
    }

    /// Says which events interrupt: `RUST_MDEV_DMA_IRQ_*`.
    pub fn enable_interrupts(&self, events: u32) -> Result<()> {
        self.write_long(uapi::RUST_MDEV_DMA_REG_IRQ_ENABLE, events)
    }

    /// Events that have happened.
    pub fn events(&self) -> Result<u32> {
        self.read_long(uapi::RUST_MDEV_DMA_REG_IRQ_STATUS)
    }

    /// Forgets events.
    pub fn clear_events(&self, events: u32) -> Result<()> {
        self.write_long(uapi::RUST_MDEV_DMA_REG_IRQ_STATUS, events)
    }

    /// Begins a command, which then runs in the background.
    pub fn begin(&self, op: Op, iova: u64, length: u64, seed: u64) -> Result<()> {
        self.write_quad(uapi::RUST_MDEV_DMA_REG_IOVA, iova)?;
        self.write_quad(uapi::RUST_MDEV_DMA_REG_LENGTH, length)?;
        self.write_quad(uapi::RUST_MDEV_DMA_REG_SEED, seed)?;
        let command = op as u32 | uapi::RUST_MDEV_DMA_COMMAND_BACKGROUND;
        self.write_long(uapi::RUST_MDEV_DMA_REG_COMMAND, command)
    }

    /// How the last command ended: 0 or an errno, `EINPROGRESS` if it hasn't.
    pub fn status(&self) -> Result<u32> {
        self.read_long(uapi::RUST_MDEV_DMA_REG_STATUS)
    }

    /// Runs a command to its end. It has to succeed.
    pub fn run(&self, op: Op, iova: u64, length: u64, seed: u64) -> Result<()> {
        self.write_quad(uapi::RUST_MDEV_DMA_REG_IOVA, iova)?;
        self.write_quad(uapi::RUST_MDEV_DMA_REG_LENGTH, length)?;
        self.write_quad(uapi::RUST_MDEV_DMA_REG_SEED, seed)?;
        self.write_long(uapi::RUST_MDEV_DMA_REG_COMMAND, op as u32)?;
        let status = self.status()?;
        ensure!(status == 0, "{op:?} {iova:#x}+{length:#x} ended with errno {status}");
        Ok(())
    }

    /// Pins that the device holds.
    pub fn pins(&self) -> Result<u64> {
        self.read_quad(uapi::RUST_MDEV_DMA_REG_PINS)
    }

    /// Starts the generator.
    pub fn start(&self, program: &Program) -> Result<()> {
        self.write_quad(uapi::RUST_MDEV_DMA_REG_GEN_IOVA, program.iova)?;
        self.write_quad(uapi::RUST_MDEV_DMA_REG_GEN_LENGTH, program.length)?;
        self.write_quad(uapi::RUST_MDEV_DMA_REG_GEN_SEED, program.seed)?;
        self.write_quad(uapi::RUST_MDEV_DMA_REG_GEN_LIMIT, program.limit)?;
        self.write_long(uapi::RUST_MDEV_DMA_REG_GEN_RATE, program.rate)?;
        self.write_long(uapi::RUST_MDEV_DMA_REG_GEN_MODE, program.mode)?;
        self.control(uapi::RUST_MDEV_DMA_GEN_START)
    }

    /// Writes one of `enum rust_mdev_dma_gen_control`.
    pub fn control(&self, control: u32) -> Result<()> {
        self.write_long(uapi::RUST_MDEV_DMA_REG_GEN_CONTROL, control)
    }

    /// What the generator's registers say it is to do.
    pub fn program(&self) -> Result<Program> {
        Ok(Program {
            iova: self.read_quad(uapi::RUST_MDEV_DMA_REG_GEN_IOVA)?,
            length: self.read_quad(uapi::RUST_MDEV_DMA_REG_GEN_LENGTH)?,
            seed: self.read_quad(uapi::RUST_MDEV_DMA_REG_GEN_SEED)?,
            limit: self.read_quad(uapi::RUST_MDEV_DMA_REG_GEN_LIMIT)?,
            rate: self.read_long(uapi::RUST_MDEV_DMA_REG_GEN_RATE)?,
            mode: self.read_long(uapi::RUST_MDEV_DMA_REG_GEN_MODE)?,
        })
    }

    /// How far the generator is. While it runs, it may be further by now.
    pub fn generator(&self) -> Result<Progress> {
        Ok(Progress {
            status: self.read_long(uapi::RUST_MDEV_DMA_REG_GEN_STATUS)?,
            counter: self.read_quad(uapi::RUST_MDEV_DMA_REG_GEN_COUNTER)?,
        })
    }

    /// As [`Device::generator`], and fails if it has stopped.
    pub fn running_generator(&self) -> Result<Progress> {
        let progress = self.generator()?;
        let status = progress.status;
        ensure!(status == IN_PROGRESS, "the generator has stopped, errno {status}: {progress:?}");
        Ok(progress)
    }

    fn read_long(&self, register: u32) -> Result<u32> {
        Ok(self.qtest.read(self.bar() + u64::from(register), Width::Long)? as u32)
    }

    fn read_quad(&self, register: u32) -> Result<u64> {
        Ok(self.qtest.read(self.bar() + u64::from(register), Width::Quad)?)
    }

    fn write_long(&self, register: u32, value: u32) -> Result<()> {
        Ok(self.qtest.write(self.bar() + u64::from(register), Width::Long, value.into())?)
    }

    fn write_quad(&self, register: u32, value: u64) -> Result<()> {
        Ok(self.qtest.write(self.bar() + u64::from(register), Width::Quad, value)?)
    }
}
