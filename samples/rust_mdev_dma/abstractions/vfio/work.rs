// SPDX-License-Identifier: GPL-2.0

//! Work of an open device that a kernel thread does.
//!
//! The kernel crate's `workqueue` counts references to what is queued, so work may outlive whatever
//! it was queued for. A device that is closed must be at rest: its work is embedded in it, and
//! disabled while it isn't open.

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
/// - The work is initialised. It is enabled at most while `dev` is open, and never runs while it is
///   disabled.
#[pin_data]
pub(super) struct Worker<T: Operations> {
    #[pin]
    work: Opaque<bindings::delayed_work>,
    dev: NonNull<Device<T>>,
    /// Whether somebody waits for the work to end early.
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
        // INVARIANT: The caller promises that this is a field of `dev`; it is disabled below.
        pin_init!(Self {
            work <- Opaque::ffi_init(|slot: *mut bindings::delayed_work| {
                // SAFETY: `slot` is valid for writes, and `run_callback` is the function of the work
                // of a `Worker<T>`.
                unsafe {
                    bindings::init_work_with_key(
                        &raw mut (*slot).work,
                        Some(Self::run_callback),
                        false,
                        c"vfio::Worker".as_char_ptr(),
                        static_lock_class!().as_ptr(),
                    );
                }
                // SAFETY: As above; this is how `INIT_DELAYED_WORK` initialises the timer.
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

    /// Lets the work run, when it is queued from now on.
    ///
    /// # Safety
    ///
    /// The device is open, with its state initialised, and stays so until [`Self::disable`] was
    /// called; which is called exactly once for this call.
    pub(super) unsafe fn enable(&self) {
        // SAFETY: By the type invariant the work is initialised.
        // INVARIANT: As the caller promises.
        unsafe { bindings::enable_delayed_work(self.work.get()) };
    }

    /// Takes the work from the queue, asks it to end early and waits until it has. To queue it has
    /// no effect from now on.
    pub(super) fn disable(&self) {
        self.aborting.store(true, Relaxed);
        // SAFETY: By the type invariant the work is initialised.
        unsafe { bindings::disable_delayed_work_sync(self.work.get()) };
        self.aborting.store(false, Relaxed);
    }

    /// Has the work run after `delay`, instead of when it would have run.
    pub(super) fn queue(&self, delay: Jiffies) {
        // SAFETY: By the type invariant the work is initialised. That it is valid when it runs is
        // what `run_callback` relies on; the queue is always there.
        unsafe {
            bindings::mod_delayed_work_on(
                bindings::wq_misc_consts_WORK_CPU_UNBOUND as c_int,
                bindings::system_dfl_long_wq,
                self.work.get(),
                delay,
            )
        };
    }

    /// Takes the work from the queue, and waits until it has ended if it runs.
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

        // SAFETY: By the type invariant: the work runs, so it is enabled, so the device is open, and
        // stays so because `disable()` waits for the end of this.
        let dev = unsafe { Device::<T>::open_from_raw(this.dev.as_ptr().cast()) };
        // SAFETY: As above, the state is initialised.
        let driver = unsafe { dev.0.driver() };
        driver.work(dev);
    }
}
