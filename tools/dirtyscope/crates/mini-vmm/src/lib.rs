// SPDX-License-Identifier: GPL-2.0-only

//! A minimal virtual machine monitor (VMM): memory and VFIO devices, no CPU, and their live migration over a
//! Unix socket. It is for those who write a VMM to read, and to see that what `vfio.h` says of migration is
//! enough to migrate a device whose memory type1 tracks.
//!
//! [`Vmm`] is a machine, [`send`] migrates it, [`receive`] takes it over; the order in which these do things
//! is what a VMM must get right, and each says why. [`Vmm::hide`] is for memory that a device can't access any
//! more, in the midst of a migration, too, and [`Vmm::show`] for when it can again. The loop is that of cloud-hypervisor's migration
//! (`vmm/src/lib.rs` there, `do_memory_iterations()`), which asks the devices for the pages that they wrote
//! by DMA logging; here type1 is asked, which knows it of devices that log nothing.
//!
//! It is built of rust-vmm's crates: `vm-memory` is the memory, `vfio-ioctls` opens devices, maps memory for
//! them, and brings them from one migration state to another. `vfio-ioctls` 0.10 lacks one thing,
//! `VFIO_IOMMU_DIRTY_PAGES`: that is [`vfio_client::DirtyTracking`].
//!
//! What it doesn't have, and a VMM must add: CPUs and devices of its own, which write to memory as well, and
//! whose dirty pages (`KVM_GET_DIRTY_LOG`) belong into the same passes; the configuration that both sides must
//! agree on, to which belongs what is hidden from devices.

#![deny(missing_docs)]

mod destination;
mod memory;
mod source;
mod vmm;
mod wire;

pub use destination::receive;
pub use source::{Policy, Progress, send};
pub use vmm::{Ram, Registers, Vmm};

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `vfio-ioctls` was refused something.
    #[error("vfio-ioctls: {0}")]
    Vfio(#[from] vfio_ioctls::VfioError),
    /// A device can't be brought to a migration state.
    #[error("device {device} to {state}: {source}")]
    State {
        /// Which one.
        device: usize,
        /// Which state.
        state: vfio_client::MigState,
        /// Why.
        source: vfio_ioctls::VfioError,
    },
    /// Dirty pages can't be tracked.
    #[error(transparent)]
    Dirty(#[from] vfio_client::Error),
    /// There is no memory, or none there.
    #[error("guest memory: {0}")]
    Memory(String),
    /// The device isn't what it should be.
    #[error(transparent)]
    Device(#[from] mdev_dma::Error),
    /// This machine can't be migrated.
    #[error("can't be migrated: {0}")]
    Unable(String),
    /// The other side has ended, or can't be reached.
    #[error("connection: {0}")]
    Connection(#[from] std::io::Error),
    /// Memory can't be sent or received.
    #[error("guest memory: {0}")]
    Transfer(#[from] vm_memory::VolatileMemoryError),
    /// The other side has sent what makes no sense.
    #[error("the other side has sent {0}")]
    Protocol(String),
    /// The migration was cancelled.
    #[error("cancelled")]
    Cancelled,
}

/// A result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
