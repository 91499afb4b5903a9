// SPDX-License-Identifier: GPL-2.0

//! Coverage of work that a task's calls cause in other tasks.
//!
//! KCOV counts what one task runs. What a worker runs on its behalf counts if it says so, as vhost's
//! worker does. Without `CONFIG_KCOV` nothing of this remains.
//!
//! C header: [`include/linux/kcov.h`](srctree/include/linux/kcov.h)

#[cfg(CONFIG_KCOV)]
use crate::bindings;
#[cfg(CONFIG_KCOV)]
use kernel::sync::atomic::{Atomic, Relaxed};

/// The task whose coverage work counts for, by KCOV's handle; none to begin with.
///
/// # Examples
///
/// ```
/// fn ask(worker: &Worker) {
///     worker.handle.set_current();
///     worker.wake();
/// }
///
/// fn work(worker: &Worker) {
///     worker.handle.cover(|| worker.do_it());
/// }
/// ```
pub(crate) struct KcovHandle {
    #[cfg(CONFIG_KCOV)]
    handle: Atomic<u64>,
}

impl KcovHandle {
    /// No task's.
    pub(crate) const fn none() -> Self {
        Self {
            #[cfg(CONFIG_KCOV)]
            handle: Atomic::new(0),
        }
    }

    /// The current task's from now on, if it has a handle: workers have none.
    pub(crate) fn set_current(&self) {
        #[cfg(CONFIG_KCOV)]
        {
            // SAFETY: This can be called in any context.
            let handle = unsafe { bindings::kcov_common_handle() }.val;
            if handle != 0 {
                self.handle.store(handle, Relaxed);
            }
        }
    }

    /// Calls `work` in a worker, a task that isn't traced itself.
    pub(crate) fn cover<R>(&self, work: impl FnOnce() -> R) -> R {
        // SAFETY: A worker isn't traced itself, and sections don't nest: this is the only one.
        #[cfg(CONFIG_KCOV)]
        unsafe {
            bindings::kcov_remote_start(self.handle.load(Relaxed))
        };
        let result = work();
        // SAFETY: It ends the section that was begun above.
        #[cfg(CONFIG_KCOV)]
        unsafe {
            bindings::kcov_remote_stop()
        };
        result
    }
}
