// SPDX-License-Identifier: GPL-2.0

//! Eventfds that the user signals to unmask INTx, in place of `VFIO_DEVICE_SET_IRQS`.
//!
//! C source: [`drivers/vfio/virqfd.c`](srctree/drivers/vfio/virqfd.c), built with
//! `CONFIG_VFIO_VIRQFD` only.

use super::{Device, Operations};
use crate::bindings;
use core::{
    cell::UnsafeCell,
    ptr::{null_mut, NonNull},
};
use kernel::prelude::*;

/// Unmasks the INTx of a device when an eventfd is signalled.
///
/// # Invariants
///
/// - `self` is a field of `dev`, and so isn't moved.
/// - `virqfd` is only accessed by VFIO, under `virqfd_lock`.
#[cfg_attr(not(CONFIG_VFIO_VIRQFD), expect(dead_code))]
pub(super) struct Unmasker<T: Operations> {
    virqfd: UnsafeCell<*mut bindings::virqfd>,
    dev: NonNull<Device<T>>,
}

impl<T: Operations> Unmasker<T> {
    /// The unmasker of `dev`, disabled.
    ///
    /// # Safety
    ///
    /// The caller makes it a field of `dev`, and calls [`Self::disable`] before it is dropped.
    pub(super) unsafe fn new(dev: NonNull<Device<T>>) -> Self {
        // INVARIANT: The caller makes this a field of `dev`. `virqfd` is null.
        Self {
            virqfd: UnsafeCell::new(null_mut()),
            dev,
        }
    }

    /// Unmasks INTx whenever eventfd `fd` of the current process is signalled. Fails with `EBADF`
    /// or `EINVAL` if `fd` isn't an eventfd, `EBUSY` if another is enabled, `ENOTTY` without
    /// `CONFIG_VFIO_VIRQFD`.
    #[cfg(CONFIG_VFIO_VIRQFD)]
    pub(super) fn enable(&self, fd: i32) -> Result {
        // CAST: The device's `vdev` is at offset 0.
        // SAFETY: `fd` may be any number. By the type invariants `virqfd` isn't moved. The device
        // is valid until `disable()`, which is called before `self` is dropped, see `Self::new`.
        kernel::error::to_result(unsafe {
            bindings::vfio_virqfd_enable(
                self.dev.as_ptr().cast(),
                None,
                Some(Self::unmask_callback),
                null_mut(),
                self.virqfd.get(),
                fd,
            )
        })
    }

    /// Fails with `ENOTTY`.
    #[cfg(not(CONFIG_VFIO_VIRQFD))]
    pub(super) fn enable(&self, _fd: i32) -> Result {
        Err(ENOTTY)
    }

    /// Removes the eventfd, and waits for an `unmask_callback` in progress: `interrupts` must not
    /// be held, as the callback takes it.
    pub(super) fn disable(&self) {
        // SAFETY: By the type invariants, `virqfd` is null or set by `vfio_virqfd_enable()`.
        #[cfg(CONFIG_VFIO_VIRQFD)]
        unsafe {
            bindings::vfio_virqfd_disable(self.virqfd.get())
        };
    }

    /// # Safety
    ///
    /// `opaque` is the device that [`Self::enable`] passed, which isn't released before this
    /// returns.
    #[cfg(CONFIG_VFIO_VIRQFD)]
    unsafe extern "C" fn unmask_callback(opaque: *mut c_void, _data: *mut c_void) {
        // SAFETY: The caller promises that this is the device, and that it is valid.
        let dev = unsafe { Device::<T>::from_raw(opaque.cast()) };
        dev.base.interrupts.lock().unmask_intx();
    }
}
