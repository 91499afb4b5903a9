// SPDX-License-Identifier: GPL-2.0

//! What no driver may do, for tests of type1. This is no interface: leave it out of any kernel that
//! is used for something else.
//!
//! [`vfio_pin_pages()`](srctree/drivers/vfio/vfio_main.c) is documented for devices without an IOMMU
//! only, and all in-tree callers are such. But type1 serves every caller, and takes the first
//! success for a promise: the device's group writes only what it has pinned, and from then on only
//! that is reported as dirty. To test that, there has to be a device that makes the promise.

use super::{
    emulated::{PinState, Pinning, Pins},
    iommu::{private, Iommu},
    Backed, OpenDevice, Operations,
};
use crate::bindings;
use kernel::prelude::*;

/// As [`Backed`], but the device can pin pages nevertheless.
pub(crate) struct BackedThatPins;

impl private::Sealed for BackedThatPins {}

impl Pinning for BackedThatPins {}

impl Iommu for BackedThatPins {
    type State = PinState;

    const OPS: bindings::vfio_device_ops = Backed::OPS;
    const PINS: bool = true;
    const REGISTER: unsafe extern "C" fn(*mut bindings::vfio_device) -> c_int = Backed::REGISTER;

    fn new_state() -> impl PinInit<PinState> {
        // The kernel says of itself that it runs tests, as by `MODULE_INFO(test, "Y")`.
        // SAFETY: `add_taint()` accepts every taint, in every context.
        unsafe { bindings::add_taint(bindings::TAINT_TEST, bindings::lockdep_ok_LOCKDEP_STILL_OK) };
        PinState::new()
    }

    fn unmapped(state: &PinState, iova: u64, length: u64) {
        state.unmapped(iova, length);
    }

    fn closed(state: &PinState) {
        state.closed();
    }
}

impl<T: Operations<Iommu = BackedThatPins>> OpenDevice<T> {
    /// Locks the pins of a device that must not have any. With iommufd, pinning fails with
    /// `EINVAL`.
    ///
    /// # Safety
    ///
    /// - The kernel runs tests of VFIO, and nothing whose memory matters.
    /// - From the first pin on, the device writes to the user's memory only while the pages it
    ///   writes to are pinned through this; type1 doesn't report any others. What wrote them before
    ///   is for the caller to know.
    /// - The device does no DMA to a page when its last pin is removed. As `dma_unmap` removes pins
    ///   and waits for this lock, DMA is started and waited for with the lock held.
    pub(crate) unsafe fn pins_for_tests_only(&self) -> Pins<'_, T> {
        Pins::lock(self)
    }
}
