// SPDX-License-Identifier: GPL-2.0

//! Work that doesn't outlive what it works on.
//!
//! The kernel crate's `workqueue` holds a reference to what is queued, so work may run long after
//! its user has gone. Here the work is enabled for as long as what it works on exists, and what is
//! queued is waited for before that ends.
//!
//! C header: [`include/linux/workqueue.h`](srctree/include/linux/workqueue.h)

use super::{
    kcov::KcovHandle,
    task::{self, Killable},
};
use core::{cell::UnsafeCell, marker::PhantomPinned, ptr::NonNull};
use kernel::{
    bindings, container_of, new_mutex,
    prelude::*,
    static_lock_class,
    sync::{
        atomic::{Atomic, Relaxed},
        Mutex,
    },
    time::{
        delay::fsleep, msecs_to_jiffies, Delta, Instant, Jiffies, Monotonic, NSEC_PER_MSEC,
        NSEC_PER_SEC,
    },
    types::Opaque,
};

/// What a [`ScopedWork`] works on.
pub(crate) trait WorkItem: Sync {
    /// Does the work, in a workqueue. It isn't reentrant.
    fn run(&self);
}

/// Has work rest for as long as it has run, so that it takes at most half of the time of a CPU: a worker
/// isn't in the cgroup of the process that it works for, whose limits don't apply to it.
///
/// Time in which the work sleeps counts as well: the kernel tells modules no other.
struct Rest {
    /// What was owed at `since`, in ns.
    owed: i64,
    since: Instant<Monotonic>,
}

impl Rest {
    /// Less is put off until there is more of it: a delay is a number of whole jiffies.
    const SHORTEST: i64 = 10 * NSEC_PER_MSEC;

    /// No more is owed: the work may have slept.
    const LONGEST: i64 = NSEC_PER_SEC;

    fn new() -> Self {
        Self {
            owed: 0,
            since: Instant::now(),
        }
    }

    /// What is owed now, if the work has been `running` or has rested since the last change.
    fn owed(&self, running: bool) -> i64 {
        let elapsed = self.since.elapsed().as_nanos();
        let owed = if running {
            self.owed.saturating_add(elapsed)
        } else {
            self.owed.saturating_sub(elapsed)
        };
        owed.clamp(0, Self::LONGEST)
    }

    /// The work, which has been `running` or has rested, changes to the other.
    fn change(&mut self, running: bool) {
        self.owed = self.owed(running);
        self.since = Instant::now();
    }

    /// The time until the work may start.
    fn delay(&self, running: bool) -> Jiffies {
        match self.owed(running) {
            ..Self::SHORTEST => 0,
            // CAST: At most a second.
            owed => msecs_to_jiffies((owed / NSEC_PER_MSEC) as u32),
        }
    }
}

/// Protected by the mutex of a [`ScopedWork`].
struct State {
    /// The worker that runs the work.
    running: Option<Killable>,
    /// The work isn't to start.
    stopped: bool,
    rest: Rest,
}

impl State {
    fn new() -> Self {
        Self {
            running: None,
            stopped: false,
            rest: Rest::new(),
        }
    }

    fn set_running(&mut self, running: Option<Killable>) {
        self.rest.change(self.running.is_some());
        self.running = running;
    }
}

/// The time between two looks at work that is waited for.
const POLL: Delta = Delta::from_micros(50);

/// Work that doesn't run and doesn't start, until this is dropped. What was queued is cancelled, and
/// so is what is queued meanwhile.
pub(crate) struct Stopped<'a, W: WorkItem>(&'a ScopedWork<W>);

impl<W: WorkItem> Drop for Stopped<'_, W> {
    fn drop(&mut self) {
        self.0.aborting.store(false, Relaxed);
        self.0.state.lock().stopped = false;
    }
}

/// Delayed work on an item that exists only some of the time.
///
/// # Invariants
///
/// - The work is initialised, and never runs while it is disabled.
/// - `item` is written only while the work is disabled. While it is enabled, `item` points to a
///   valid `W`.
///
/// # Examples
///
/// ```
/// struct Link { /* ... */ }
///
/// impl WorkItem for Link {
///     fn run(&self) { /* retrain */ }
/// }
///
/// fn while_up(work: Pin<&ScopedWork<Link>>, link: &Link) {
///     // SAFETY: The work is disabled, and disabled again before `link` ends.
///     unsafe { work.enable(link.into()) };
///     work.queue(msecs_to_jiffies(100));
///     // ...
///     drop(work.stop());
///     work.disable();
/// }
/// ```
#[pin_data]
pub(crate) struct ScopedWork<W: WorkItem> {
    #[pin]
    work: Opaque<bindings::delayed_work>,
    item: UnsafeCell<NonNull<W>>,
    /// Whether the work should end early.
    aborting: Atomic<bool>,
    /// # Locking
    ///
    /// A leaf, but for the locks of signals.
    #[pin]
    state: Mutex<State>,
    /// Of who queued it last.
    kcov: KcovHandle,
    #[pin]
    _pin: PhantomPinned,
}

// SAFETY: `work` may be used on any thread, and `item` is only a pointer to what is `Sync`.
unsafe impl<W: WorkItem> Send for ScopedWork<W> {}

// SAFETY: The workqueue locks `work`. By the type invariants `item` is written only while nothing
// reads it: see `Self::enable`.
unsafe impl<W: WorkItem> Sync for ScopedWork<W> {}

impl<W: WorkItem> ScopedWork<W> {
    /// Work that is disabled.
    pub(crate) fn new() -> impl PinInit<Self> {
        // INVARIANT: The work is initialised and disabled here.
        pin_init!(Self {
            work <- Opaque::ffi_init(|slot: *mut bindings::delayed_work| {
                // SAFETY: `slot` is valid for writes, and is the work of a `ScopedWork<W>`, as
                // `run_callback` requires.
                unsafe {
                    bindings::init_work_with_key(
                        &raw mut (*slot).work,
                        Some(Self::run_callback),
                        false,
                        c"ScopedWork".as_char_ptr(),
                        static_lock_class!().as_ptr(),
                    );
                }
                // SAFETY: `slot` is valid for writes; `INIT_DELAYED_WORK` initialises the timer like
                // this.
                unsafe {
                    bindings::timer_init_key(
                        &raw mut (*slot).timer,
                        Some(bindings::delayed_work_timer_fn),
                        bindings::TIMER_IRQSAFE,
                        c"ScopedWork timer".as_char_ptr(),
                        static_lock_class!().as_ptr(),
                    );
                }
                // SAFETY: The work was just initialised, and nothing else refers to it.
                unsafe { bindings::disable_delayed_work(slot) };
            }),
            item: UnsafeCell::new(NonNull::dangling()),
            aborting: Atomic::new(false),
            state <- new_mutex!(State::new(), "ScopedWork::state"),
            kcov: KcovHandle::none(),
            _pin: PhantomPinned,
        })
    }

    /// Enables the work: from now on it can be queued, to work on `item`.
    ///
    /// # Safety
    ///
    /// - The work is disabled, and no other thread enables it at the same time.
    /// - `item` is valid until [`Self::disable`] has returned, which is called exactly once for
    ///   this call.
    pub(crate) unsafe fn enable(&self, item: NonNull<W>) {
        // SAFETY: The caller promises that the work is disabled, so it doesn't run, and that this
        // is the only such call: nothing else accesses `item`.
        unsafe { *self.item.get() = item };
        // SAFETY: By the type invariant the work is initialised.
        // INVARIANT: The caller promises that `item` is valid while the work is enabled.
        unsafe { bindings::enable_delayed_work(self.work.get()) };
    }

    /// Disables the work: cancels it, asks it to end early if it is running, and waits for it. From
    /// now on queueing it has no effect.
    ///
    /// Must not be called with a lock held that the work takes.
    pub(crate) fn disable(&self) {
        let _stopped = self.abort();
        // SAFETY: By the type invariant the work is initialised.
        unsafe { bindings::disable_delayed_work_sync(self.work.get()) };
    }

    /// Queues the work to run after `delay`, and when it has rested for as long as it has run; if it
    /// is queued already, only after the new delay.
    pub(crate) fn queue(&self, delay: Jiffies) {
        self.kcov.set_current();
        let rest = {
            let state = self.state.lock();
            state.rest.delay(state.running.is_some())
        };
        let delay = delay.max(rest);
        // SAFETY: By the type invariant the work is initialised, and it never runs while it is
        // disabled. The system workqueue always exists.
        unsafe {
            bindings::mod_delayed_work_on(
                bindings::wq_misc_consts_WORK_CPU_UNBOUND as c_int,
                bindings::system_dfl_long_wq,
                self.work.get(),
                delay,
            )
        };
    }

    /// Cancels the work, and waits for it if it is running; if the caller is killed, it has it end
    /// early. It doesn't start again until what this returns is dropped.
    ///
    /// Must not be called with a lock held that the work takes, nor by two threads at once.
    pub(crate) fn stop(&self) -> Stopped<'_, W> {
        self.state.lock().stopped = true;
        // What runs may wait for the caller's process, which then has to be killable.
        while self.state.lock().running.is_some() {
            if !self.aborting() && task::killed() {
                self.end_early();
            }
            fsleep(POLL);
        }
        // SAFETY: By the type invariant the work is initialised.
        unsafe { bindings::cancel_delayed_work_sync(self.work.get()) };
        Stopped(self)
    }

    /// As [`Self::stop`], and has it end early.
    pub(crate) fn abort(&self) -> Stopped<'_, W> {
        self.end_early();
        self.stop()
    }

    /// Has the work end early: [`Self::aborting`] returns true, and a page fault that waits for
    /// memory to be served fails.
    fn end_early(&self) {
        let mut state = self.state.lock();
        state.stopped = true;
        self.aborting.store(true, Relaxed);
        if let Some(running) = &mut state.running {
            running.kill();
        }
    }

    /// Whether the work should end early.
    pub(crate) fn aborting(&self) -> bool {
        self.aborting.load(Relaxed)
    }

    /// # Safety
    ///
    /// `work` is the work of a `ScopedWork<W>` that is enabled.
    unsafe extern "C" fn run_callback(work: *mut bindings::work_struct) {
        // SAFETY: The caller promises that `work` is the first field of the `delayed_work` of a
        // `ScopedWork<W>`, which is valid as the work runs.
        let this = unsafe {
            let work = container_of!(work, bindings::delayed_work, work);
            &*container_of!(Opaque::cast_from(work), Self, work)
        };

        {
            let mut state = this.state.lock();
            if state.stopped {
                return;
            }
            // SAFETY: This is a worker, which nobody else sends signals. It is dropped below, before
            // the worker returns to its queue.
            state.set_running(Some(unsafe { Killable::current() }));
        }

        // SAFETY: By the type invariants `item` isn't written and points to a valid `W`, as the
        // work is enabled. Both stay so while it runs, because `disable()` waits for this.
        let item = unsafe { (*this.item.get()).as_ref() };
        this.kcov.cover(|| item.run());
        this.state.lock().set_running(None);
    }
}

#[cfg(kunit_suites)]
#[kunit_tests(rust_mdev_dma_rest)]
mod tests {
    use super::*;

    const MS: i64 = NSEC_PER_MSEC;

    /// What owes `owed` since `ms` ago.
    fn rest(owed: i64, ms: i64) -> Rest {
        Rest {
            owed,
            since: Instant::now() - Delta::from_millis(ms),
        }
    }

    #[test]
    fn what_has_run_is_owed() {
        assert!(rest(0, 20).owed(true) >= 20 * MS);
        assert!(rest(30 * MS, 20).owed(true) >= 50 * MS);
        assert_eq!(rest(Rest::LONGEST - 10 * MS, 20).owed(true), Rest::LONGEST);
    }

    #[test]
    fn what_has_rested_is_not_owed() {
        assert!(rest(50 * MS, 20).owed(false) <= 30 * MS);
        assert_eq!(rest(10 * MS, 20).owed(false), 0);
    }

    #[test]
    fn a_change_settles() {
        let mut rest = rest(0, 100);
        rest.change(true);
        assert!(rest.owed >= 100 * MS);
        let owed = rest.owed;
        rest.since = rest.since - Delta::from_millis(60);
        rest.change(false);
        assert!(rest.owed <= owed - 60 * MS);
    }

    #[test]
    fn short_rests_are_put_off() {
        assert_eq!(rest(5 * MS, 0).delay(false), 0);
        assert!(rest(500 * MS, 0).delay(false) >= msecs_to_jiffies(400));
        assert!(rest(500 * MS, 0).delay(true) >= msecs_to_jiffies(500));
    }
}
