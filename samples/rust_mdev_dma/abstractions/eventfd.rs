// SPDX-License-Identifier: GPL-2.0

//! Eventfds that the kernel signals.
//!
//! C header: [`include/linux/eventfd.h`](srctree/include/linux/eventfd.h)

use core::ptr::NonNull;
use kernel::{bindings, error::from_err_ptr, prelude::*};

/// A reference to a user's eventfd.
///
/// # Examples
///
/// ```
/// fn notify_once(fd: i32) -> Result {
///     EventFd::from_fd(fd)?.signal();
///     Ok(())
/// }
/// ```
///
/// # Invariants
///
/// `self.0` is valid, and this owns a reference to it.
pub(crate) struct EventFd(NonNull<bindings::eventfd_ctx>);

// SAFETY: An eventfd context is reference counted and does its own locking.
unsafe impl Send for EventFd {}

// SAFETY: A shared reference gives access to `signal()` only, which any thread may call.
unsafe impl Sync for EventFd {}

impl EventFd {
    /// Takes a reference to the eventfd that `fd` refers to in the current process. Fails with
    /// `EBADF` if `fd` isn't open, `EINVAL` if it isn't an eventfd.
    pub(crate) fn from_fd(fd: i32) -> Result<Self> {
        // SAFETY: `eventfd_ctx_fdget()` accepts any number.
        let ctx = from_err_ptr(unsafe { bindings::eventfd_ctx_fdget(fd) })?;

        // INVARIANT: `eventfd_ctx_fdget()` has taken a reference for us.
        Ok(Self(NonNull::new(ctx).ok_or(EBADF)?))
    }

    /// Adds 1 to the counter, which wakes its waiters.
    pub(crate) fn signal(&self) {
        // SAFETY: By the type invariant the context is valid.
        unsafe { bindings::eventfd_signal_mask(self.0.as_ptr(), 0) };
    }
}

impl Drop for EventFd {
    fn drop(&mut self) {
        // SAFETY: By the type invariant this owns a reference.
        unsafe { bindings::eventfd_ctx_put(self.0.as_ptr()) };
    }
}
