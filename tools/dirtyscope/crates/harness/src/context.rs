// SPDX-License-Identifier: GPL-2.0-only

use crate::{Devices, Edus, Log, Skip, new_uuid};
use anyhow::{Result, anyhow};
use events::{Answer, Call, Event};
use mdev_dma::sysfs::Mdev;
use std::{
    fmt,
    path::Path,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};
use uuid::Uuid;

/// What a scenario is given.
pub struct Context<'a> {
    devices: &'a Mutex<Devices>,
    module: Option<&'a Path>,
    log: &'a Mutex<Log>,
    calls: AtomicU64,
    logs_answers: bool,
}

impl<'a> Context<'a> {
    /// With devices to take from, and the driver's file if it may be unloaded.
    pub fn new(devices: &'a Mutex<Devices>, log: &'a Mutex<Log>, module: Option<&'a Path>) -> Self {
        Self { devices, module, log, calls: AtomicU64::new(0), logs_answers: true }
    }

    /// For what is repeated if its answers are worth a log.
    pub fn quiet(devices: &'a Mutex<Devices>, log: &'a Mutex<Log>) -> Self {
        Self { logs_answers: false, ..Self::new(devices, log, None) }
    }

    /// Whether answers aren't logged: see [`Self::quiet`].
    pub fn is_quiet(&self) -> bool {
        !self.logs_answers
    }

    /// A mediated device that nobody has open; the same one for the same `i`.
    pub fn device(&self, i: usize) -> Result<Mdev> {
        lock(self.devices).get(i)
    }

    /// PCI functions with an IOMMU. Skips the scenario if this machine hasn't enough.
    pub fn edus(&self) -> Result<Edus> {
        lock(self.devices).edus()
    }

    /// The driver's file. Skips the scenario if the user did not give it.
    pub fn module(&self) -> Result<&Path> {
        self.module
            .ok_or_else(|| anyhow!(Skip("give --module FILE.ko to unload the driver".into())))
    }

    /// A UUID that nothing has.
    pub fn new_uuid(&self) -> Result<Uuid> {
        new_uuid()
    }

    /// Logs a step that is no operation.
    pub fn note(&self, text: impl fmt::Display) {
        self.log(&Event::Note { text: text.to_string() });
    }

    /// Logs what is to be printed, too.
    pub fn progress(&self, text: impl fmt::Display) {
        self.log(&Event::Progress { text: text.to_string() });
    }

    /// Logs an operation that begins now. Returns its number; that in `call` is overwritten.
    pub fn call(&self, mut call: Call) -> u64 {
        call.n = self.calls.fetch_add(1, Relaxed) + 1;
        let n = call.n;
        self.log(&Event::Call(call));
        n
    }

    /// Logs how an operation has ended, if anybody wants to know.
    pub fn answer(&self, answer: impl FnOnce() -> Answer) {
        if self.logs_answers {
            self.log(&Event::Answer(answer()));
        }
    }

    fn log(&self, event: &Event) {
        let mut log = lock(self.log);
        if log.is_long() {
            return;
        }
        let mut logged = log.append(event);
        if log.is_long() {
            let text = "what follows isn't logged: it is too much".into();
            logged = logged.and_then(|()| log.append(&Event::Note { text }));
        }
        // A full log must not end a test, whose result is logged or is an error of its own.
        if let Err(error) = logged {
            eprintln!("dirtyscope: {error:#}");
        }
    }
}

/// Locks a mutex that a scenario may have poisoned: one that panicked must not take others down.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
