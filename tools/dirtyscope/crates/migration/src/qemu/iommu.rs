// SPDX-License-Identifier: GPL-2.0-only

//! A machine's IOMMU as a driver in a guest sees it: legacy mode and invalidation by registers, of
//! "Intel Virtualization Technology for Directed I/O".

use anyhow::{Result, ensure};
use mdev_dma::{PAGE, Width};
use qemu_client::Qtest;
use std::ops::Range;

/// Where a PC has its registers.
const REGISTERS: u64 = 0xfed9_0000;
const GLOBAL_COMMAND: u64 = 0x18;
const GLOBAL_STATUS: u64 = 0x1c;
const ROOT_TABLE: u64 = 0x20;
const CONTEXT_COMMAND: u64 = 0x28;
const INVALIDATE_ADDRESS: u64 = 0xf0;
const INVALIDATE_IOTLB: u64 = 0xf8;

const TRANSLATE: u64 = 1 << 31;
const SET_ROOT_TABLE: u64 = 1 << 30;
const ALL_CONTEXTS: u64 = (1 << 63) | (1 << 61);
const ALL_PAGES: u64 = (1 << 63) | (1 << 60);
const PAGES_OF_DOMAIN: u64 = (1 << 63) | (3 << 60) | (DOMAIN << 32);

/// The only domain.
const DOMAIN: u64 = 1;
/// In the second word of a context: tables of four levels.
const FOUR_LEVELS: u64 = 2;
/// Words of the contexts of a slot, which has eight functions: two each.
const SLOT: u64 = 8 * 2;
/// In an entry of roots or contexts.
const PRESENT: u64 = 1;
/// In an entry of the other tables: may be read and written.
const ACCESS: u64 = 3;

/// What a table of the last level maps: 2 MiB, 2^9 pages.
const REGION: u64 = 1 << (PAGE_SHIFT + LEVEL_SHIFT);
const PAGE_SHIFT: u32 = PAGE.trailing_zeros();
const LEVEL_SHIFT: u32 = 9;

/// The IOMMU of a machine, and its tables: roots, contexts, and one of each of the four levels.
pub struct Iommu<'a> {
    qtest: &'a Qtest,
    tables: u64,
}

impl<'a> Iommu<'a> {
    /// So many pages are its tables.
    pub const TABLES: u64 = 6;

    /// Its tables are at this address, or will be: until then that is zeroed memory.
    pub fn new(qtest: &'a Qtest, tables: u64) -> Self {
        Self { qtest, tables }
    }

    /// Has it translate what the function in `slot` does, with nothing mapped. Pages can be then, those
    /// of the 2 MiB that `address` is in.
    pub fn enable(&self, slot: u8, address: u64) -> Result<()> {
        self.set(0, 0, self.table(1) | PRESENT)?;
        self.set(1, u64::from(slot) * SLOT, self.table(2) | PRESENT)?;
        self.set(1, u64::from(slot) * SLOT + 1, (DOMAIN << 8) | FOUR_LEVELS)?;
        for (table, level) in [(2, 3), (3, 2), (4, 1)] {
            self.set(table, index(address, level), self.table(table + 1) | ACCESS)?;
        }
        self.write(ROOT_TABLE, self.table(0))?;
        self.command(SET_ROOT_TABLE)?;
        self.write(CONTEXT_COMMAND, ALL_CONTEXTS)?;
        self.command(TRANSLATE)
    }

    /// Takes everything away from the function in `slot` at once: it has no context any more.
    pub fn detach(&self, slot: u8) -> Result<()> {
        self.set(1, u64::from(slot) * SLOT, 0)?;
        self.write(CONTEXT_COMMAND, ALL_CONTEXTS)?;
        self.write(INVALIDATE_IOTLB, ALL_PAGES)
    }

    /// Maps pages to the memory at the same addresses.
    pub fn map(&self, pages: Range<u64>) -> Result<()> {
        self.map_from(pages, 0)
    }

    /// Maps pages, `offset` bytes further than the memory is.
    pub fn map_from(&self, pages: Range<u64>, offset: u64) -> Result<()> {
        let further = offset / PAGE;
        let there = pages.start + further..pages.end + further;
        self.change(there, |iova| (iova - offset) | ACCESS)
    }

    /// Unmaps pages.
    pub fn unmap(&self, pages: Range<u64>) -> Result<()> {
        self.change(pages, |_| 0)
    }

    fn change(&self, pages: Range<u64>, entry: impl Fn(u64) -> u64) -> Result<()> {
        let region = (pages.start * PAGE) & !(REGION - 1);
        for page in pages {
            self.set(5, index(page * PAGE, 0), entry(page * PAGE))?;
        }
        self.write(INVALIDATE_ADDRESS, region | u64::from(LEVEL_SHIFT))?;
        self.write(INVALIDATE_IOTLB, PAGES_OF_DOMAIN)
    }

    fn table(&self, n: u64) -> u64 {
        self.tables + n * PAGE
    }

    fn set(&self, table: u64, word: u64, value: u64) -> Result<()> {
        Ok(self.qtest.write(self.table(table) + word * 8, Width::Quad, value)?)
    }

    fn write(&self, register: u64, value: u64) -> Result<()> {
        Ok(self.qtest.write(REGISTERS + register, Width::Quad, value)?)
    }

    /// Gives a command, and sees that it was done.
    fn command(&self, command: u64) -> Result<()> {
        self.qtest.write(REGISTERS + GLOBAL_COMMAND, Width::Long, command)?;
        let status = self.qtest.read(REGISTERS + GLOBAL_STATUS, Width::Long)?;
        ensure!(
            status & command != 0,
            "the IOMMU has status {status:#x} after command {command:#x}"
        );
        Ok(())
    }
}

/// Which entry of the table of this level, 0 is the last, an address has.
fn index(address: u64, level: u32) -> u64 {
    (address >> (PAGE_SHIFT + LEVEL_SHIFT * level)) & ((1 << LEVEL_SHIFT) - 1)
}
