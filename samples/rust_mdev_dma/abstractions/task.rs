// SPDX-License-Identifier: GPL-2.0

//! Tasks, and how to end what they wait for.
//!
//! C header: [`include/linux/sched/signal.h`](srctree/include/linux/sched/signal.h)

use core::{
    mem::transmute,
    ptr::NonNull,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
};
use kernel::{bindings, prelude::*};

/// The bit of `SIGKILL` in a set of signals.
const KILL: u64 = 1 << (bindings::SIGKILL - 1);

/// The pending signals of a task, as far as `SIGKILL` is among them.
///
/// # Safety
///
/// `task` is valid for `'a`.
unsafe fn pending<'a>(task: NonNull<bindings::task_struct>) -> &'a AtomicU64 {
    // SAFETY: The caller promises that the task is valid. `fatal_signal_pending()` reads this without
    // a lock, too, and a set of signals is one word here.
    unsafe { AtomicU64::from_ptr((&raw mut (*task.as_ptr()).pending.signal.sig[0]).cast()) }
}

fn current() -> NonNull<bindings::task_struct> {
    NonNull::from(&*kernel::current!()).cast()
}

/// Whether the current task is being killed, so what it waits for should end: C's
/// `fatal_signal_pending()`.
pub(crate) fn killed() -> bool {
    // SAFETY: The current task is valid.
    let pending = unsafe { pending(current()) };
    kernel::current!().signal_pending() && pending.load(Ordering::Relaxed) & KILL != 0
}

/// A kernel thread that can be killed while this exists: its waits that can be ended by a fatal
/// signal end, e.g. those of page faults in memory that a process serves. It goes on with what it
/// does: the signal has no other effect, and is forgotten when this is dropped.
///
/// There is no function of the kernel for this: kernel threads ignore `SIGKILL`, or, if they accept
/// it, find it among the signals of their process, where a page fault doesn't look for it.
///
/// # Invariants
///
/// `self.0` is a kernel thread that handles no signal and has none blocked, which nobody else sends
/// any, and exists as long as this.
pub(crate) struct Killable(NonNull<bindings::task_struct>);

// SAFETY: Tasks may be signalled from any thread.
unsafe impl Send for Killable {}

impl Killable {
    /// The current kernel thread.
    ///
    /// # Safety
    ///
    /// It handles no signals, nobody else sends it any, and it drops this itself, before it ends.
    pub(crate) unsafe fn current() -> Self {
        // INVARIANT: The caller promises that.
        Self(current())
    }

    /// Kills it, as far as its waits are concerned.
    pub(crate) fn kill(&mut self) {
        // SAFETY: By the type invariant the task is valid.
        let pending = unsafe { pending(self.0) };
        pending.fetch_or(KILL, Ordering::Relaxed);
        // SAFETY: As above; all change the flags by atomic operations.
        let flags = unsafe { AtomicUsize::from_ptr(&raw mut (*self.0.as_ptr()).thread_info.flags) };
        // After the signal, before it is woken: what `signal_wake_up()` does.
        flags.fetch_or(1 << bindings::TIF_SIGPENDING, Ordering::SeqCst);
        // SAFETY: As above. A task that is woken without need looks again for what it waits for.
        unsafe { bindings::wake_up_process(self.0.as_ptr()) };
    }
}

impl Drop for Killable {
    fn drop(&mut self) {
        const SIG_IGN: usize = 1;

        // SAFETY: A handler is nullable and never called if it is `SIG_IGN`.
        let ignore = unsafe { transmute::<usize, bindings::__sighandler_t>(SIG_IGN) };
        // `disallow_signal()`, which forgets what is pending. Kernel threads ignore it already.
        // SAFETY: Every task may set its handlers; a kernel thread shares them with nobody.
        unsafe { bindings::kernel_sigaction(bindings::SIGKILL as c_int, ignore) };
    }
}
