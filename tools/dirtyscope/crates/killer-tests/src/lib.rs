// SPDX-License-Identifier: GPL-2.0-only

//! Scenarios of defects after which the kernel can't be used any more: locks that nobody releases, tasks
//! that can't be killed, memory that was freed. Each wants a boot of its own.

#![forbid(unsafe_code)]

mod leave;
mod pin;
mod reopen;
mod unmap;

use anyhow::{Context as _, Result, bail};
use harness::{Scenario, Stuck};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::{
    sync::{
        Arc,
        mpsc::{RecvTimeoutError, channel},
    },
    thread,
    time::Duration,
};

/// All of them.
pub fn scenarios() -> impl Iterator<Item = &'static Scenario> {
    [unmap::SCENARIOS, leave::SCENARIOS, pin::SCENARIOS, reopen::SCENARIOS].into_iter().flatten()
}

/// Whether the kernel panics for an oops: not while a scenario looks at what one leaves.
const PANIC_ON_OOPS: &str = "/proc/sys/kernel/panic_on_oops";

/// All threads that are made until this is dropped share one CPU: one that wakes up gets its turn soon,
/// in the middle of what another one does in the kernel. In a VM, another CPU may have to wait.
struct OneCpu(CpuSet);

impl OneCpu {
    fn new() -> Result<Self> {
        let old = sched_getaffinity(None)?;
        let mut one = CpuSet::new();
        one.set((0..CpuSet::MAX_CPU).find(|&cpu| old.is_set(cpu)).unwrap_or(0));
        sched_setaffinity(None, &one).context("sched_setaffinity")?;
        Ok(Self(old))
    }
}

impl Drop for OneCpu {
    fn drop(&mut self) {
        if let Err(error) = sched_setaffinity(None, &self.0) {
            eprintln!("dirtyscope: sched_setaffinity: {error}");
        }
    }
}

/// Has a thread do something to `it` that doesn't return if the kernel kills it, with locks that
/// nobody releases then.
fn or_stuck<I: Send + Sync + 'static, T: Send + 'static>(
    what: &str,
    it: I,
    f: impl FnOnce(&I) -> T + Send + 'static,
) -> Result<T> {
    let it = Arc::new(it);
    let (its, (send, done)) = (it.clone(), channel());
    thread::spawn(move || send.send(f(&its)));
    match done.recv_timeout(Duration::from_secs(2)) {
        Ok(value) => Ok(value),
        Err(RecvTimeoutError::Disconnected) => bail!("the thread for {what} panicked"),
        Err(RecvTimeoutError::Timeout) => {
            // Closing these waits for the locks.
            std::mem::forget(it);
            Err(Stuck(format!("{what} does not return")).into())
        }
    }
}
