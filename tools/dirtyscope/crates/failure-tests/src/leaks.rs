// SPDX-License-Identifier: GPL-2.0-only

//! What was allocated and is lost.

use crate::faults::Faults;
use anyhow::{Context as _, Result, ensure};
use harness::{Context, Failure, Scenario, Skip, scenario};
use std::{fs, path::Path, thread, time::Duration};

pub const SCENARIOS: &[Scenario] = &[scenario(
    "fail-nth/leaks",
    "kmemleak finds nothing that was allocated in what ran before",
    leaks,
)];

const KMEMLEAK: &str = "/sys/kernel/debug/kmemleak";

/// Younger objects aren't reported.
const AGE: Duration = Duration::from_secs(6);

fn leaks(context: &Context<'_>) -> Result<()> {
    drop(Faults::allow()?);
    ensure!(Path::new(KMEMLEAK).exists(), Skip("needs CONFIG_DEBUG_KMEMLEAK".into()));
    thread::sleep(AGE);
    // An object is reported when two scans have not found a pointer to it.
    for _ in 0..2 {
        fs::write(KMEMLEAK, "scan").context(KMEMLEAK)?;
    }
    let found = fs::read_to_string(KMEMLEAK).context(KMEMLEAK)?;
    // A device that is open or a container may be behind any pointer; what is in use isn't lost.
    for line in found.lines() {
        context.note(line);
    }
    let lost = found.lines().filter(|line| line.starts_with("unreferenced object")).count();
    Failure::unless_none((lost > 0).then(|| format!("{lost} objects are lost:\n{found}")))
}
