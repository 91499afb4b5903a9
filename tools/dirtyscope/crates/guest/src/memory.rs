// SPDX-License-Identifier: GPL-2.0-only

//! Memory whose physical addresses are known and stay what they are: huge pages.

use anyhow::{Context as _, Result, anyhow, ensure};
use harness::HUGE_PAGE;
use mdev_dma::{Contents, PAGE, contents::WrongPages};
use procfs::process::{MemoryPageFlags, PageInfo, Process};
use rustix::fs::{MemfdFlags, memfd_create};
use std::{fs::File, ops::Range};
use vfio_client::Memory;

/// One huge page, and what must be in it.
pub struct HugePage {
    memory: Memory,
    /// Where it is for devices: its physical address.
    pub iova: u64,
    pub contents: Contents,
}

impl HugePage {
    /// So many of them, zeroed.
    pub fn take(count: usize) -> Result<Vec<Self>> {
        (0..count).map(|_| Self::new()).collect::<Result<_>>().with_context(|| {
            format!(
                "needs {count} huge pages of 2 MiB, which the kernel doesn't move: \
                 echo {count} > /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages, \
                 or boot with hugepages={count}"
            )
        })
    }

    fn new() -> Result<Self> {
        let flags = MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB | MemfdFlags::CLOEXEC;
        let file = File::from(memfd_create("dirtyscope", flags).context("memfd_create")?);
        file.set_len(HUGE_PAGE).context("make it a huge page long")?;
        let memory = Memory::of_file(&file, HUGE_PAGE as usize)?;
        // Until it is written to, there is no page.
        memory.write(0, &[0; 8]);
        let iova = physical_address(&memory)?;
        Ok(Self { memory, iova, contents: Contents::zeroed(iova, HUGE_PAGE) })
    }

    /// Fails if the kernel has moved it: the device writes to what isn't ours any more.
    pub fn check_place(&self) -> Result<()> {
        let now = physical_address(&self.memory)?;
        ensure!(
            now == self.iova,
            "the kernel has moved a huge page from {:#x} to {now:#x}",
            self.iova
        );
        Ok(())
    }

    /// The IOVAs of `count` of its pages, from page `first` on.
    pub fn bytes(&self, first: u64, count: u64) -> Range<u64> {
        self.iova + first * PAGE..self.iova + (first + count) * PAGE
    }

    /// What of it isn't what was written there last.
    pub fn wrong_pages(&self, bytes: Range<u64>) -> WrongPages {
        let mut found = vec![0; (bytes.end - bytes.start) as usize];
        self.memory.read((bytes.start - self.iova) as usize, &mut found);
        self.contents.wrong_pages(bytes.start, &found)
    }

    /// Whether its page at `iova` has the pattern of `seed`.
    pub fn has(&self, iova: u64, seed: u64) -> bool {
        let mut found = vec![0; PAGE as usize];
        self.memory.read((iova - self.iova) as usize, &mut found);
        mdev_dma::pattern::matches(&found, seed, iova)
    }

    /// Has the CPU fill pages with the pattern of `seed`.
    pub fn fill(&mut self, bytes: Range<u64>, seed: u64) {
        let mut pattern = vec![0; (bytes.end - bytes.start) as usize];
        mdev_dma::pattern::fill(&mut pattern, seed, bytes.start);
        self.memory.write((bytes.start - self.iova) as usize, &pattern);
        self.contents.cpu_wrote(bytes, seed);
    }
}

/// Where memory, all of which is one huge page, is physically.
fn physical_address(memory: &Memory) -> Result<u64> {
    const WHAT: &str = "/proc/self/pagemap";
    let index = memory.address(0) / PAGE;
    let mut pagemap = Process::myself().and_then(|process| process.pagemap()).context(WHAT)?;
    match pagemap.get_info(index as usize).context(WHAT)? {
        PageInfo::MemoryPage(flags) if flags.contains(MemoryPageFlags::PRESENT) => {
            let frame = flags.get_page_frame_number().0;
            // It is there for all to read, but says nothing to those without the right.
            ensure!(frame != 0, "{WHAT} hides physical addresses: this needs root (CAP_SYS_ADMIN)");
            Ok(frame * PAGE)
        }
        info => Err(anyhow!("{WHAT} has {info:?} for memory that is there")),
    }
}
