// SPDX-License-Identifier: GPL-2.0

//! Runs commands: see the uapi header for operations, errors, and how commands are split.

#![expect(
    clippy::indexing_slicing,
    reason = "ranges are those of a chunk, which the buffer has room for"
)]

use super::{
    command::{whole_pages, Command, Limits, Outcome},
    pattern::{words_of, Block, Digest, STRIDE, WORD},
    MdevDma,
};
use crate::{
    abstractions::{
        page::PageMemory,
        vfio::{OpenDevice, Pins, RawRange, BATCH_PAGES, PAGE_PINS},
    },
    bindings::{
        rust_mdev_dma_op_RUST_MDEV_DMA_OP_DMA_READ as DMA_READ,
        rust_mdev_dma_op_RUST_MDEV_DMA_OP_DMA_WRITE as DMA_WRITE,
        rust_mdev_dma_op_RUST_MDEV_DMA_OP_PIN as PIN,
        rust_mdev_dma_op_RUST_MDEV_DMA_OP_RAW_PIN as RAW_PIN,
        rust_mdev_dma_op_RUST_MDEV_DMA_OP_RAW_READ as RAW_READ,
        rust_mdev_dma_op_RUST_MDEV_DMA_OP_RAW_UNPIN as RAW_UNPIN,
        rust_mdev_dma_op_RUST_MDEV_DMA_OP_RAW_WRITE as RAW_WRITE,
        rust_mdev_dma_op_RUST_MDEV_DMA_OP_READ as READ,
        rust_mdev_dma_op_RUST_MDEV_DMA_OP_UNPIN as UNPIN,
        rust_mdev_dma_op_RUST_MDEV_DMA_OP_WRITE as WRITE, RUST_MDEV_DMA_DMA_CHUNK,
        RUST_MDEV_DMA_PAGE_PINS, RUST_MDEV_DMA_PATTERN_BLOCK, RUST_MDEV_DMA_PIN_BATCH,
    },
};
use core::ops::Range;
use kernel::{page::PAGE_SIZE, prelude::*};

const PAGE: u64 = PAGE_SIZE as u64;
const CHUNK: usize = RUST_MDEV_DMA_DMA_CHUNK as usize;

const _: () = assert!(PAGE_PINS as u32 == RUST_MDEV_DMA_PAGE_PINS);
const _: () = assert!(BATCH_PAGES == RUST_MDEV_DMA_PIN_BATCH as usize);
// The code below takes a page for a block of the pattern.
const _: () = assert!(PAGE_SIZE == RUST_MDEV_DMA_PATTERN_BLOCK as usize);

/// Runs commands.
pub(super) struct Engine {
    limits: Limits,
    /// The memory of one chunk, for `vfio_dma_rw()` to copy from or to.
    buffer: KVVec<u64>,
}

impl Engine {
    /// OPS: bit n is set if operation n exists.
    pub(super) fn ops(raw_pins: bool) -> u32 {
        const OPS: u32 =
            1 << PIN | 1 << UNPIN | 1 << WRITE | 1 << READ | 1 << DMA_WRITE | 1 << DMA_READ;
        const RAW: u32 = 1 << RAW_PIN | 1 << RAW_UNPIN | 1 << RAW_WRITE | 1 << RAW_READ;

        if raw_pins {
            OPS | RAW
        } else {
            OPS
        }
    }

    pub(super) fn new(limits: Limits) -> Result<Self> {
        Ok(Self {
            limits,
            buffer: KVVec::from_elem(0, CHUNK / WORD, GFP_KERNEL_ACCOUNT)?,
        })
    }

    /// Reserves the memory that `command` needs to run in the background, where it would be charged to
    /// nobody.
    pub(super) fn reserve(&self, dev: &OpenDevice<MdevDma>, command: &Command) -> Result {
        if command.op != PIN {
            return Ok(());
        }
        match self.limits.range(command).and_then(whole_pages) {
            Ok(range) if command.length / PAGE <= self.limits.pins => dev.pins().reserve(&range),
            // It fails when it runs.
            _ => Ok(()),
        }
    }

    /// Runs `command` to completion.
    pub(super) fn run(&mut self, dev: &OpenDevice<MdevDma>, command: &Command) -> Outcome {
        let mut outcome = Outcome::default();
        if let Err(e) = self.try_run(dev, command, &mut outcome) {
            outcome.status = e.to_errno().unsigned_abs();
        }
        outcome
    }

    fn try_run(
        &mut self,
        dev: &OpenDevice<MdevDma>,
        command: &Command,
        outcome: &mut Outcome,
    ) -> Result {
        let &Command { op, length, .. } = command;
        if !self.limits.offers(op) {
            return Err(EOPNOTSUPP);
        }
        if op >= RAW_PIN {
            return self.raw(dev, command, outcome);
        }
        let range = self.limits.range(command)?;

        match op {
            PIN => self.pin(dev, range)?,
            UNPIN => dev.pins().unpin(whole_pages(range)?)?,
            WRITE => write_pinned(&dev.pins(), range, command.seed)?,
            READ => outcome.digest = read_pinned(&dev.pins(), range)?,
            DMA_WRITE => return self.dma_write(dev, range, command.seed, &mut outcome.count),
            _ => {
                outcome.digest = self.dma_read(dev, range, &mut outcome.count)?;
                return Ok(());
            }
        }
        outcome.count = length;
        Ok(())
    }

    fn pin(&self, dev: &OpenDevice<MdevDma>, range: Range<u64>) -> Result {
        let range = whole_pages(range)?;
        let pages = range.end.saturating_sub(range.start) / PAGE;
        let mut pins = dev.pins();
        if pages > self.limits.pins.saturating_sub(pins.held()) {
            return Err(ENOSPC);
        }
        pins.pin(range)
    }

    /// An operation on raw pins. Not inline, so that others don't pay for it.
    #[inline(never)]
    fn raw(&self, dev: &OpenDevice<MdevDma>, command: &Command, outcome: &mut Outcome) -> Result {
        let &Command {
            op,
            iova,
            length,
            seed,
        } = command;
        if length % PAGE != 0 {
            return Err(EINVAL);
        }
        // What RAW_WRITE and RAW_READ need is up to them.
        let protection = match op {
            RAW_PIN | RAW_UNPIN => seed.try_into()?,
            _ => 0,
        };
        if length > self.limits.length {
            return Err(E2BIG);
        }
        let range = RawRange {
            iova,
            pages: (length / PAGE).try_into()?,
            protection,
        };
        let mut pins = dev.pins();
        match op {
            RAW_PIN if u64::from(range.pages) > self.limits.pins.saturating_sub(pins.held()) => {
                return Err(ENOSPC);
            }
            RAW_PIN => pins.raw_pin(range)?,
            RAW_UNPIN => pins.raw_unpin(range)?,
            _ => {
                let offset = iova % PAGE;
                (iova & !(PAGE - 1)).checked_add(length).ok_or(EOVERFLOW)?;
                if op == RAW_WRITE {
                    pins.raw_write(range, |page, bytes, memory| {
                        write_page(memory, bytes, Block::of(seed, page));
                    })?;
                } else {
                    let mut digest = Digest::new();
                    pins.raw_read(range, |_page, bytes, memory| {
                        memory.read_words(words_of(&bytes), |i, word| digest.add(&bytes, i, word));
                    })?;
                    outcome.digest = digest.value();
                }
                // A raw pin has at least one page.
                outcome.count = length.saturating_sub(offset);
                return Ok(());
            }
        }
        outcome.count = length;
        Ok(())
    }

    fn dma_write(
        &mut self,
        dev: &OpenDevice<MdevDma>,
        range: Range<u64>,
        seed: u64,
        count: &mut u64,
    ) -> Result {
        for (chunk, bytes) in chunks(range) {
            check_interrupted(dev)?;
            for (page, bytes) in pages(&bytes) {
                let block = Block::of(seed, chunk.wrapping_add(page as u64));
                let words = &mut self.buffer[page / WORD..page.wrapping_add(PAGE_SIZE) / WORD];
                block.fill(words, words_of(&bytes));
            }
            dev.dma_write(
                chunk.wrapping_add(bytes.start as u64),
                &self.buffer.as_bytes()[bytes.clone()],
            )?;
            *count = count.wrapping_add(bytes.len() as u64);
        }
        Ok(())
    }

    fn dma_read(
        &mut self,
        dev: &OpenDevice<MdevDma>,
        range: Range<u64>,
        count: &mut u64,
    ) -> Result<u64> {
        let mut digest = Digest::new();
        for (chunk, bytes) in chunks(range) {
            check_interrupted(dev)?;
            let data = &mut self.buffer.as_mut_bytes()[bytes.clone()];
            dev.dma_read(chunk.wrapping_add(bytes.start as u64), data)?;
            for i in words_of(&bytes) {
                digest.add(&bytes, i, u64::from_le(self.buffer[i]));
            }
            *count = count.wrapping_add(bytes.len() as u64);
        }
        Ok(digest.value())
    }
}

/// Fails with `EINTR` after a signal, or while the device is reset or closed.
fn check_interrupted(dev: &OpenDevice<MdevDma>) -> Result {
    if dev.interrupted() {
        return Err(EINTR);
    }
    Ok(())
}

/// Splits `range` at multiples of `SIZE`, a power of 2: the multiple before each part, and the part
/// relative to it.
fn split<const SIZE: usize>(range: Range<u64>) -> impl Iterator<Item = (u64, Range<usize>)> {
    const { assert!(SIZE.is_power_of_two()) };
    let size = SIZE as u64;
    let mut next = range.start;
    core::iter::from_fn(move || {
        if next >= range.end {
            return None;
        }
        let within = next & size.wrapping_sub(1);
        let unit = next.wrapping_sub(within);
        let first = within as usize;
        let last = range.end.wrapping_sub(unit).min(size) as usize;
        next = unit.saturating_add(size);
        Some((unit, first..last))
    })
}

/// Splits a range of IOVA at chunks: each chunk's IOVA, and the bytes of it that are in the range.
fn chunks(range: Range<u64>) -> impl Iterator<Item = (u64, Range<usize>)> {
    split::<CHUNK>(range)
}

/// Splits bytes of a chunk at pages.
fn pages(bytes: &Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> {
    let bytes = bytes.start as u64..bytes.end as u64;
    split::<PAGE_SIZE>(bytes).map(|(page, bytes)| (page as usize, bytes))
}

/// Writes the pattern of `seed` through pinned pages.
pub(super) fn write_pinned(pins: &Pins<'_, MdevDma>, range: Range<u64>, seed: u64) -> Result {
    pins.access_to_write(range, |page, bytes, memory| {
        write_page(memory, bytes, Block::of(seed, page));
    })
}

/// Writes `bytes` of a page.
#[inline]
fn write_page(memory: &PageMemory<'_>, bytes: Range<usize>, block: Block) {
    if bytes == (0..PAGE_SIZE) {
        memory.write_words(0..PageMemory::WORDS, |i| block.words::<STRIDE>(i));
    } else {
        write_part(memory, bytes, block);
    }
}

/// Writes `bytes` of a page: whole words at once, the others byte by byte.
#[inline(never)]
fn write_part(memory: &PageMemory<'_>, bytes: Range<usize>, block: Block) {
    let words = bytes.start.div_ceil(WORD)..bytes.end / WORD;
    let head = bytes.start..bytes.end.min(words.start.wrapping_mul(WORD));
    let tail = head.end.max(words.end.wrapping_mul(WORD))..bytes.end;

    memory.write_bytes(head, |i| block.byte(i));
    memory.write_words(words, |i| [block.word(i)]);
    memory.write_bytes(tail, |i| block.byte(i));
}

/// Reads through pinned pages and returns the digest.
fn read_pinned(pins: &Pins<'_, MdevDma>, range: Range<u64>) -> Result<u64> {
    let mut digest = Digest::new();
    pins.access(range, |_page, bytes, memory| {
        memory.read_words(words_of(&bytes), |i, word| digest.add(&bytes, i, word));
    })?;
    Ok(digest.value())
}
