// SPDX-License-Identifier: GPL-2.0-only

//! KUnit suites of the driver, which run when it is loaded.

use anyhow::{Context as _, Result, ensure};
use harness::{Context, Failure, Scenario, Skip, scenario};
use std::{fs, path::Path};

pub const SCENARIOS: &[Scenario] = &[scenario(
    "device/unit-tests",
    "the driver's KUnit suites have passed when it was loaded",
    unit_tests,
)];

/// Where results are, by suite.
const RESULTS: &str = "/sys/kernel/debug/kunit";

/// Behind `rust_mdev_dma_`.
const SUITES: [&str; 10] = [
    "command",
    "config_space",
    "generator",
    "irq",
    "log",
    "migration",
    "pattern",
    "pins",
    "raw_pins",
    "registers",
];

fn unit_tests(context: &Context<'_>) -> Result<()> {
    let there = Path::new(RESULTS).exists();
    ensure!(there, Skip("needs CONFIG_KUNIT=y and CONFIG_KUNIT_DEBUGFS".into()));
    let (mut passed, mut failed) = (0, Vec::new());
    for suite in SUITES {
        let path = format!("{RESULTS}/rust_mdev_dma_{suite}/results");
        let results = fs::read_to_string(&path).context(path)?;
        if results.lines().any(|line| line.contains("not ok ")) {
            failed.push(format!("{suite}:\n{results}"));
        }
        // A test's line is indented, that of the suite isn't.
        passed += results.lines().filter(|line| line.starts_with("    ok ")).count();
    }
    Failure::unless_none((!failed.is_empty()).then(|| failed.concat()))?;
    ensure!(passed > 0, "no test has run");
    context.progress(format_args!("{passed} tests in {} suites of KUnit", SUITES.len()));
    Ok(())
}
