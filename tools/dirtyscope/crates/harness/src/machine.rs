// SPDX-License-Identifier: GPL-2.0-only

//! What the kernel says of the machine as a whole, and settings of it.

use crate::kept_file::KeptFile;
use anyhow::{Context as _, Result};
use std::{
    fs::{self, File},
    os::unix::fs::FileExt as _,
    sync::OnceLock,
};

static VMSTAT: KeptFile = KeptFile::new("/proc/vmstat");
const MEMINFO: &str = "/proc/meminfo";

/// A setting of the kernel, in a file, which is what it was when this is dropped.
#[derive(Debug)]
pub struct Setting {
    path: &'static str,
    old: String,
}

impl Setting {
    /// Sets it.
    pub fn new(path: &'static str, value: &str) -> Result<Self> {
        let old = read(path)?;
        fs::write(path, value).with_context(|| format!("write {value:?} to {path}"))?;
        Ok(Self { path, old })
    }

    /// What it was.
    pub fn old(&self) -> &str {
        self.old.trim_end()
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        if let Err(error) = fs::write(self.path, &self.old) {
            eprintln!("dirtyscope: {} stays set: {error}", self.path);
        }
    }
}

/// How many pages are pinned, by whomever: each as often as it is.
pub fn pages_pinned() -> Result<u64> {
    // What CPUs have counted by themselves is added up.
    const PATH: &str = "/proc/sys/vm/stat_refresh";
    static REFRESH: OnceLock<Option<File>> = OnceLock::new();
    if let Some(file) = REFRESH.get_or_init(|| File::create(PATH).ok()).as_ref() {
        file.write_all_at(b"1", 0).context(PATH)?;
    }
    VMSTAT.find(|text| {
        let [acquired, released] = ["nr_foll_pin_acquired", "nr_foll_pin_released"];
        Some(number_in(text, acquired)? - number_in(text, released)?)
    })
}

/// How many huge pages of the default size nobody has.
pub fn huge_pages_free() -> Result<u64> {
    number(MEMINFO, "HugePages_Free:")
}

/// Bytes of memory that could be had.
pub fn memory_available() -> Result<u64> {
    Ok(1024 * number(MEMINFO, "MemAvailable:")?)
}

/// Bytes of slabs that aren't caches.
pub fn slab_unreclaimable() -> Result<u64> {
    Ok(1024 * number(MEMINFO, "SUnreclaim:")?)
}

fn read(path: &str) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("read {path}"))
}

/// The number that follows `name` on its line.
fn number(path: &str, name: &str) -> Result<u64> {
    number_in(&read(path)?, name).with_context(|| format!("{path} has no {name}"))
}

fn number_in(text: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().map(str::split_whitespace);
    let value = lines.find_map(|mut words| (words.next() == Some(name)).then(|| words.next()));
    value.flatten()?.parse().ok()
}
