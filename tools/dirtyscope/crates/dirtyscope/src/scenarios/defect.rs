// SPDX-License-Identifier: GPL-2.0-only

//! Defects of type1, each with the shortest sequence that shows it: see `Documentation/findings/`.
//!
//! They state what the contract says, as all scenarios do. That kernels are known to fail them is
//! said by their names: see [`Scenario::defect`].

use super::{Context, Scenario};
use crate::testbed::{Failure, Op, PAGE, Testbed, at, command, map, pages, status};
use anyhow::{Result, ensure};
use dirty_model::{Errno, Protection};
use mdev_dma::Op as Device;
use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    os::unix::fs::OpenOptionsExt,
    time::{Duration, Instant},
};
use vfio_client::{BitmapArgs, Memory, UnmapArgs};

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "defect/D1-pgsize-0",
        about: "GET_BITMAP with a page size of 0 is refused without undefined behaviour",
        run: pgsize_0,
    },
    Scenario {
        name: "defect/D3-read-cost",
        about: "reading the last of many mappings costs about as much as reading the first",
        run: read_cost,
    },
    Scenario {
        name: "defect/D5-pin-unwind",
        about: "a batch of pins that fails in the middle leaves nothing dirty",
        run: pin_unwind,
    },
    Scenario {
        name: "defect/D6-shift-stale",
        about: "a mapping that was read at an odd place of a bitmap has no pages after its end",
        run: shift_stale,
    },
    Scenario {
        name: "defect/D6-shift-fault",
        about: "a read at an odd place that faults leaves the mapping's dirty pages where they are",
        run: shift_fault,
    },
    Scenario {
        name: "defect/D7-read-consumes",
        about: "a read of two mappings that faults in the second forgets nothing of the first",
        run: read_consumes,
    },
    Scenario {
        name: "defect/D8-unmap-partial",
        about: "an unmap with bitmap that faults in the second mapping unmaps nothing",
        run: unmap_partial,
    },
    Scenario {
        name: "defect/D9-dma-rw-partial",
        about: "what a vfio_dma_rw() wrote before it faulted is dirty",
        run: dma_rw_partial,
    },
];

fn pgsize_0(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 1)?;
    bed.start()?;
    let mut messages = Messages::from_now()?;
    let bitmap = BitmapArgs { pgsize: 0, size: 8 };
    context.expect_complaint(|| {
        let refused = status(bed.container().dirty_bitmap(at(0, 0), PAGE, &bitmap))?;
        ensure!(refused == Err(Errno::EINVAL), "GET_BITMAP with pgsize 0: {refused:?}");
        Ok(())
    })?;
    let text = messages.read()?;
    differs_if(text.lines().find(|line| line.contains("UBSAN")).map(str::to_owned))
}

/// Fails with `what` there is, if any.
fn differs_if(what: Option<String>) -> Result<()> {
    what.map_or(Ok(()), |what| Err(Failure { what, ..Default::default() }.into()))
}

/// What the kernel logs from now on.
struct Messages(File);

impl Messages {
    fn from_now() -> Result<Self> {
        const O_NONBLOCK: i32 = 0o4000;
        let mut file = File::options().read(true).custom_flags(O_NONBLOCK).open("/dev/kmsg")?;
        file.seek(SeekFrom::End(0))?;
        Ok(Self(file))
    }

    /// All until now; a read gives one message.
    fn read(&mut self) -> Result<String> {
        let mut text = String::new();
        let mut message = [0; 8192];
        while let Ok(len @ 1..) = self.0.read(&mut message) {
            text.push_str(&String::from_utf8_lossy(&message[..len]));
        }
        Ok(text)
    }
}

fn read_cost(context: &Context<'_>) -> Result<()> {
    const MAPPINGS: u64 = 4000;
    const READS: u32 = 20;
    let mut bed = Testbed::new(context)?;
    for i in 0..MAPPINGS {
        bed.map(2 * i..2 * i + 1)?;
    }
    bed.start()?;
    let mut time = |page: u64| -> Result<Duration> {
        let start = Instant::now();
        for _ in 0..READS {
            bed.must(Op::GetBitmap { iova: at(page, 0), size: PAGE })?;
        }
        Ok(start.elapsed())
    };
    // The best of some: other work on the machine only ever adds.
    let mut best = |page| (0..5).map(|_| time(page)).collect::<Result<Vec<_>>>();
    let first = best(0)?.into_iter().min().unwrap_or_default();
    let last = best(2 * (MAPPINGS - 1))?.into_iter().min().unwrap_or_default();
    differs_if((last >= 4 * first).then(|| {
        format!(
            "the last of {MAPPINGS} mappings takes {:.0?} to read, the first {:.0?}",
            last / READS,
            first / READS
        )
    }))
}

fn pin_unwind(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::with_pages(context, 4)?;
    bed.start()?;
    bed.refused(Errno::EINVAL, command(0, Device::Pin, pages(0..5)))?;
    bed.check()
}

fn shift_stale(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::new(context)?;
    bed.map(1..61)?;
    bed.start()?;
    bed.dma_write(pages(60..61))?;
    bed.must(Op::GetBitmap { iova: at(0, 0), size: 64 * PAGE })?;
    bed.must(Op::GetBitmap { iova: at(1, 0), size: 60 * PAGE })?;
    bed.check()
}

fn shift_fault(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::new(context)?;
    bed.map(1..61)?;
    bed.start()?;
    bed.dma_write(pages(5..6))?;
    let nowhere = Memory::with_guard(PAGE as usize, PAGE as usize)?;
    let bitmap = BitmapArgs { pgsize: PAGE, size: 8 };
    context.note("GET_BITMAP of pages 0..64 into memory that isn't there");
    let container = bed.container();
    let read = container.dirty_bitmap_into(at(0, 0), 64 * PAGE, &bitmap, &nowhere, PAGE as usize);
    let refused = status(read)?;
    ensure!(refused == Err(Errno::EFAULT), "a read that faults: {refused:?}");
    bed.read_each()?;
    bed.check()
}

/// Two mappings of 64 pages, a word of bitmap each, and memory for the first word only.
fn two_mappings<'a>(context: &'a Context<'a>) -> Result<(Testbed<'a>, Memory)> {
    let mut bed = Testbed::new(context)?;
    bed.must(map(0..64, Protection::READ_WRITE))?;
    bed.must(map(64..128, Protection::READ_WRITE))?;
    bed.start()?;
    bed.dma_write(pages(3..4))?;
    Ok((bed, Memory::with_guard(PAGE as usize, PAGE as usize)?))
}

/// A bitmap of two words.
const TWO_WORDS: BitmapArgs = BitmapArgs { pgsize: PAGE, size: 16 };

/// Where in a page it begins so that its second word is in the next one.
const LAST_WORD: usize = PAGE as usize - 8;

fn read_consumes(context: &Context<'_>) -> Result<()> {
    let (mut bed, memory) = two_mappings(context)?;
    context.note("GET_BITMAP of pages 0..128 into memory that ends after a word");
    let container = bed.container();
    let read = container.dirty_bitmap_into(at(0, 0), 128 * PAGE, &TWO_WORDS, &memory, LAST_WORD);
    let refused = status(read)?;
    ensure!(refused == Err(Errno::EFAULT), "a read that faults: {refused:?}");
    bed.check()
}

fn unmap_partial(context: &Context<'_>) -> Result<()> {
    let (mut bed, memory) = two_mappings(context)?;
    context.note("UNMAP of pages 0..128 with bitmap into memory that ends after a word");
    let args = UnmapArgs { iova: at(0, 0), size: 128 * PAGE, ..Default::default() };
    let container = bed.container();
    let refused = status(container.unmap_dirty_into(&args, &TWO_WORDS, &memory, LAST_WORD))?;
    ensure!(refused == Err(Errno::EFAULT), "an unmap that faults: {refused:?}");
    bed.check()
}

fn dma_rw_partial(context: &Context<'_>) -> Result<()> {
    let mut bed = Testbed::new(context)?;
    bed.must(Op::MapPart { iova: at(0, 0), size: 2 * PAGE, backed: PAGE })?;
    bed.start()?;
    bed.refused(Errno::EFAULT, command(0, Device::DmaWrite, pages(0..2)))?;
    bed.check()
}
