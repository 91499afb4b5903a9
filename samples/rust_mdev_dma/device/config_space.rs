// SPDX-License-Identifier: GPL-2.0

//! PCI configuration space.

use super::registers::BAR_SIZE;
use crate::bindings::{RUST_MDEV_DMA_PCI_DEVICE_ID, RUST_MDEV_DMA_PCI_VENDOR_ID};
use kernel::bindings::{
    PCI_BASE_ADDRESS_0, PCI_CLASS_DEVICE, PCI_CLASS_SYSTEM_OTHER, PCI_COMMAND, PCI_COMMAND_MASTER,
    PCI_COMMAND_MEMORY, PCI_DEVICE_ID, PCI_INTERRUPT_LINE, PCI_SUBSYSTEM_ID,
    PCI_SUBSYSTEM_VENDOR_ID, PCI_VENDOR_ID,
};

/// Bytes of the configuration space of a conventional PCI function.
pub(super) const SIZE: usize = 256;

/// Configuration space: what it contains, and which bits of it can be written.
pub(super) struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
}

impl ConfigSpace {
    pub(super) fn new() -> Self {
        let mut this = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
        };
        let vendor = (RUST_MDEV_DMA_PCI_VENDOR_ID as u16).to_le_bytes();
        let device = (RUST_MDEV_DMA_PCI_DEVICE_ID as u16).to_le_bytes();
        set(&mut this.bytes, PCI_VENDOR_ID, vendor);
        set(&mut this.bytes, PCI_DEVICE_ID, device);
        set(&mut this.bytes, PCI_SUBSYSTEM_VENDOR_ID, vendor);
        set(&mut this.bytes, PCI_SUBSYSTEM_ID, device);
        let class = (PCI_CLASS_SYSTEM_OTHER as u16).to_le_bytes();
        set(&mut this.bytes, PCI_CLASS_DEVICE, class);

        let command = (PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER) as u16;
        set(&mut this.writable, PCI_COMMAND, command.to_le_bytes());
        // A 32-bit memory BAR; the bits that can't be written tell its size.
        let bar = !(BAR_SIZE as u32 - 1);
        set(&mut this.writable, PCI_BASE_ADDRESS_0, bar.to_le_bytes());
        set(&mut this.writable, PCI_INTERRUPT_LINE, [u8::MAX]);
        this
    }

    /// Reads the bytes at `offset`, as far as there are any.
    pub(super) fn read(&self, offset: usize, bytes: &mut [u8]) {
        for (byte, &value) in bytes.iter_mut().zip(self.bytes.iter().skip(offset)) {
            *byte = value;
        }
    }

    /// Writes those bits of `bytes`, at `offset`, that can be written.
    pub(super) fn write(&mut self, offset: usize, bytes: &[u8]) {
        let old = self.bytes.iter_mut().zip(&self.writable).skip(offset);
        for ((old, mask), new) in old.zip(bytes) {
            *old = *old & !mask | new & mask;
        }
    }
}

fn set<const N: usize>(bytes: &mut [u8; SIZE], register: u32, value: [u8; N]) {
    bytes[register as usize..][..N].copy_from_slice(&value);
}
