// SPDX-License-Identifier: GPL-2.0-only

use crate::Skip;
use anyhow::{Context as _, Result, anyhow};
use rustix::thread::disable_transparent_huge_pages;
use std::{
    fs,
    path::{Path, PathBuf},
};

/// A cgroup that this process is in until it is dropped, without huge pages: khugepaged may
/// replace a few small pages by a huge one at any time, and all of that is charged.
pub struct Cgroup(PathBuf);

impl Cgroup {
    const ROOT: &str = "/sys/fs/cgroup";

    /// Skips the scenario if there is no place for one.
    pub fn new() -> Result<Self> {
        let root = Path::new(Self::ROOT);
        let skip = |_| anyhow!(Skip(format!("needs cgroup2 with memory at {}", Self::ROOT)));
        fs::write(root.join("cgroup.subtree_control"), "+memory").map_err(skip)?;
        let this = Self(root.join(format!("dirtyscope-{}", std::process::id())));
        fs::create_dir(&this.0).with_context(|| this.0.display().to_string())?;
        this.enter(&this.0)?;
        disable_transparent_huge_pages(true).context("PR_SET_THP_DISABLE")?;
        Ok(this)
    }

    fn enter(&self, group: &Path) -> Result<()> {
        let path = group.join("cgroup.procs");
        fs::write(&path, std::process::id().to_string()).with_context(|| path.display().to_string())
    }

    /// Bytes that are charged to it: up to 256 KiB for each CPU more than it has.
    pub fn charged(&self) -> Result<u64> {
        Ok(fs::read_to_string(self.0.join("memory.current"))?.trim().parse()?)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let left = self.enter(Path::new(Self::ROOT)).and_then(|()| {
            disable_transparent_huge_pages(false)?;
            Ok(fs::remove_dir(&self.0)?)
        });
        if let Err(error) = left {
            eprintln!("dirtyscope: {} stays: {error:#}", self.0.display());
        }
    }
}
