// SPDX-License-Identifier: GPL-2.0

//! Eventfds that the user signals, to unmask INTx without a system call to the device.
//!
//! C source: [`drivers/vfio/virqfd.c`](srctree/drivers/vfio/virqfd.c), which is only part of kernels
//! with `CONFIG_VFIO_VIRQFD`.

use super::{Device, Operations};
use crate::bindings;
use core::{
    cell::UnsafeCell,
    ptr::{null_mut, NonNull},
};
use kernel::prelude::*;

/// What unmasks the INTx of a device.
///
/// # Invariants
///
/// - `self` is a field of `dev`, and so isn't moved.
/// - `virqfd` is only accessed by VFIO, which has a lock for it.
#[cfg_attr(not(CONFIG_VFIO_VIRQFD), expect(dead_code))]
pub(super) struct Unmasker<T: Operations> {
    virqfd: UnsafeCell<*mut bindings::virqfd>,
    dev: NonNull<Device<T>>,
}

impl<T: Operations> Unmasker<T> {
    /// That of `dev`, without an eventfd.
    ///
    /// # Safety
    ///
    /// It becomes a field of `dev`. [`Self::disable`] is called before it is dropped.
    pub(super) unsafe fn new(dev: NonNull<Device<T>>) -> Self {
        // INVARIANT: As the caller promises.
        Self {
            virqfd: UnsafeCell::new(null_mut()),
            dev,
        }
    }

    /// From now on, INTx is unmasked when eventfd `fd` of the current process is signalled. Fails with
    /// `EBADF` or `EINVAL` if it is no eventfd, `EBUSY` if there is one, `ENOTTY` if the kernel can't.
    #[cfg(CONFIG_VFIO_VIRQFD)]
    pub(super) fn enable(&self, fd: i32) -> Result {
        // SAFETY: Any number may be asked for. By the type invariants `virqfd` stays where it is, and
        // `unmask_callback` may have the device until `disable()`, which whoever made `self` has
        // promised to call.
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

    /// Refuses, as the kernel can't.
    #[cfg(not(CONFIG_VFIO_VIRQFD))]
    pub(super) fn enable(&self, _fd: i32) -> Result {
        Err(ENOTTY)
    }

    /// Nothing unmasks INTx from now on, but the user's system calls. Waits for what does: the
    /// device's interrupts must not be locked.
    pub(super) fn disable(&self) {
        // SAFETY: By the type invariants; `enable()` alone has put something there.
        #[cfg(CONFIG_VFIO_VIRQFD)]
        unsafe {
            bindings::vfio_virqfd_disable(self.virqfd.get())
        };
    }

    /// # Safety
    ///
    /// Called by VFIO only, by a kernel thread, with the device that [`Self::enable`] passed.
    #[cfg(CONFIG_VFIO_VIRQFD)]
    unsafe extern "C" fn unmask_callback(opaque: *mut c_void, _data: *mut c_void) {
        // SAFETY: The device is there at least until `disable()`, which waits for this.
        let dev = unsafe { Device::<T>::from_raw(opaque.cast()) };
        dev.base.interrupts.lock().unmask_intx();
    }
}
