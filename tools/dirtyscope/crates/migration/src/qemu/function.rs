// SPDX-License-Identifier: GPL-2.0-only

//! The device in a machine as firmware and the PCI core of a guest see it. Its registers are
//! [`MdevDma`]'s business.

use anyhow::{Result, bail, ensure};
use mdev_dma::{MdevDma, Width, uapi};
use qemu_client::{Bar, Qtest};

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

/// The function in slot `slot` of a machine's PCI bus 0.
pub struct Function<'a> {
    qtest: &'a Qtest,
    slot: u8,
}

impl<'a> Function<'a> {
    /// The function in this slot.
    pub fn new(qtest: &'a Qtest, slot: u8) -> Self {
        Self { qtest, slot }
    }

    /// The device's registers, where [`Function::set_up`] has put them.
    pub fn registers(&self) -> Bar<'a> {
        self.qtest.bar(self.bar())
    }

    fn bar(&self) -> u64 {
        BARS + u64::from(self.slot) * 0x1_0000
    }

    /// Does what firmware does: finds the device, gives its BAR an address, enables memory accesses
    /// and DMA.
    pub fn set_up(&self) -> Result<()> {
        self.check_ids()?;
        let write = |offset, value| self.qtest.config_write(self.slot, offset, Width::Long, value);
        write(PCI_BASE_ADDRESS_0, !0)?;
        let mask = self.qtest.config_read(self.slot, PCI_BASE_ADDRESS_0, Width::Long)?;
        let size = !(mask & !0xf) + 1;
        ensure!(size == uapi::RUST_MDEV_DMA_BAR_SIZE, "BAR 0 has {size:#x} bytes");
        write(PCI_BASE_ADDRESS_0, self.bar() as u32)?;
        write(PCI_COMMAND, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER)?;
        Ok(MdevDma::new(self.registers()).check()?)
    }

    /// Fails unless it is ours. Doesn't touch its registers.
    pub fn check_ids(&self) -> Result<()> {
        let id = self.qtest.config_read(self.slot, PCI_VENDOR_ID, Width::Long)?;
        let ours = (uapi::RUST_MDEV_DMA_PCI_DEVICE_ID << 16) | uapi::RUST_MDEV_DMA_PCI_VENDOR_ID;
        ensure!(id == ours, "slot {} of the PCI bus has {id:08x}, not {ours:08x}", self.slot);
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
}
