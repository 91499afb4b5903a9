// SPDX-License-Identifier: GPL-2.0-only

//! The scenarios: named sequences of operations, with what must come of them.
//!
//! A family has a file, whose `SCENARIOS` lists what is in it. To add a scenario, write a function
//! and add it there.

mod background;
mod client;
mod defect;
mod device;
mod dirty;
mod generator;
mod iommufd;
mod irq;
mod logging;
mod map;
mod mdev;
mod memory;
mod migration;
mod module;
mod process;
mod rig;
mod selftest;

use crate::devices::{self, Devices};
use anyhow::{Context as _, Result, anyhow};
use mdev_dma::sysfs::Mdev;
use std::{
    fmt, fs,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use uuid::Uuid;

/// After so long without a result, a scenario hangs.
pub const LIMIT: Duration = Duration::from_secs(60);

/// A scenario.
pub struct Scenario {
    /// `family/name`, which stays as it is once people know it.
    pub name: &'static str,
    /// What it is about, in a line.
    pub about: &'static str,
    /// Runs it.
    pub run: fn(&Context<'_>) -> Result<()>,
}

impl Scenario {
    /// Whether it leaves tasks behind that can't be killed, if the kernel has the defect it shows.
    pub fn may_hang(&self) -> bool {
        defect::HANGS.iter().any(|scenario| scenario.name == self.name)
    }

    /// The known defect of the kernel that it shows: `D5` of `defect/D5-pin-unwind`.
    pub fn defect(&self) -> Option<&'static str> {
        self.name.strip_prefix("defect/")?.split('-').next()
    }
}

/// All scenarios.
pub fn all() -> impl Iterator<Item = &'static Scenario> {
    [
        selftest::SCENARIOS,
        dirty::SCENARIOS,
        map::SCENARIOS,
        memory::SCENARIOS,
        process::SCENARIOS,
        device::INTERFACE,
        device::COMMANDS,
        device::LIFETIME,
        irq::SCENARIOS,
        background::SCENARIOS,
        generator::SCENARIOS,
        migration::SCENARIOS,
        logging::SCENARIOS,
        iommufd::SCENARIOS,
        mdev::SCENARIOS,
        client::SCENARIOS,
        defect::SCENARIOS,
        module::SCENARIOS,
        // Whatever comes after one of these may meet locks that nobody gives back.
        defect::HANGS,
    ]
    .into_iter()
    .flatten()
}

/// A reason why a scenario can't be run; an error that isn't a failure.
#[derive(Debug)]
pub struct Skip(pub String);

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}

/// A difference to the contract that left tasks of this process blocked for good, and devices in use.
#[derive(Debug)]
pub struct Stuck(pub String);

impl fmt::Display for Stuck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Stuck {}

/// What a scenario is given.
pub struct Context<'a> {
    devices: &'a Mutex<Devices>,
    module: Option<&'a Path>,
    /// What was done, unless nobody wants to know.
    log: Option<Mutex<Vec<String>>>,
}

impl<'a> Context<'a> {
    /// With devices to take from, and the driver's file if it may be unloaded.
    pub fn new(devices: &'a Mutex<Devices>, module: Option<&'a Path>) -> Self {
        Self { devices, module, log: Some(Mutex::default()) }
    }

    /// With devices to take from, for what is repeated if it is worth a log.
    pub fn quiet(devices: &'a Mutex<Devices>) -> Self {
        Self { devices, module: None, log: None }
    }

    /// A mediated device that nobody has open; the same one for the same `i`.
    pub fn device(&self, i: usize) -> Result<Mdev> {
        lock(self.devices).get(i)
    }

    /// The driver's file. Skips the scenario if the user did not give it.
    pub fn module(&self) -> Result<&Path> {
        self.module
            .ok_or_else(|| anyhow!(Skip("give --module FILE.ko to unload the driver".into())))
    }

    /// A UUID that nothing has.
    pub fn new_uuid(&self) -> Result<Uuid> {
        devices::new_uuid()
    }

    /// Adds a line to what is shown of a failure: something that is done now.
    pub fn note(&self, line: impl fmt::Display) {
        if let Some(log) = &self.log {
            lock(log).push(line.to_string());
        }
    }

    /// Adds to the last line.
    pub fn add_note(&self, text: impl fmt::Display) {
        if let Some(line) = self.log.as_ref().map(lock).as_mut().and_then(|log| log.last_mut()) {
            line.push_str(&text.to_string());
        }
    }

    /// Does what a defective kernel complains about in its log. The two lines that this puts there,
    /// around it, tell `tools/vm/boot` to overlook the complaint: the scenario reports it.
    pub fn expect_complaint(&self, f: impl FnOnce() -> Result<()>) -> Result<()> {
        const PATH: &str = "/dev/kmsg";
        let say = |what| fs::write(PATH, format!("dirtyscope: complaint expected: {what}"));
        say("begin").context(PATH)?;
        let result = f();
        say("end").context(PATH)?;
        result
    }

    /// The last lines of the log, numbered.
    pub fn log(&self, lines: usize) -> String {
        let Some(log) = &self.log else { return String::new() };
        let log = lock(log);
        let skipped = log.len().saturating_sub(lines);
        let mut lines: Vec<_> =
            (1..).zip(&*log).skip(skipped).map(|(i, line)| format!("{i:4}  {line}")).collect();
        if skipped > 0 {
            lines.insert(0, format!("      ({skipped} before)"));
        }
        lines.join("\n")
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A scenario that panicked must not take the others down.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
