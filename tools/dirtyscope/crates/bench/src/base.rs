// SPDX-License-Identifier: GPL-2.0-only

//! The driver beside itself as it was: what [`super::measurements::Measurements`] of the one and the
//! other say.

use super::{
    measurements::{Clock, Unit},
    table::Table,
};
use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;
use std::{fs, path::Path, process::ExitCode};

/// How many times as many instructions are too many.
const LIMIT: f64 = 1.01;

/// What is of interest here of measurements that were written as JSON.
#[derive(Deserialize)]
struct Measured {
    kernel: String,
    clock: Clock,
    comparisons: Vec<Speed>,
}

/// The driver's speed on a path.
#[derive(Deserialize)]
struct Speed {
    path: String,
    unit: Unit,
    rust: f64,
}

impl Measured {
    fn read(file: &Path) -> Result<Self> {
        let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
        let measured: Self = serde_json::from_str(&text)
            .with_context(|| format!("{}: not what bench --json writes", file.display()))?;
        if measured.clock != Clock::Instructions {
            bail!("{}: measured by the wall clock, which says nothing of 1 %", file.display());
        }
        Ok(measured)
    }
}

/// Compares, and says so.
pub fn compare(before: &Path, after: &Path) -> Result<ExitCode> {
    let (before, after) = (Measured::read(before)?, Measured::read(after)?);
    ensure!(before.kernel == after.kernel, "measured on {} and {}", before.kernel, after.kernel);
    let paths = |measured: &Measured| -> Vec<_> {
        measured.comparisons.iter().map(|speed| speed.path.clone()).collect()
    };
    ensure!(
        !after.comparisons.is_empty() && paths(&before) == paths(&after),
        "measured on other paths: {:?} and {:?}",
        paths(&before),
        paths(&after)
    );

    let mut table = Table::new(["", "before", "after", "ratio", ""]);
    let mut slower = Vec::new();
    for (before, after) in before.comparisons.iter().zip(&after.comparisons) {
        let ratio = before.rust / after.rust;
        let more = ratio > LIMIT;
        table.row([
            after.path.clone(),
            before.unit.show(Clock::Instructions, before.rust),
            after.unit.show(Clock::Instructions, after.rust),
            format!("{ratio:.4}"),
            if more { "MORE THAN 1 % MORE" } else { "" }.to_owned(),
        ]);
        if more {
            slower.push(after.path.as_str());
        }
    }
    print!("{table}");
    if slower.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    println!("more than 1 % more instructions: {}", slower.join(", "));
    Ok(ExitCode::FAILURE)
}
