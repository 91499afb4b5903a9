// SPDX-License-Identifier: GPL-2.0-only

//! A `rust_mdev_dma` device as a virtual machine monitor has it that is built of rust-vmm's crates:
//! `vfio-ioctls` opens it, `vm-memory` is the memory it writes to.
//!
//! Everything else here drives the device through `vfio-client`; this is to see that it also works
//! for those who wrote their client for other devices.

#![deny(missing_docs)]

use mdev_dma::{MdevDma, RegisterAccess, Width};
use std::{path::Path, sync::Arc};
use vfio_bindings::bindings::vfio::{
    VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_MSI_IRQ_INDEX,
    vfio_device_mig_state_VFIO_DEVICE_STATE_RESUMING as RESUMING,
    vfio_device_mig_state_VFIO_DEVICE_STATE_RUNNING as RUNNING,
    vfio_device_mig_state_VFIO_DEVICE_STATE_STOP as STOP,
    vfio_device_mig_state_VFIO_DEVICE_STATE_STOP_COPY as STOP_COPY,
};
use vfio_ioctls::{VfioContainer, VfioDevice, VfioError};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// vfio-ioctls refused.
    #[error("vfio-ioctls: {0}")]
    Vfio(#[from] VfioError),
    /// There is no memory, or none there.
    #[error("vm-memory: {0}")]
    Memory(String),
    /// The device isn't what it should be.
    #[error(transparent)]
    Device(#[from] mdev_dma::Error),
    /// No eventfd can be made or read.
    #[error("eventfd: {0}")]
    Eventfd(#[from] std::io::Error),
}

/// A result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// An open device, and the memory that is mapped for it.
pub struct Vmm {
    // Dropped in this order.
    device: VfioDevice,
    container: Arc<VfioContainer>,
    memory: GuestMemoryMmap<()>,
}

impl Vmm {
    /// Opens the device with this directory in sysfs, and maps memory for it.
    ///
    /// `memory` has an IOVA and a length, both in bytes and multiples of the page size.
    pub fn open(sysfs: &Path, memory: &[(u64, usize)]) -> Result<MdevDma<Self>> {
        let container = Arc::new(VfioContainer::new(None)?);
        let device = VfioDevice::new(sysfs, container.clone(), true)?;
        let ranges: Vec<_> = memory.iter().map(|&(iova, n)| (GuestAddress(iova), n)).collect();
        let memory = GuestMemoryMmap::<()>::from_ranges(&ranges)
            .map_err(|error| Error::Memory(error.to_string()))?;
        // SAFETY: The memory was just made and nothing has a reference into it. It is unmapped from
        // the container before it is freed (see `drop`); until then `GuestMemoryMmap`, which
        // never makes references, is all that accesses it.
        unsafe { container.vfio_map_guest_memory(&memory)? };
        let device = MdevDma::new(Self { device, container, memory });
        device.check()?;
        Ok(device)
    }

    /// Vendor and device id, as configuration space has them.
    pub fn ids(&self) -> (u16, u16) {
        let mut bytes = [0; 4];
        self.device.region_read(VFIO_PCI_CONFIG_REGION_INDEX, &mut bytes, 0);
        let [a, b, c, d] = bytes;
        (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]))
    }

    /// Bytes of BAR 0.
    pub fn bar_size(&self) -> u64 {
        self.device.get_region_size(VFIO_PCI_BAR0_REGION_INDEX)
    }

    /// Has MSI vector 0 signal an eventfd, which is returned.
    pub fn enable_msi(&self) -> Result<EventFd> {
        let eventfd = EventFd::new(EFD_NONBLOCK)?;
        self.device.enable_irq(VFIO_PCI_MSI_IRQ_INDEX, vec![&eventfd])?;
        Ok(eventfd)
    }

    /// Has MSI signal nothing.
    pub fn disable_msi(&self) -> Result<()> {
        Ok(self.device.disable_irq(VFIO_PCI_MSI_IRQ_INDEX)?)
    }

    /// Resets the device.
    pub fn reset(&self) {
        self.device.reset();
    }

    /// Stops the device, and returns all of its state.
    pub fn save(&self) -> Result<Vec<u8>> {
        self.device.set_migration_state(STOP_COPY)?;
        let state = self.device.read_migration_data_to_end()?;
        self.device.set_migration_state(STOP)?;
        Ok(state)
    }

    /// Has the device take over the state of another one, and lets it run.
    pub fn restore(&self, state: &[u8]) -> Result<()> {
        self.device.set_migration_state(RESUMING)?;
        self.device.write_migration_data(state)?;
        self.device.set_migration_state(STOP)?;
        Ok(self.device.set_migration_state(RUNNING)?)
    }

    /// Copies from memory.
    pub fn copy_from_memory(&self, iova: u64, bytes: &mut [u8]) -> Result<()> {
        self.memory
            .read_slice(bytes, GuestAddress(iova))
            .map_err(|error| Error::Memory(error.to_string()))
    }

    /// Copies to memory.
    pub fn copy_to_memory(&self, iova: u64, bytes: &[u8]) -> Result<()> {
        self.memory
            .write_slice(bytes, GuestAddress(iova))
            .map_err(|error| Error::Memory(error.to_string()))
    }

    /// Unmaps all memory, after which the device can't access it.
    pub fn unmap(&self) -> Result<()> {
        Ok(self.container.vfio_unmap_guest_memory(&self.memory)?)
    }
}

impl RegisterAccess for Vmm {
    type Error = Error;

    // vfio-ioctls doesn't say whether an access succeeds. One that fails reads as what was there.
    fn read(&self, register: u32, width: Width) -> Result<u64> {
        let mut bytes = [0; 8];
        let part = &mut bytes[..width.bytes()];
        self.device.region_read(VFIO_PCI_BAR0_REGION_INDEX, part, register.into());
        Ok(u64::from_le_bytes(bytes))
    }

    fn write(&self, register: u32, width: Width, value: u64) -> Result<()> {
        let bytes = &value.to_le_bytes()[..width.bytes()];
        self.device.region_write(VFIO_PCI_BAR0_REGION_INDEX, bytes, register.into());
        Ok(())
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // Unmapped already, if this fails.
        let _ = self.unmap();
    }
}
