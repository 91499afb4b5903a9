// SPDX-License-Identifier: GPL-2.0-only

//! How scenarios speak: short for operations that must succeed, or must fail as they say.
//!
//! Pages are counted from [`BASE`], so that no scenario passes because an IOVA was taken for an
//! offset.

use crate::{
    Op, PAGE, Testbed,
    testbed::{must, same, to_iova},
};
use anyhow::Result;
use dirty_model::{Errnos, Protection};
use harness::{Context, Failure};
use mdev_dma::Opcode;
use std::ops::Range;

/// The IOVA of page 0.
pub const BASE: u64 = 0x4000_0000;

/// The bytes of `pages`.
pub fn pages(pages: Range<u64>) -> Range<u64> {
    BASE + pages.start * PAGE..BASE + pages.end * PAGE
}

/// The IOVA of byte `offset` of `page`.
pub const fn at(page: u64, offset: u64) -> u64 {
    BASE + page * PAGE + offset
}

impl<'a> Testbed<'a> {
    /// A container with a device, and so many pages mapped for it to read and write.
    pub fn with_pages(context: &'a Context<'a>, count: u64) -> Result<Self> {
        let mut bed = Self::new(context)?;
        bed.map(0..count)?;
        Ok(bed)
    }

    /// A container with 64 pages, tracking, in which page 10 is pinned.
    pub fn with_pin(context: &'a Context<'a>) -> Result<Self> {
        let mut bed = Self::with_pages(context, 64)?;
        bed.pin(10..11)?;
        bed.start()?;
        Ok(bed)
    }

    /// Only page 10 may be pinned and dirty: see [`Self::with_pin`].
    pub fn has_only_pin(&mut self) -> Result<()> {
        self.reports(&[10..11])?;
        self.has_pins(1)?;
        self.check()
    }

    /// Does `op`, which must succeed.
    pub fn must(&mut self, op: Op) -> Result<()> {
        let answer = self.apply(op.clone())?;
        must(&op, &answer).map(drop)
    }

    /// Does `op`, which must fail with `errnos`: with this one, or with one of several where that is
    /// left open.
    pub fn refused(&mut self, errnos: impl Into<Errnos>, op: Op) -> Result<()> {
        let (owed, _) = self.apply_both(op.clone())?;
        let errnos = errnos.into();
        if owed.status == Err(errnos) {
            return Ok(());
        }
        // Kernel and model agree: it is the scenario that sees it otherwise.
        Err(Failure::new(format!("{op}: {owed}, but the scenario says {errnos}")).into())
    }

    /// Maps `pages` for reading and writing.
    pub fn map(&mut self, pages: Range<u64>) -> Result<()> {
        self.must(map(pages, Protection::READ_WRITE))
    }

    /// Unmaps `pages`.
    pub fn unmap(&mut self, pages: Range<u64>) -> Result<()> {
        let iova = at(pages.start, 0);
        self.must(Op::unmap(iova, (pages.end - pages.start) * PAGE))
    }

    /// Starts to track dirty pages.
    pub fn start(&mut self) -> Result<()> {
        self.must(Op::Start)
    }

    /// Stops it.
    pub fn stop(&mut self) -> Result<()> {
        self.must(Op::Stop)
    }

    /// Device 0 pins `pages`.
    pub fn pin(&mut self, range: Range<u64>) -> Result<()> {
        self.must(command(0, Opcode::Pin, pages(range)))
    }

    /// Device 0 unpins each of `pages` once.
    pub fn unpin(&mut self, range: Range<u64>) -> Result<()> {
        self.must(command(0, Opcode::Unpin, pages(range)))
    }

    /// Device 0 does a transfer to or from `bytes`.
    pub fn transfer(&mut self, op: Opcode, bytes: Range<u64>) -> Result<()> {
        self.must(command(0, op, bytes))
    }

    /// Device 0 writes to `bytes` by `vfio_dma_rw()`.
    pub fn dma_write(&mut self, bytes: Range<u64>) -> Result<()> {
        self.transfer(Opcode::DmaWrite, bytes)
    }

    /// All mappings, read as one range, must report `expected`: runs of pages, ascending and not
    /// touching. The model has an opinion, too.
    pub fn reports(&mut self, expected: &[Range<u64>]) -> Result<()> {
        let reported = self.read_whole()?;
        stated(expected, &reported)
    }

    /// As [`Self::reports`], each mapping read by itself: runs end where mappings do.
    pub fn each_reports(&mut self, expected: &[Range<u64>]) -> Result<()> {
        let reported = self.read_each()?;
        stated(expected, &reported)
    }

    /// Unmaps `range` with the bitmap, which must be `expected` as in [`Self::reports`].
    pub fn unmap_reports(&mut self, range: Range<u64>, expected: &[Range<u64>]) -> Result<()> {
        let iova = at(range.start, 0);
        let op = Op::unmap_bitmap(iova, (range.end - range.start) * PAGE);
        let answer = self.apply(op.clone())?;
        let bitmap = must(&op, &answer)?.bitmap.as_ref();
        stated(expected, &to_iova(bitmap.map(|b| b.runs()).unwrap_or_default(), iova))
    }

    /// The process writes to `bytes`.
    pub fn user_write(&mut self, bytes: Range<u64>) -> Result<()> {
        let (iova, length) = (bytes.start, bytes.end - bytes.start);
        self.must(Op::UserWrite { iova, length, seed: !iova })
    }

    /// Device 0 must hold so many pins.
    pub fn has_pins(&self, expected: u64) -> Result<()> {
        same("PINS", expected, self.device(0).pins()?)
    }
}

/// Maps `pages`.
pub fn map(pages: Range<u64>, protection: Protection) -> Op {
    Op::map(at(pages.start, 0), (pages.end - pages.start) * PAGE, protection)
}

/// A command of a device for `bytes`. What it writes is different from what any other such command
/// writes, as long as it begins at another place or has another length.
pub fn command(device: usize, op: Opcode, bytes: Range<u64>) -> Op {
    let (iova, length) = (bytes.start, bytes.end - bytes.start);
    let seed = match op {
        Opcode::Write | Opcode::DmaWrite => iova ^ length.rotate_left(32) ^ op as u64,
        _ => 0,
    };
    Op::Command { device, op: op as u32, iova, length, seed }
}

fn stated(expected: &[Range<u64>], reported: &[Range<u64>]) -> Result<()> {
    let expected: Vec<_> = expected.iter().cloned().map(pages).collect();
    if expected == reported {
        return Ok(());
    }
    // Kernel and model agree: it is the scenario that sees it otherwise.
    let what = format!("dirty is {reported:x?}, but the scenario says {expected:x?}");
    Err(Failure::new(what).into())
}
