// SPDX-License-Identifier: GPL-2.0-only

use crate::{Setting, Skip};
use anyhow::{Context as _, Result, anyhow, bail};
use rustix::thread::disable_transparent_huge_pages;
use std::{
    fs::{self, File},
    io::Write as _,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    thread,
    time::Duration,
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
        bytes_in(&File::open(self.0.join("memory.current"))?)
    }

    /// Does something for which no more than so many bytes can be charged. What the kernel allocates beyond
    /// that, and would charge, it doesn't get: there is nothing to reclaim, and nobody who may be killed.
    ///
    /// `what` must not touch memory of this process for the first time, as that fault would be taken again and
    /// again.
    pub fn limited<T>(&self, bytes: u64, what: impl FnOnce() -> T) -> Result<T> {
        let _spared = Setting::new("/proc/self/oom_score_adj", "-1000")?;
        let swap = self.0.join("memory.swap.max");
        if swap.exists() {
            fs::write(swap, "0")?;
        }
        let write = |name| File::options().write(true).open(self.0.join(name));
        let (high, limit) = (write("memory.high")?, Limit(write("memory.max")?));
        let current = File::open(self.0.join("memory.current"))?;
        // A file's buffer is charged, too, when it is read for the first time.
        bytes_in(&current)?;
        // What CPUs have charged in advance is given back to get there.
        high.write_all_at(b"0", 0)?;
        high.write_all_at(b"max", 0)?;
        let charged = settled(&current)?;
        limit.set(charged + bytes)?;
        Ok(what())
    }
}

/// The number that a file of a cgroup has, read without memory that is new.
fn bytes_in(file: &File) -> Result<u64> {
    let mut text = [0; 24];
    let len = file.read_at(&mut text, 0)?;
    Ok(std::str::from_utf8(&text[..len])?.trim().parse()?)
}

/// The same when it has not changed for a while: other CPUs than ours give back when a worker gets to it.
fn settled(file: &File) -> Result<u64> {
    let (mut bytes, mut unchanged) = (bytes_in(file)?, 0);
    for _ in 0..1000 {
        if unchanged == 20 {
            return Ok(bytes);
        }
        thread::sleep(Duration::from_millis(1));
        let now = bytes_in(file)?;
        unchanged = if now == bytes { unchanged + 1 } else { 0 };
        bytes = now;
    }
    bail!("what a cgroup is charged does not settle")
}

/// `memory.max` of a cgroup, which has none when this is dropped.
struct Limit(File);

impl Limit {
    /// Without memory that is new.
    fn set(&self, bytes: u64) -> Result<()> {
        let mut text = [0; 24];
        let mut rest = &mut text[..];
        write!(rest, "{bytes}")?;
        let left = rest.len();
        Ok(self.0.write_all_at(&text[..text.len() - left], 0)?)
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        if let Err(error) = self.0.write_all_at(b"max", 0) {
            eprintln!("dirtyscope: a cgroup's memory stays limited: {error}");
        }
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
