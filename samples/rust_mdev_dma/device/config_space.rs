// SPDX-License-Identifier: GPL-2.0

//! PCI configuration space.

#![expect(
    clippy::indexing_slicing,
    reason = "offsets are of registers, which are constants"
)]

use super::registers::BAR_SIZE;
use crate::bindings::{
    RUST_MDEV_DMA_MSI_VECTORS, RUST_MDEV_DMA_PCI_DEVICE_ID, RUST_MDEV_DMA_PCI_VENDOR_ID,
};
use kernel::bindings::{
    PCI_BASE_ADDRESS_0, PCI_CAPABILITY_LIST, PCI_CAP_ID_MSI, PCI_CLASS_DEVICE,
    PCI_CLASS_SYSTEM_OTHER, PCI_COMMAND, PCI_COMMAND_INTX_DISABLE, PCI_COMMAND_MASTER,
    PCI_COMMAND_MEMORY, PCI_DEVICE_ID, PCI_INTERRUPT_LINE, PCI_INTERRUPT_PIN, PCI_MSI_ADDRESS_LO,
    PCI_MSI_DATA_64, PCI_MSI_FLAGS, PCI_MSI_FLAGS_64BIT, PCI_MSI_FLAGS_ENABLE, PCI_MSI_FLAGS_QMASK,
    PCI_MSI_FLAGS_QSIZE, PCI_STATUS, PCI_STATUS_CAP_LIST, PCI_STATUS_INTERRUPT, PCI_SUBSYSTEM_ID,
    PCI_SUBSYSTEM_VENDOR_ID, PCI_VENDOR_ID,
};

/// Size of the configuration space of a conventional PCI function.
pub(super) const SIZE: usize = 256;

/// Number of vectors of the MSI capability.
pub(super) const MSI_VECTORS: usize = RUST_MDEV_DMA_MSI_VECTORS as usize;

/// Offset of the MSI capability, which is the only capability.
const MSI: u32 = 0x40;

/// Configuration space: its contents, and a mask of its writable bits.
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
        set_u16(&mut this.bytes, PCI_VENDOR_ID, RUST_MDEV_DMA_PCI_VENDOR_ID);
        set_u16(&mut this.bytes, PCI_DEVICE_ID, RUST_MDEV_DMA_PCI_DEVICE_ID);
        set_u16(
            &mut this.bytes,
            PCI_SUBSYSTEM_VENDOR_ID,
            RUST_MDEV_DMA_PCI_VENDOR_ID,
        );
        set_u16(
            &mut this.bytes,
            PCI_SUBSYSTEM_ID,
            RUST_MDEV_DMA_PCI_DEVICE_ID,
        );
        set_u16(&mut this.bytes, PCI_CLASS_DEVICE, PCI_CLASS_SYSTEM_OTHER);

        let command = PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER | PCI_COMMAND_INTX_DISABLE;
        set_u16(&mut this.writable, PCI_COMMAND, command);
        // A 32-bit memory BAR; its read-only address bits give its size.
        let bar = (BAR_SIZE as u32).wrapping_neg();
        set(&mut this.writable, PCI_BASE_ADDRESS_0, bar.to_le_bytes());
        set(&mut this.writable, PCI_INTERRUPT_LINE, [u8::MAX]);
        set(&mut this.bytes, PCI_INTERRUPT_PIN, [1]);

        set_u16(&mut this.bytes, PCI_STATUS, PCI_STATUS_CAP_LIST);
        set(&mut this.bytes, PCI_CAPABILITY_LIST, [MSI as u8]);
        this.add_msi();
        this
    }

    /// Configuration space restored from migration data: takes the writable bits of `bytes`.
    pub(super) fn from_bytes(bytes: &[u8; SIZE]) -> Self {
        let mut this = Self::new();
        this.write(0, bytes);
        this
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn add_msi(&mut self) {
        // Bits 1 to 3 are the binary logarithm of the number of vectors.
        let vectors = MSI_VECTORS.ilog2() << PCI_MSI_FLAGS_QMASK.trailing_zeros();
        let flags = PCI_MSI_FLAGS_64BIT | vectors;
        set(&mut self.bytes, MSI, [PCI_CAP_ID_MSI as u8, 0]);
        set_u16(&mut self.bytes, MSI + PCI_MSI_FLAGS, flags);

        let flags = PCI_MSI_FLAGS_ENABLE | PCI_MSI_FLAGS_QSIZE;
        // The message address is dword aligned.
        let address = !3u64;
        set_u16(&mut self.writable, MSI + PCI_MSI_FLAGS, flags);
        set(
            &mut self.writable,
            MSI + PCI_MSI_ADDRESS_LO,
            address.to_le_bytes(),
        );
        set_u16(&mut self.writable, MSI + PCI_MSI_DATA_64, u32::MAX);
    }

    /// Whether `PCI_COMMAND_INTX_DISABLE` is set.
    pub(super) fn intx_disabled(&self) -> bool {
        const COMMAND: usize = PCI_COMMAND as usize;

        let command = [self.bytes[COMMAND], self.bytes[COMMAND + 1]];
        u32::from(u16::from_le_bytes(command)) & PCI_COMMAND_INTX_DISABLE != 0
    }

    /// Sets the Interrupt Status bit.
    pub(super) fn set_interrupt_status(&mut self, pending: bool) {
        let status = &mut self.bytes[PCI_STATUS as usize];
        *status &= !(PCI_STATUS_INTERRUPT as u8);
        if pending {
            *status |= PCI_STATUS_INTERRUPT as u8;
        }
    }

    /// Reads the bytes at `offset`, up to the end of configuration space.
    pub(super) fn read(&self, offset: usize, bytes: &mut [u8]) {
        for (byte, &value) in bytes.iter_mut().zip(self.bytes.iter().skip(offset)) {
            *byte = value;
        }
    }

    /// Writes the writable bits of `bytes` at `offset`.
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

fn set_u16(bytes: &mut [u8; SIZE], register: u32, value: u32) {
    set(bytes, register, (value as u16).to_le_bytes());
}

#[cfg(kunit_suites)]
#[kernel::macros::kunit_tests(rust_mdev_dma_config_space)]
mod tests {
    use super::*;

    fn at<const N: usize>(space: &ConfigSpace, offset: u32) -> [u8; N] {
        let mut bytes = [0; N];
        space.read(offset as usize, &mut bytes);
        bytes
    }

    #[test]
    fn the_bar_tells_its_size() {
        let mut space = ConfigSpace::new();
        space.write(PCI_BASE_ADDRESS_0 as usize, &[0xff; 4]);
        let bar = u32::from_le_bytes(at(&space, PCI_BASE_ADDRESS_0));
        assert_eq!(!bar + 1, BAR_SIZE as u32);
    }

    #[test]
    fn only_writable_bits_change() {
        let mut space = ConfigSpace::new();
        let ids: [u8; 4] = at(&space, PCI_VENDOR_ID);
        space.write(0, &[0xff; SIZE]);
        assert_eq!(at(&space, PCI_VENDOR_ID), ids);
        assert_eq!(at(&space, MSI), [PCI_CAP_ID_MSI as u8, 0]);
        assert!(space.intx_disabled());
        let again = ConfigSpace::from_bytes(&space.bytes);
        assert_eq!(again.bytes, space.bytes);
        space.write(0, &[0; SIZE]);
        assert_eq!(space.bytes, ConfigSpace::new().bytes);
    }

    #[test]
    fn nothing_is_behind_the_end() {
        let mut space = ConfigSpace::new();
        space.write(SIZE - 1, &[0xff; 4]);
        let mut bytes = [7; 3];
        space.read(SIZE - 1, &mut bytes);
        assert_eq!(bytes, [0, 7, 7]);
        space.read(SIZE + 9, &mut bytes);
        assert_eq!(bytes, [0, 7, 7]);
    }

    #[test]
    fn interrupt_status_is_one_bit() {
        let mut space = ConfigSpace::new();
        let before: [u8; 2] = at(&space, PCI_STATUS);
        space.set_interrupt_status(true);
        let after: [u8; 2] = at(&space, PCI_STATUS);
        assert_eq!(after[0] ^ before[0], PCI_STATUS_INTERRUPT as u8);
        space.set_interrupt_status(false);
        assert_eq!(at(&space, PCI_STATUS), before);
    }
}
