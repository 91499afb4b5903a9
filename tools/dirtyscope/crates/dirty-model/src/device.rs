// SPDX-License-Identifier: GPL-2.0-only

use crate::{Errno, Errnos};
use std::{collections::BTreeMap, ops::Range};

/// What a device takes on, and how it cuts its commands. The limits are read from its registers, the
/// cuts are constants of `include/uapi/linux/rust_mdev_dma.h`.
#[derive(Clone, Copy, Debug, Hash)]
pub struct Limits {
    /// Pins held at once.
    pub max_pins: u64,
    /// Pins of one page.
    pub page_pins: u32,
    /// Bytes of one command.
    pub max_length: u64,
    /// One `vfio_pin_pages()` stays inside an aligned block of so many bytes.
    pub pin_batch: u64,
    /// One `vfio_dma_rw()` stays inside an aligned block of so many bytes.
    pub dma_chunk: u64,
    /// Pages of one raw pin, if it has these.
    pub raw_pages: Option<u64>,
}

/// What a command does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommandKind {
    /// Pins whole pages, for reading and writing.
    Pin,
    /// Unpins each page once.
    Unpin,
    /// Writes the pattern through pinned pages.
    Write,
    /// Reads through pinned pages.
    Read,
    /// Writes the pattern by `vfio_dma_rw()`.
    DmaWrite,
    /// Reads by `vfio_dma_rw()`.
    DmaRead,
    /// Pins `length` bytes of pages, from that which contains `iova` on, with this protection.
    RawPin(u64),
    /// Unpins what one such pin took.
    RawUnpin(u64),
    /// Writes the pattern through its pages, from `iova` on.
    RawWrite,
    /// Reads through them.
    RawRead,
}

/// A command, over the bytes `[iova, iova + length)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command {
    /// `None` stands for any number that is no operation.
    pub kind: Option<CommandKind>,
    /// First byte.
    pub iova: u64,
    /// Bytes.
    pub length: u64,
}

/// How a command ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommandOutcome {
    /// What STATUS must say.
    pub status: Result<(), Errnos>,
    /// What COUNT must say.
    pub count: u64,
    /// Bytes from IOVA on that were transferred. More than `count` if a `vfio_dma_rw()` failed
    /// behind its first mapping, else the same; 0 for PIN and UNPIN.
    pub transferred: u64,
}

/// What one `vfio_pin_pages()` with any IOVA and protection has pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RawPin {
    /// Where the device wanted it, anywhere in the first page.
    pub iova: u64,
    /// Bytes of its pages.
    pub length: u64,
    /// What the device asked for.
    pub protection: u64,
}

impl RawPin {
    /// Its pages, by their first byte; the last may be that of the address space.
    pub(crate) fn pages(&self, page_size: u64) -> impl Iterator<Item = u64> + use<> {
        let first = self.iova - self.iova % page_size;
        (0..self.length / page_size).map(move |i| first + i * page_size)
    }

    /// Its first and its last byte.
    pub(crate) fn span(&self, page_size: u64) -> (u64, u64) {
        let first = self.iova - self.iova % page_size;
        (first, first + (self.length - 1))
    }
}

/// A device's pins: how many of which page, by IOVA, and those that are taken and returned as a whole.
#[derive(Clone, Debug, Hash)]
pub(crate) struct Device {
    pub(crate) group: u32,
    pub(crate) limits: Limits,
    page_size: u64,
    pins: BTreeMap<u64, u32>,
    raw: Vec<RawPin>,
    held: u64,
}

impl Device {
    pub(crate) fn new(group: u32, limits: Limits, page_size: u64) -> Self {
        Self { group, limits, page_size, pins: BTreeMap::new(), raw: Vec::new(), held: 0 }
    }

    /// The range of a command, if it is one.
    pub(crate) fn check_range(&self, command: &Command) -> Result<Range<u64>, Errno> {
        if command.length == 0 {
            return Err(Errno::EINVAL);
        }
        let end = command.iova.checked_add(command.length).ok_or(Errno::EOVERFLOW)?;
        if command.length > self.limits.max_length {
            return Err(Errno::E2BIG);
        }
        Ok(command.iova..end)
    }

    pub(crate) fn held(&self) -> u64 {
        self.held
    }

    /// The pages in `range` that PIN has pinned.
    pub(crate) fn pinned(&self, range: Range<u64>) -> impl Iterator<Item = u64> {
        self.pins.range(range).map(|(&page, _)| page)
    }

    pub(crate) fn raw(&self) -> &[RawPin] {
        &self.raw
    }

    /// The pages in `range` that are pinned in any way, some of them more than once.
    pub(crate) fn all_in(&self, range: Range<u64>) -> impl Iterator<Item = u64> {
        let (page_size, within) = (self.page_size, range.clone());
        let raw = self.raw.iter().flat_map(move |pin| {
            let first = pin.span(page_size).0;
            (0..pin.length / page_size).map(move |i| first + i * page_size)
        });
        self.pinned(range).chain(raw.filter(move |page| within.contains(page)))
    }

    /// Whether `page` is pinned in any way.
    pub(crate) fn has(&self, page: u64) -> bool {
        let raw = |pin: &RawPin| {
            let (first, last) = pin.span(self.page_size);
            (first..=last).contains(&page)
        };
        self.pins.contains_key(&page) || self.raw.iter().any(raw)
    }

    pub(crate) fn raw_pin(&mut self, pin: RawPin) {
        self.held += pin.length / self.page_size;
        self.raw.push(pin);
    }

    /// Drops a raw pin, if there is such a one.
    pub(crate) fn raw_unpin(&mut self, pin: RawPin) -> Result<(), Errno> {
        let found = self.raw.iter().position(|&one| one == pin).ok_or(Errno::ENXIO)?;
        self.raw.remove(found);
        self.held -= pin.length / self.page_size;
        Ok(())
    }

    pub(crate) fn all_pinned(&self, mut pages: impl Iterator<Item = u64>) -> bool {
        pages.all(|page| self.pins.contains_key(&page))
    }

    /// Whether `page` can be pinned once more.
    pub(crate) fn has_room_for(&self, page: u64) -> bool {
        self.pins.get(&page).is_none_or(|&count| count < self.limits.page_pins)
    }

    pub(crate) fn pin(&mut self, page: u64) {
        *self.pins.entry(page).or_insert(0) += 1;
        self.held += 1;
    }

    /// Unpins `page` once, which is pinned.
    pub(crate) fn unpin(&mut self, page: u64) {
        if let Some(count) = self.pins.get_mut(&page) {
            *count -= 1;
            self.held -= 1;
            if *count == 0 {
                self.pins.remove(&page);
            }
        }
    }

    /// Drops all pins of the pages in `range`, and raw pins that have one of them.
    pub(crate) fn revoke(&mut self, range: Range<u64>) {
        let (held, page_size) = (&mut self.held, self.page_size);
        self.raw.retain(|pin| {
            let (first, last) = pin.span(page_size);
            let kept = first >= range.end || last < range.start;
            if !kept {
                *held -= pin.length / page_size;
            }
            kept
        });
        self.pins.retain(|page, count| {
            let kept = !range.contains(page);
            if !kept {
                *held -= u64::from(*count);
            }
            kept
        });
    }

    pub(crate) fn revoke_all(&mut self) {
        self.pins.clear();
        self.raw.clear();
        self.held = 0;
    }
}

/// Cuts `range` at multiples of `size`.
pub(crate) fn cut(range: Range<u64>, size: u64) -> impl Iterator<Item = Range<u64>> {
    let mut next = range.start;
    std::iter::from_fn(move || {
        if next >= range.end {
            return None;
        }
        let start = next;
        next = (start - start % size).saturating_add(size).min(range.end);
        Some(start..next)
    })
}

/// The pages that `range` touches, by their first byte.
pub(crate) fn pages(range: Range<u64>, page_size: u64) -> impl Iterator<Item = u64> {
    cut(range, page_size).map(move |part| part.start - part.start % page_size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cut_is_aligned_and_complete() {
        let parts: Vec<_> = cut(10..25, 8).collect();
        assert_eq!(parts, [10..16, 16..24, 24..25]);
        assert_eq!(cut(8..8, 8).count(), 0);
        assert_eq!(cut(u64::MAX - 3..u64::MAX, 8).count(), 1);
    }

    #[test]
    fn pages_of_bytes() {
        let touched: Vec<_> = pages(0x1fff..0x3001, 0x1000).collect();
        assert_eq!(touched, [0x1000, 0x2000, 0x3000]);
    }
}
