// SPDX-License-Identifier: GPL-2.0-only

use crate::{Error, Result, memory::Mapped};
use mdev_dma::{MdevDma, RegisterAccess, Width};
use std::{
    fs::File,
    path::Path,
    sync::{Arc, Mutex},
};
use vfio_bindings::bindings::vfio::VFIO_PCI_BAR0_REGION_INDEX;
use vfio_client::MigState;
use vfio_ioctls::{VfioContainer, VfioDevice};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice,
};

/// A range of a machine's memory.
pub struct Ram {
    /// Its guest address.
    pub address: u64,
    /// Bytes, whole pages.
    pub length: usize,
    /// The file that it is, from this byte on; anonymous memory if there is none.
    pub file: Option<(File, u64)>,
}

impl Ram {
    /// Anonymous memory.
    pub fn anonymous(address: u64, length: usize) -> Self {
        Self { address, length, file: None }
    }
}

/// A machine: its memory, and `rust_mdev_dma` devices that it is mapped for. A guest address is the IOVA.
pub struct Vmm {
    // Dropped in this order.
    devices: Vec<VfioDevice>,
    pub(crate) container: Arc<VfioContainer>,
    pub(crate) mapped: Mutex<Mapped>,
    pub(crate) memory: GuestMemoryMmap<()>,
}

impl Vmm {
    /// Opens the devices with these directories in sysfs, and maps memory for them, by ascending address.
    pub fn open<P: AsRef<Path>>(sysfs: &[P], ram: Vec<Ram>) -> Result<Self> {
        let container = Arc::new(VfioContainer::new(None)?);
        let open = |path: &P| VfioDevice::new(path.as_ref(), container.clone(), true);
        let devices = sysfs.iter().map(open).collect::<std::result::Result<_, _>>()?;
        let ranges = ram.into_iter().map(|Ram { address, length, file }| {
            let file = file.map(|(file, offset)| FileOffset::new(file, offset));
            (GuestAddress(address), length, file)
        });
        let memory = GuestMemoryMmap::from_ranges_with_files(ranges.collect::<Vec<_>>())
            .map_err(|error| Error::Memory(error.to_string()))?;
        let this = Self { devices, container, mapped: Mutex::default(), memory };
        this.regions().try_for_each(|region| this.show(region.start))?;
        (0..this.devices.len()).try_for_each(|i| this.device(i).check())?;
        Ok(this)
    }

    /// One of its devices.
    pub fn device(&self, number: usize) -> MdevDma<Registers<'_>> {
        MdevDma::new(Registers(&self.devices[number]))
    }

    /// Its devices, as `vfio-ioctls` has them.
    pub fn devices(&self) -> &[VfioDevice] {
        &self.devices
    }

    /// Copies from memory.
    pub fn read_memory(&self, address: u64, bytes: &mut [u8]) -> Result<()> {
        let read = self.memory.read_slice(bytes, GuestAddress(address));
        read.map_err(|error| Error::Memory(error.to_string()))
    }

    /// Lets the machine run that has come.
    pub fn run(&self) -> Result<()> {
        // A device that runs may write to another one's registers: none runs before all can take that.
        if self.is_p2p() {
            self.set_states(MigState::RunningP2p)?;
        }
        self.set_states(MigState::Running)
    }

    /// Whether all devices run.
    pub fn is_running(&self) -> Result<bool> {
        let states = self.devices.iter().map(VfioDevice::get_migration_state);
        let states = states.collect::<std::result::Result<Vec<_>, _>>()?;
        Ok(states.iter().all(|&state| state == MigState::Running as u32))
    }

    /// Brings all devices to a state, one after the other.
    pub(crate) fn set_states(&self, state: MigState) -> Result<()> {
        self.devices.iter().enumerate().try_for_each(|(device, vfio)| {
            let set = vfio.set_migration_state(state as u32);
            set.map_err(|source| Error::State { device, state, source })
        })
    }

    /// Some of its memory, for what reads or writes that as a whole.
    ///
    /// `GuestMemoryMmap` has functions for that as well, but `read_exact_volatile_from()` of vm-memory 0.18
    /// takes it for an error if a socket hasn't all of it yet. That of a slice waits.
    pub(crate) fn slice(&self, address: u64, length: u64) -> Result<VolatileSlice<'_>> {
        let slice = self.memory.get_slice(GuestAddress(address), length as usize);
        slice.map_err(|error| Error::Memory(error.to_string()))
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // If this fails, the container's end unmaps it.
        let _ = self.unmap();
    }
}

/// The registers of a device.
pub struct Registers<'a>(&'a VfioDevice);

impl RegisterAccess for Registers<'_> {
    type Error = Error;

    // vfio-ioctls doesn't say whether an access succeeds. One that fails reads as what was there.
    fn read(&self, register: u32, width: Width) -> Result<u64> {
        let mut bytes = [0; 8];
        let part = &mut bytes[..width.bytes()];
        self.0.region_read(VFIO_PCI_BAR0_REGION_INDEX, part, register.into());
        Ok(u64::from_le_bytes(bytes))
    }

    fn write(&self, register: u32, width: Width, value: u64) -> Result<()> {
        let bytes = &value.to_le_bytes()[..width.bytes()];
        self.0.region_write(VFIO_PCI_BAR0_REGION_INDEX, bytes, register.into());
        Ok(())
    }
}
