// SPDX-License-Identifier: GPL-2.0

//! How VFIO devices do their DMA.

use crate::bindings;
use kernel::prelude::*;

pub(super) mod private {
    /// What implements [`super::Iommu`] is in this abstraction.
    pub(crate) trait Sealed {}
}

/// How a device does its DMA: [`Emulated`](super::Emulated) or [`Backed`](super::Backed) by an
/// IOMMU.
pub(crate) trait Iommu: private::Sealed + 'static {
    /// What a device has for it, open or not.
    type State: Send + Sync;

    /// The members of `vfio_device_ops` that differ, but for `dma_unmap`.
    const OPS: bindings::vfio_device_ops;

    /// Whether the device can pin pages, and so has a `dma_unmap`.
    const PINS: bool;

    /// Registers a device of this kind with VFIO.
    const REGISTER: unsafe extern "C" fn(*mut bindings::vfio_device) -> c_int;

    /// The state of a device that hasn't been opened yet.
    fn new_state() -> impl PinInit<Self::State>;

    /// The user has unmapped `length` bytes at `iova`.
    fn unmapped(_state: &Self::State, _iova: u64, _length: u64) {}

    /// The device has been closed.
    fn closed(_state: &Self::State) {}
}
