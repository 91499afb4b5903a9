// SPDX-License-Identifier: GPL-2.0-only

//! Memory of files, for devices.

use crate::{Failure, Setting, Skip, huge_pages_free};
use anyhow::{Context as _, Result, anyhow};
use rustix::fs::{MemfdFlags, memfd_create};
use std::{fs, fs::File, path::Path};
use vfio_client::Memory;

/// Bytes of a huge page.
pub const HUGE_PAGE: u64 = 2 << 20;

/// A file in memory, of so many bytes, and its memory.
pub fn in_file(len: u64) -> Result<(File, Memory)> {
    memory_of(MemfdFlags::empty(), len)
}

fn memory_of(flags: MemfdFlags, len: u64) -> Result<(File, Memory)> {
    let file = File::from(memfd_create("dirtyscope", flags | MemfdFlags::CLOEXEC)?);
    file.set_len(len)?;
    let memory = Memory::of_file(&file, len as usize)?;
    Ok((file, memory))
}

/// Two huge pages more than there were, and a file that has them. There are as many as before when
/// this is dropped.
pub struct HugePages {
    file: Option<File>,
    free: u64,
    _setting: Setting,
}

impl HugePages {
    /// With the memory of the file. Skips the scenario if there are no huge pages to be had.
    pub fn new() -> Result<(Self, Memory)> {
        const PATH: &str = "/proc/sys/vm/nr_hugepages";
        let skip = |why: &str| anyhow!(Skip(format!("needs huge pages of 2 MiB: {why}")));
        if !Path::new(PATH).exists() {
            return Err(skip("this kernel has none"));
        }
        let before = huge_pages_free()?;
        let old = fs::read_to_string(PATH)?.trim().parse::<u64>().context(PATH)?;
        let _setting = Setting::new(PATH, &(old + 2).to_string())?;
        let free = huge_pages_free()?;
        if free < before + 2 {
            return Err(skip("there is no memory for two"));
        }
        let (file, memory) =
            memory_of(MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB, 2 * HUGE_PAGE)
                .map_err(|error| skip(&format!("a file of them can't be made: {error:#}")))?;
        Ok((Self { file: Some(file), free, _setting }, memory))
    }

    /// The file.
    pub fn file(&self) -> Result<&File> {
        self.file.as_ref().context("the file is closed")
    }

    /// Closes the file.
    pub fn close(&mut self) {
        self.file = None;
    }

    /// Fails unless so many are in use.
    pub fn used(&self, what: &str, pages: u64) -> Result<()> {
        let (expected, found) = (self.free - pages, huge_pages_free()?);
        Failure::unless_none(
            (expected != found)
                .then(|| format!("HugePages_Free {what} is {found}, not {expected}")),
        )
    }
}
