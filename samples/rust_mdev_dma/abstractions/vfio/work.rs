// SPDX-License-Identifier: GPL-2.0

//! Work of an open device, on a workqueue.
//!
//! The kernel crate's `workqueue` holds a reference to what is queued, so work may run after the
//! device has been closed. Here the work is embedded in the device and disabled while the device
//! isn't open, so a closed device does none.

use super::{Device, Operations};
use core::{marker::PhantomPinned, ptr::NonNull};
use kernel::{
    bindings, container_of,
    prelude::*,
    static_lock_class,
    sync::atomic::{Atomic, Relaxed},
    time::Jiffies,
    types::Opaque,
};

/// The work of a device.
///
/// # Invariants
///
/// - `self` is a field of `dev`.
/// - The work is initialised. It is enabled only while `dev` is open, and never runs while it is
///   disabled.
#[pin_data]
pub(super) struct Worker<T: Operations> {
    #[pin]
    work: Opaque<bindings::delayed_work>,
    dev: NonNull<Device<T>>,
    /// Whether the work should end early, because [`Self::abort`] or [`Self::disable`] waits for
    /// it.
    aborting: Atomic<bool>,
    #[pin]
    _pin: PhantomPinned,
}

impl<T: Operations> Worker<T> {
    /// The work of `dev`, disabled.
    ///
    /// # Safety
    ///
    /// What is initialised is a field of `dev`.
    pub(super) unsafe fn new(dev: NonNull<Device<T>>) -> impl PinInit<Self> {
        // INVARIANT: The caller promises that this is a field of `dev`; the work is disabled below.
        pin_init!(Self {
            work <- Opaque::ffi_init(|slot: *mut bindings::delayed_work| {
                // SAFETY: `slot` is valid for writes, and is the work of a `Worker<T>`, as
                // `run_callback` requires.
                unsafe {
                    bindings::init_work_with_key(
                        &raw mut (*slot).work,
                        Some(Self::run_callback),
                        false,
                        c"vfio::Worker".as_char_ptr(),
                        static_lock_class!().as_ptr(),
                    );
                }
                // SAFETY: As above; `INIT_DELAYED_WORK` initialises the timer like this.
                unsafe {
                    bindings::timer_init_key(
                        &raw mut (*slot).timer,
                        Some(bindings::delayed_work_timer_fn),
                        bindings::TIMER_IRQSAFE,
                        c"vfio::Worker timer".as_char_ptr(),
                        static_lock_class!().as_ptr(),
                    );
                }
                // SAFETY: The work is initialised.
                unsafe { bindings::disable_delayed_work(slot) };
            }),
            dev,
            aborting: Atomic::new(false),
            _pin: PhantomPinned,
        })
    }

    /// Enables the work: from now on it can be queued.
    ///
    /// # Safety
    ///
    /// The device is open, with `driver` initialised, and stays so until [`Self::disable`] has
    /// returned, which must be called exactly once for this call.
    pub(super) unsafe fn enable(&self) {
        // SAFETY: By the type invariant the work is initialised.
        // INVARIANT: As the caller promises.
        unsafe { bindings::enable_delayed_work(self.work.get()) };
    }

    /// Disables the work: cancels it, asks it to end early if it is running, and waits for it. From
    /// now on queueing it has no effect.
    pub(super) fn disable(&self) {
        self.aborting.store(true, Relaxed);
        // SAFETY: By the type invariant the work is initialised.
        unsafe { bindings::disable_delayed_work_sync(self.work.get()) };
        self.aborting.store(false, Relaxed);
    }

    /// Queues the work to run after `delay`; if it is queued already, only after the new delay.
    pub(super) fn queue(&self, delay: Jiffies) {
        // SAFETY: By the type invariant the work is initialised, and it never runs while `dev`
        // isn't open. The system workqueue always exists.
        unsafe {
            bindings::mod_delayed_work_on(
                bindings::wq_misc_consts_WORK_CPU_UNBOUND as c_int,
                bindings::system_dfl_long_wq,
                self.work.get(),
                delay,
            )
        };
    }

    /// Cancels the work, and waits for it if it is running.
    pub(super) fn stop(&self) {
        // SAFETY: By the type invariant the work is initialised.
        unsafe { bindings::cancel_delayed_work_sync(self.work.get()) };
    }

    /// As [`Self::stop`], and asks it to end early.
    pub(super) fn abort(&self) {
        self.aborting.store(true, Relaxed);
        self.stop();
        self.aborting.store(false, Relaxed);
    }

    pub(super) fn aborting(&self) -> bool {
        self.aborting.load(Relaxed)
    }

    /// # Safety
    ///
    /// Called by the workqueue only, with the work of a `Worker<T>`.
    unsafe extern "C" fn run_callback(work: *mut bindings::work_struct) {
        // SAFETY: `work` is the first field of a `delayed_work`, which is that of a `Worker<T>`.
        let this = unsafe {
            let work = container_of!(work, bindings::delayed_work, work);
            &*container_of!(Opaque::cast_from(work), Self, work)
        };

        // SAFETY: By the type invariant the work runs only while the device is open. The device
        // stays open meanwhile, because `disable()` waits for this.
        let dev = unsafe { Device::<T>::open_from_raw(this.dev.as_ptr().cast()) };
        // SAFETY: As above, `driver` is initialised.
        let driver = unsafe { dev.0.driver() };
        driver.work(dev);
    }
}
