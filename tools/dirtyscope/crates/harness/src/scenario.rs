// SPDX-License-Identifier: GPL-2.0-only

use crate::{Context, Signature};
use anyhow::Result;

/// A named sequence of operations, with what must come of it.
pub struct Scenario {
    /// `suite/family/name`, which stays as it is once people know it.
    pub name: &'static str,
    /// What it is about, in a line.
    pub about: &'static str,
    /// Runs it.
    pub run: fn(&Context<'_>) -> Result<()>,
    /// The defect that kernels are known to show in it, if any.
    pub signature: Option<Signature>,
    /// Another one, which shows where that one is mended, or isn't met.
    pub also: Option<Signature>,
}

/// A scenario that all kernels should pass.
pub const fn scenario(
    name: &'static str,
    about: &'static str,
    run: fn(&Context<'_>) -> Result<()>,
) -> Scenario {
    Scenario { name, about, run, signature: None, also: None }
}

/// A scenario in which kernels are known to show a defect.
pub const fn defect(
    name: &'static str,
    about: &'static str,
    run: fn(&Context<'_>) -> Result<()>,
    signature: Signature,
) -> Scenario {
    Scenario { name, about, run, signature: Some(signature), also: None }
}

impl Scenario {
    /// The defects that kernels are known to show in it.
    pub fn signatures(&self) -> impl Iterator<Item = Signature> {
        [self.signature, self.also].into_iter().flatten()
    }
}
