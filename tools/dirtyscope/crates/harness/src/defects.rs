// SPDX-License-Identifier: GPL-2.0-only

//! Known defects of the kernel: by what they are known, and which kernel has which.

use crate::Scenario;
use anyhow::{Context as _, Result, bail};
use events::Difference;
use glob::{Pattern, PatternError};
use serde::Deserialize;
use std::{fs, path::Path};

/// What a defect shows in its scenario: this, and nothing else.
#[derive(Clone, Copy, Debug)]
pub struct Signature {
    /// Its id, such as `D5`.
    pub defect: &'static str,
    /// How the scenario ends.
    pub shows: Shows,
    /// Patterns of the kernel's complaints: each must match one of them, and all must be matched.
    pub complaints: &'static [&'static str],
}

/// How a scenario ends that shows a defect.
#[derive(Clone, Copy, Debug)]
pub enum Shows {
    /// It passes: only the kernel complains.
    Complaint,
    /// It fails, with a [`crate::Failure`] that says so. `what` is a pattern; runs of lost and spurious
    /// pages are exact, in bytes of IOVA.
    Difference { what: &'static str, lost: &'static [(u64, u64)], spurious: &'static [(u64, u64)] },
    /// Tasks hang, each with one of these in its stack, and none of these without a task.
    Hang(&'static [&'static str]),
}

/// What a scenario showed.
#[derive(Default)]
pub struct Shown {
    pub difference: Option<Difference>,
    pub stacks: Option<String>,
    pub complaints: Vec<String>,
}

impl Signature {
    /// Why this isn't what was shown, if it isn't.
    pub fn mismatch(&self, shown: &Shown) -> Option<String> {
        self.ending_mismatch(shown).or_else(|| self.complaint_mismatch(&shown.complaints))
    }

    fn ending_mismatch(&self, shown: &Shown) -> Option<String> {
        match (self.shows, &shown.difference, &shown.stacks) {
            (Shows::Complaint, None, None) => None,
            (Shows::Difference { what, lost, spurious }, Some(found), None) => {
                let same = matches(what, &found.what);
                (!same || found.lost != lost || found.spurious != spurious)
                    .then(|| format!("it would be: {what}, lost {lost:x?}, spurious {spurious:x?}"))
            }
            (Shows::Hang(functions), None, Some(stacks)) => hang_mismatch(functions, stacks),
            (shows, ..) => Some(format!("it would end otherwise: {shows:x?}")),
        }
    }

    fn complaint_mismatch(&self, complaints: &[String]) -> Option<String> {
        let matched = |pattern: &&str| complaints.iter().any(|text| matches(pattern, text));
        let allowed = |text: &&String| self.complaints.iter().any(|pattern| matches(pattern, text));
        let strange = complaints.iter().find(|text| !allowed(text));
        let missing = self.complaints.iter().find(|pattern| !matched(pattern));
        strange
            .map(|text| format!("the kernel would not complain: {text}"))
            .or_else(|| missing.map(|pattern| format!("the kernel would complain: {pattern}")))
    }
}

fn hang_mismatch(functions: &[&str], stacks: &str) -> Option<String> {
    let missing = functions.iter().find(|function| !stacks.contains(**function));
    let mut tasks = stacks.split("task ").filter(|stack| !stack.is_empty());
    let strange = tasks.find(|stack| !functions.iter().any(|function| stack.contains(function)));
    let strange = strange.and_then(|stack| stack.lines().next());
    missing
        .map(|function| format!("a task would hang in {function}"))
        .or_else(|| strange.map(|task| format!("this task would not hang: {task}")))
}

/// Whether a text matches a pattern with `*` and `?`.
fn matches(pattern: &str, text: &str) -> bool {
    compile(pattern).is_ok_and(|pattern| pattern.matches(text))
}

fn compile(pattern: &str) -> Result<Pattern, PatternError> {
    // Brackets are common in what is matched here, and no part of our patterns.
    Pattern::new(&pattern.replace('[', "[[]"))
}

/// Which kernel shows which defects: `known-defects.toml`, which says how it is to be read.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KnownDefects {
    /// What needs the driver in Rust, or rust_vfio_edu beside it, on any kernel.
    #[serde(default)]
    rust_only: Vec<String>,
    /// Defects that are known, and for which there is no fix: who asks for fixed kernels doesn't fail for
    /// these.
    #[serde(default)]
    without_fix: Vec<String>,
    kernel: Vec<KernelEntry>,
}

/// What is known of a kernel.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelEntry {
    release: String,
    defects: Vec<String>,
    skips: Vec<String>,
}

impl KnownDefects {
    /// What this program was built with, or what is in a file.
    pub fn load(path: Option<&Path>) -> Result<Self> {
        let (name, text) = match path {
            Some(path) => {
                let name = path.display().to_string();
                let text = fs::read_to_string(path).with_context(|| name.clone())?;
                (name, text)
            }
            None => ("known-defects.toml".into(), include_str!("../known-defects.toml").into()),
        };
        let known: Self = toml::from_str(&text).context(name.clone())?;
        let entries = known.kernel.iter();
        let patterns = entries.flat_map(|entry| entry.skips.iter().chain([&entry.release]));
        for pattern in patterns.chain(&known.rust_only) {
            compile(pattern).with_context(|| format!("{name}: {pattern:?}"))?;
        }
        Ok(known)
    }

    /// Fails if the list names a defect, or skips a scenario, that isn't among these: a slip of the pen
    /// must not be taken for a kernel without it.
    pub fn check(&self, scenarios: &[&Scenario]) -> Result<()> {
        let shown = |id: &String| {
            scenarios.iter().any(|one| one.signatures().any(|s| s.defect == id.as_str()))
        };
        let skipped = |p: &String| scenarios.iter().any(|one| matches(p, one.name));
        if let Some(unknown) = self.rust_only.iter().find(|p| !skipped(p)) {
            bail!("known defects, rust_only: no scenario is about {unknown:?}");
        }
        if let Some(unknown) = self.without_fix.iter().find(|&id| !shown(id)) {
            bail!("known defects, without_fix: no scenario is about {unknown:?}");
        }
        for entry in &self.kernel {
            let unknown = entry.defects.iter().find(|id| !shown(id));
            let unknown = unknown.or_else(|| entry.skips.iter().find(|p| !skipped(p)));
            if let Some(unknown) = unknown {
                bail!("known defects of {}: no scenario is about {unknown:?}", entry.release);
            }
        }
        Ok(())
    }

    /// Whether a scenario may be skipped: its kernel isn't listed, or hasn't what it needs, or the driver
    /// is another one than that in Rust.
    pub fn may_skip(&self, release: &str, scenario: &str, other_driver: bool) -> bool {
        let rust_only = || self.rust_only.iter().any(|pattern| matches(pattern, scenario));
        self.of(release).is_none_or(|entry| entry.skips(scenario)) || (other_driver && rust_only())
    }

    /// Whether there is a fix for a defect.
    pub fn has_fix(&self, defect: &str) -> bool {
        !self.without_fix.iter().any(|id| id == defect)
    }

    /// The entry of a kernel, if its release is listed.
    pub fn of(&self, release: &str) -> Option<&KernelEntry> {
        self.kernel.iter().find(|entry| matches(&entry.release, release))
    }
}

impl KernelEntry {
    /// Whether it shows a defect.
    pub fn shows(&self, defect: &str) -> bool {
        self.defects.iter().any(|id| id == defect)
    }

    /// Whether it has not what a scenario needs.
    fn skips(&self, scenario: &str) -> bool {
        self.skips.iter().any(|pattern| matches(pattern, scenario))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: Signature = Signature {
        defect: "D0",
        shows: Shows::Difference {
            what: "GET_BITMAP *: wrong",
            lost: &[(0, 0x1000)],
            spurious: &[],
        },
        complaints: &[],
    };

    fn difference(what: &str, lost: &[(u64, u64)]) -> Shown {
        let difference = Difference { what: what.into(), lost: lost.into(), ..Default::default() };
        Shown { difference: Some(difference), ..Default::default() }
    }

    #[test]
    fn one_page_more_is_another_defect() {
        let what = "GET_BITMAP 0x0+0x2000: wrong";
        assert_eq!(PAGES.mismatch(&difference(what, &[(0, 0x1000)])), None);
        assert!(PAGES.mismatch(&difference(what, &[(0, 0x2000)])).is_some());
        assert!(PAGES.mismatch(&difference("MAP 0x0+0x2000: EINVAL", &[(0, 0x1000)])).is_some());
        assert!(PAGES.mismatch(&Shown::default()).is_some());
        let hung = Shown { stacks: Some("vfio_pin".into()), ..Default::default() };
        assert!(PAGES.mismatch(&hung).is_some());
    }

    #[test]
    fn a_complaint_more_is_another_defect() {
        let bug =
            Signature { shows: Shows::Complaint, complaints: &["kernel BUG at [x]*"], ..PAGES };
        let shown = |complaints: &[&str]| Shown {
            complaints: complaints.iter().map(|text| (*text).into()).collect(),
            ..Default::default()
        };
        assert_eq!(bug.mismatch(&shown(&["kernel BUG at [x].c:1!"])), None);
        assert!(bug.mismatch(&shown(&[])).is_some());
        assert!(bug.mismatch(&shown(&["kernel BUG at [x].c:1!", "WARNING: y"])).is_some());
        let hang = Signature { shows: Shows::Hang(&["a", "b"]), ..PAGES };
        let stacks = |text: &str| Shown { stacks: Some(text.into()), ..Default::default() };
        assert_eq!(hang.mismatch(&stacks("a\nb")), None);
        assert!(hang.mismatch(&stacks("b")).is_some());
        assert_eq!(hang.mismatch(&stacks("task 1: D\na\ntask 2: D\nb")), None);
        assert!(hang.mismatch(&stacks("task 1: D\na\nb\ntask 2: D\nc")).is_some());
    }

    #[test]
    fn the_list_is_well_formed() {
        let known = KnownDefects::load(None).unwrap();
        let entry = known.of("7.3.4+deb13-amd64").unwrap();
        assert!(entry.shows("D5") && !entry.shows("D4"));
        assert!(entry.skips("device/iommufd/unmap") && !entry.skips("type1/map/hole"));
        assert!(known.of("6.1.0-13-amd64").is_none());
        assert!(known.check(&[]).is_err());
    }

    #[test]
    fn a_kernel_that_is_listed_skips_what_is_listed() {
        let known = KnownDefects::load(None).unwrap();
        let may = |scenario, other| known.may_skip("7.3.4+deb13-amd64", scenario, other);
        assert!(may("device/iommufd/unmap", false));
        assert!(!may("device/client/mdevctl", false));
        assert!(
            may("type1/scope/stays-promoted", true) && !may("type1/scope/stays-promoted", false)
        );
        assert!(!may("type1/scope/joins-while-tracking", true));
        assert!(known.may_skip("6.1.0", "device/client/mdevctl", false), "nothing is known of it");
    }
}
