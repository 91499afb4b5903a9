// SPDX-License-Identifier: GPL-2.0-only

use anyhow::Result;
use harness::{Setting, Skip};
use std::path::Path;

/// What the kernel has to make allocations fail.
const DIRECTORY: &str = "/sys/kernel/debug/failslab";

/// What it is told: that allocations may fail that could wait for memory, even of a single page, and
/// that it needn't show the stack of each that does. Those of a kernel that fails less aren't there.
const SETTINGS: &[(&str, &str)] = &[
    ("/sys/kernel/debug/failslab/ignore-gfp-wait", "N"),
    ("/sys/kernel/debug/failslab/verbose", "0"),
    ("/sys/kernel/debug/fail_page_alloc/ignore-gfp-wait", "N"),
    ("/sys/kernel/debug/fail_page_alloc/ignore-gfp-highmem", "N"),
    ("/sys/kernel/debug/fail_page_alloc/min-order", "0"),
    ("/sys/kernel/debug/fail_page_alloc/verbose", "0"),
];

/// Lets every allocation fail that can, as long as this is there. Which one does is another matter: see
/// [`vfio_client::fail_nth`].
pub struct Faults(#[expect(dead_code, reason = "undone when dropped")] Vec<Setting>);

impl Faults {
    /// Skips the scenario if this kernel has no fault injection.
    pub fn allow() -> Result<Self> {
        if !Path::new(DIRECTORY).exists() {
            let why = "needs CONFIG_FAILSLAB and CONFIG_FAULT_INJECTION_DEBUG_FS: make fail-nth";
            return Err(Skip(why.into()).into());
        }
        let there = SETTINGS.iter().filter(|(path, _)| Path::new(path).exists());
        Ok(Self(there.map(|(path, value)| Setting::new(path, value)).collect::<Result<_>>()?))
    }
}
