// SPDX-License-Identifier: GPL-2.0

//! Tasks, and how to end what they wait for.
//!
//! C header: [`include/linux/sched/signal.h`](srctree/include/linux/sched/signal.h)

use core::{
    mem::transmute,
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
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
/// # Invariants
///
/// `self.0` is a kernel thread that accepts `SIGKILL`, which nobody else sends it, and exists as long
/// as this.
pub(crate) struct Killable(NonNull<bindings::task_struct>);

// SAFETY: Tasks may be signalled from any thread.
unsafe impl Send for Killable {}

impl Killable {
    /// The current kernel thread.
    ///
    /// # Safety
    ///
    /// Nobody else sends the thread signals, and it drops this itself, before it ends.
    pub(crate) unsafe fn current() -> Self {
        // `allow_kernel_signal()`: what user space sends is ignored.
        accept(SIG_KTHREAD_KERNEL);
        // INVARIANT: It just accepted `SIGKILL`, and the caller promises the rest.
        Self(current())
    }

    /// Kills it, as far as its waits are concerned.
    pub(crate) fn kill(&mut self) {
        // SAFETY: By the type invariant the task is valid.
        let pending = unsafe { pending(self.0) };
        // For those that look for a fatal signal: a thread that handles `SIGKILL` itself has it
        // pending among those of its process only, where they don't look.
        pending.fetch_or(KILL, Ordering::Relaxed);
        // SAFETY: As above; this wakes it.
        unsafe { bindings::send_sig(bindings::SIGKILL as c_int, self.0.as_ptr(), 1) };
    }
}

impl Drop for Killable {
    fn drop(&mut self) {
        // `disallow_signal()`, which forgets those that are pending.
        accept(SIG_IGN);
    }
}

const SIG_IGN: usize = 1;
const SIG_KTHREAD_KERNEL: usize = 3;

/// Sets what the current task does on `SIGKILL`.
fn accept(action: usize) {
    // SAFETY: A handler is nullable and never called if it is one of these numbers.
    let action = unsafe { transmute::<usize, bindings::__sighandler_t>(action) };
    // SAFETY: Every task may set its handlers; a kernel thread shares them with nobody.
    unsafe { bindings::kernel_sigaction(bindings::SIGKILL as c_int, action) };
}
