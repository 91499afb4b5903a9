// SPDX-License-Identifier: GPL-2.0

//! Pinned pages of a VFIO device.

#![expect(
    clippy::indexing_slicing,
    reason = "`parts()` makes all ranges of pages, which are in a batch"
)]

use super::raw_pins::RawPins;
use crate::{abstractions::page::PageMemory, bindings};
use core::{ops::Range, ptr::NonNull};
use kernel::{
    error::to_result,
    page::{PAGE_SHIFT, PAGE_SIZE},
    prelude::*,
    rbtree::{RBTree, RBTreeNodeReservation},
};
use pin_init::init_zeroed;

/// Pages of a batch, the naturally aligned range of IOVA that one `vfio_pin_pages()` stays inside.
///
/// At most `VFIO_PIN_PAGES_MAX_ENTRIES`. Small, because a batch takes 704 bytes, in two
/// allocations, even if only one of its pages is pinned.
pub(crate) const BATCH_PAGES: usize = 64;

/// Maximum number of pins of one page.
pub(crate) const PAGE_PINS: u16 = u16::MAX;

const BATCH_SIZE: u64 = (BATCH_PAGES * PAGE_SIZE) as u64;

/// The number of pages that one `vfio_pin_pages()` may take, and that one `vfio_unpin_pages()`
/// returns.
///
/// type1 counts the pins of each page: parts of what was pinned may be returned, and several pins
/// at once. iommufd counts those of each range, and wants the ranges back that were pinned. Pages
/// are returned in other ranges than they were pinned in, so there each is a range of its own.
///
/// # Safety
///
/// `vdev` is open.
unsafe fn pages_per_call(_vdev: NonNull<bindings::vfio_device>) -> usize {
    // SAFETY: The caller promises that the device is open, and VFIO sets this only before that.
    #[cfg(CONFIG_IOMMUFD)]
    if !unsafe { (*_vdev.as_ptr()).iommufd_access }.is_null() {
        return 1;
    }
    BATCH_PAGES
}

/// The pinned pages of one batch.
///
/// Dropping it unpins them.
///
/// # Invariants
///
/// - This object owns `counts[i]` pins, taken by `vfio_pin_pages()` for `vdev`, of the page at
///   `iova + i * PAGE_SIZE`. If `counts[i]` isn't 0, `pages[i]` is that page.
/// - `held` is the sum of `counts`.
/// - If `held` isn't 0, `vdev` is open.
struct PinnedPages {
    vdev: NonNull<bindings::vfio_device>,
    iova: u64,
    pages: KBox<[*mut bindings::page; BATCH_PAGES]>,
    counts: [u16; BATCH_PAGES],
    held: u32,
}

// SAFETY: Pins belong to the device, not to the thread that took them.
unsafe impl Send for PinnedPages {}

/// The memory of a batch.
struct Room {
    node: RBTreeNodeReservation<u64, PinnedPages>,
    pages: KBox<[*mut bindings::page; BATCH_PAGES]>,
}

// SAFETY: There are no pages yet, this is only memory.
unsafe impl Send for Room {}

impl Room {
    fn new() -> Result<Self> {
        Ok(Self {
            node: RBTreeNodeReservation::new(GFP_KERNEL_ACCOUNT)?,
            pages: KBox::init(init_zeroed(), GFP_KERNEL_ACCOUNT)?,
        })
    }
}

impl PinnedPages {
    fn new(
        vdev: NonNull<bindings::vfio_device>,
        iova: u64,
        pages: KBox<[*mut bindings::page; BATCH_PAGES]>,
    ) -> Self {
        // INVARIANT: There are no pins yet.
        Self {
            vdev,
            iova,
            pages,
            counts: [0; BATCH_PAGES],
            held: 0,
        }
    }

    fn is_empty(&self) -> bool {
        self.held == 0
    }

    fn all_pinned(&self, pages: Range<usize>) -> bool {
        !self.counts[pages].contains(&0)
    }

    fn iova_of(&self, page: usize) -> u64 {
        self.iova.wrapping_add((page << PAGE_SHIFT) as u64)
    }

    /// Adds one pin to each of `pages`, or to none.
    ///
    /// # Safety
    ///
    /// `vdev` is open, and stays so until these pages have been unpinned.
    unsafe fn pin(&mut self, pages: Range<usize>) -> Result {
        // A page can only have `PAGE_PINS` pins if the batch has.
        if self.held >= u32::from(PAGE_PINS) && self.counts[pages.clone()].contains(&PAGE_PINS) {
            return Err(ENOSPC);
        }

        // `vfio_pin_pages()` overwrites the entries of pages that are already pinned: with the same
        // page if it succeeds, with arbitrary values if it fails.
        let before = (self.held != 0).then(|| *self.pages);
        // SAFETY: The caller promises that `vdev` is open.
        let step = unsafe { pages_per_call(self.vdev) };
        let mut next = pages.start;
        while next < pages.end {
            let part = next..next.saturating_add(step).min(pages.end);
            // SAFETY: `vdev` is open, and there is an entry for each of the pages.
            let ret = unsafe {
                bindings::vfio_pin_pages(
                    self.vdev.as_ptr(),
                    self.iova_of(part.start),
                    part.len() as c_int,
                    (bindings::IOMMU_READ | bindings::IOMMU_WRITE) as c_int,
                    self.pages[part.clone()].as_mut_ptr(),
                )
            };

            // INVARIANT: `vfio_pin_pages()` pinned the first `ret` of the pages.
            let pinned = (ret.max(0) as usize).min(part.len());
            next = part.start.wrapping_add(pinned);
            for count in &mut self.counts[part.start..next] {
                // None was `PAGE_PINS`.
                *count = count.wrapping_add(1);
            }
            self.held = self.held.wrapping_add(pinned as u32);
            if next < part.end {
                // INVARIANT: The pages that are still pinned are those that were pinned before.
                self.unpin(pages.start..next);
                if let Some(before) = before {
                    *self.pages = before;
                }
                to_result(ret.min(0))?;
                return Err(EFAULT);
            }
        }
        Ok(())
    }

    /// Removes one pin of each of `pages`. Does nothing unless all of them are pinned.
    fn unpin(&mut self, pages: Range<usize>) {
        if pages.is_empty() || !self.all_pinned(pages.clone()) {
            return;
        }

        // INVARIANT: The pages are unpinned below.
        for count in &mut self.counts[pages.clone()] {
            // None was 0.
            *count = count.wrapping_sub(1);
        }
        self.held = self.held.wrapping_sub(pages.len() as u32);
        // SAFETY: By the type invariant the device is open: there were pins.
        let step = unsafe { pages_per_call(self.vdev) };
        let mut next = pages.start;
        while next < pages.end {
            let end = next.saturating_add(step).min(pages.end);
            // SAFETY: By the type invariant the device is open, and `self` owned a pin of each page.
            unsafe {
                bindings::vfio_unpin_pages(
                    self.vdev.as_ptr(),
                    self.iova_of(next),
                    end.wrapping_sub(next) as c_int,
                )
            };
            next = end;
        }
    }

    /// Runs of pages with the same number of pins, and that number.
    fn runs(&self) -> impl Iterator<Item = (Range<u64>, u16)> + '_ {
        let mut next = 0;
        core::iter::from_fn(move || {
            let skipped = self.counts[next..].iter().position(|&count| count > 0)?;
            let start = next.wrapping_add(skipped);
            let count = self.counts[start];
            next = self.counts[start..]
                .iter()
                .position(|&other| other != count)
                .map_or(BATCH_PAGES, |len| start.wrapping_add(len));
            Some((self.iova_of(start)..self.iova_of(next), count))
        })
    }

    /// Removes all pins of `pages`, pinned or not. Returns the number of pins removed.
    fn revoke(&mut self, pages: Range<usize>) -> u64 {
        let mut pins = 0u64;
        let mut page = pages.start;
        while page < pages.end && !self.is_empty() {
            let run = self.counts[page..pages.end]
                .iter()
                .take_while(|&&count| count > 0)
                .count();
            if run == 0 {
                page = page.wrapping_add(1);
            } else {
                // The next iteration starts at `page` again, in case it has more pins.
                self.unpin(page..page.wrapping_add(run));
                pins = pins.wrapping_add(run as u64);
            }
        }
        pins
    }

    /// Calls `f` with the memory of each of `pages`, up to the first one that isn't pinned.
    #[inline]
    fn for_each(&self, pages: Range<usize>, mut f: impl FnMut(usize, &PageMemory<'_>)) {
        for i in pages {
            if self.counts[i] == 0 {
                return;
            }
            // SAFETY: By the type invariant the page is valid while it is pinned, which it is while
            // `self` is borrowed.
            unsafe { PageMemory::with(self.pages[i], |memory| f(i, memory)) };
        }
    }
}

impl Drop for PinnedPages {
    fn drop(&mut self) {
        self.revoke(0..BATCH_PAGES);
    }
}

/// The part of a range of IOVA in one batch.
struct Part {
    batch: u64,
    pages: Range<usize>,
}

/// Splits the pages of `range` at batches.
fn parts(range: &Range<u64>) -> impl Iterator<Item = Part> {
    let end = range.end;
    let mut next = range.start;
    core::iter::from_fn(move || {
        if next >= end {
            return None;
        }
        let batch = next & !(BATCH_SIZE - 1);
        let batch_end = batch.saturating_add(BATCH_SIZE);
        let first = next.wrapping_sub(batch) as usize >> PAGE_SHIFT;
        next = end.min(batch_end);
        let last = (next.wrapping_sub(batch) as usize).div_ceil(PAGE_SIZE);
        Some(Part {
            batch,
            pages: first..last,
        })
    })
}

/// All pinned pages of a device.
///
/// A page can have several pins, and stays pinned until all of them are removed.
///
/// # Invariants
///
/// - Batches are keyed by their first IOVA, a multiple of [`BATCH_SIZE`], and none is empty.
/// - `held` is the sum of the counts of all batches.
pub(super) struct PinTable {
    batches: RBTree<u64, PinnedPages>,
    held: u64,
    /// Of batches that a pin may need.
    reserved: KVVec<Room>,
    pub(super) raw: RawPins,
}

impl PinTable {
    pub(super) fn new() -> Self {
        Self {
            batches: RBTree::new(),
            held: 0,
            reserved: KVVec::new(),
            raw: RawPins::new(),
        }
    }

    /// Sees to it that [`Self::pin`] needs no more memory for these pages, whatever is pinned then.
    pub(super) fn reserve(&mut self, range: &Range<u64>) -> Result {
        let mut reserved = KVVec::new();
        for _ in parts(range) {
            reserved.push(Room::new()?, GFP_KERNEL_ACCOUNT)?;
        }
        self.reserved = reserved;
        Ok(())
    }

    pub(super) fn release_reserved(&mut self) {
        self.reserved = KVVec::new();
    }

    pub(super) fn held(&self) -> u64 {
        self.held.wrapping_add(self.raw.held())
    }

    /// Adds one pin to each page of `range`, or to none. Fails with `EINTR` if `interrupted`
    /// returns true before a batch.
    ///
    /// # Safety
    ///
    /// `vdev` is open, and the same in every call. [`Self::unpin_all`] is called before it is
    /// closed.
    pub(super) unsafe fn pin(
        &mut self,
        vdev: NonNull<bindings::vfio_device>,
        range: Range<u64>,
        interrupted: impl Fn() -> bool,
    ) -> Result {
        for part in parts(&range) {
            let pinned = if interrupted() {
                Err(EINTR)
            } else {
                // SAFETY: The caller promises the same of `vdev`.
                unsafe { self.pin_part(vdev, &part) }
            };
            if let Err(e) = pinned {
                let done = range.start..range.start.max(part.batch);
                for part in parts(&done) {
                    self.unpin_part(&part);
                }
                return Err(e);
            }
        }
        Ok(())
    }

    /// # Safety
    ///
    /// As for [`Self::pin`].
    unsafe fn pin_part(&mut self, vdev: NonNull<bindings::vfio_device>, part: &Part) -> Result {
        if let Some(batch) = self.batches.get_mut(&part.batch) {
            // SAFETY: The caller promises that `vdev` is open until all pages are unpinned.
            unsafe { batch.pin(part.pages.clone())? };
        } else {
            // Before the pin: one that is taken back leaves its pages dirty.
            let Room { node, pages } = match self.reserved.pop() {
                Some(room) => room,
                None => Room::new()?,
            };
            let mut batch = PinnedPages::new(vdev, part.batch, pages);
            // SAFETY: As above.
            unsafe { batch.pin(part.pages.clone())? };
            self.batches.insert(node.into_node(part.batch, batch));
        }
        self.held = self.held.wrapping_add(part.pages.len() as u64);
        Ok(())
    }

    fn unpin_part(&mut self, part: &Part) {
        if let Some(batch) = self.batches.get_mut(&part.batch) {
            batch.unpin(part.pages.clone());
            self.held = self.held.wrapping_sub(part.pages.len() as u64);
            if batch.is_empty() {
                self.batches.remove(&part.batch);
            }
        }
    }

    /// Removes one pin of each page of `range`, or fails with `ENXIO` if one of them isn't pinned.
    pub(super) fn unpin(&mut self, range: Range<u64>) -> Result {
        self.check_pinned(&range)?;
        for part in parts(&range) {
            self.unpin_part(&part);
        }
        Ok(())
    }

    /// Removes all pins of the pages of `range`. Can't fail, as `dma_unmap` can't.
    pub(super) fn revoke(&mut self, range: Range<u64>) {
        self.raw.revoke(&range);
        let first = range.start & !(BATCH_SIZE - 1);
        let mut cursor = self.batches.cursor_lower_bound_mut(&first);
        while let Some(mut at) = cursor {
            let (&iova, batch) = at.current_mut();
            if iova >= range.end {
                break;
            }
            let page = |at: u64| (at.wrapping_sub(iova).min(BATCH_SIZE) as usize) >> PAGE_SHIFT;
            let revoked = batch.revoke(page(range.start.max(iova))..page(range.end));
            self.held = self.held.wrapping_sub(revoked);
            cursor = if batch.is_empty() {
                at.remove_current().0
            } else {
                at.move_next()
            };
        }
    }

    /// Runs of pages with the same number of pins, and that number, in order of IOVA. A run doesn't
    /// extend over several batches.
    pub(super) fn runs(&self) -> impl Iterator<Item = (Range<u64>, u16)> + '_ {
        self.batches.iter().flat_map(|(_, batch)| batch.runs())
    }

    /// Removes all pins of all pages.
    pub(super) fn unpin_all(&mut self) {
        self.batches = RBTree::new();
        self.held = 0;
        self.raw = RawPins::new();
        self.release_reserved();
    }

    /// Fails with `ENXIO` unless every page that `range` touches is pinned.
    fn check_pinned(&self, range: &Range<u64>) -> Result {
        for part in parts(range) {
            let batch = self.batches.get(&part.batch).ok_or(ENXIO)?;
            if !batch.all_pinned(part.pages) {
                return Err(ENXIO);
            }
        }
        Ok(())
    }

    /// Calls `f(iova, bytes, memory)` for every page that `range` touches, in order: the page's
    /// IOVA, the bytes of it that are in the range, and its memory. Fails with `ENXIO` before the
    /// first call if one of them isn't pinned.
    #[inline]
    pub(super) fn access(
        &self,
        range: Range<u64>,
        mut f: impl FnMut(u64, Range<usize>, &PageMemory<'_>),
    ) -> Result {
        self.check_pinned(&range)?;
        for part in parts(&range) {
            let batch = self.batches.get(&part.batch).ok_or(ENXIO)?;
            batch.for_each(part.pages, |i, memory| {
                let page = batch.iova_of(i);
                let offset = |at: u64| at.wrapping_sub(page).min(PAGE_SIZE as u64) as usize;
                f(
                    page,
                    offset(range.start.max(page))..offset(range.end),
                    memory,
                );
            });
        }
        Ok(())
    }
}

#[cfg(kunit_suites)]
#[kunit_tests(rust_mdev_dma_pins)]
mod tests {
    use super::*;

    const PAGE: u64 = PAGE_SIZE as u64;

    fn split(range: Range<u64>) -> Result<KVec<(u64, Range<usize>)>> {
        let mut all = KVec::new();
        for part in parts(&range) {
            all.push((part.batch, part.pages), GFP_KERNEL)?;
        }
        Ok(all)
    }

    #[test]
    fn parts_of_ranges() -> Result {
        assert!(split(PAGE..PAGE)?.is_empty());
        assert_eq!(split(PAGE..2 * PAGE)?[..], [(0, 1..2)]);
        // A page counts if a byte of it does.
        assert_eq!(split(PAGE - 1..PAGE + 1)?[..], [(0, 0..2)]);
        assert_eq!(split(0..BATCH_SIZE)?[..], [(0, 0..BATCH_PAGES)]);
        assert_eq!(
            split(BATCH_SIZE - PAGE..2 * BATCH_SIZE + PAGE)?[..],
            [
                (0, BATCH_PAGES - 1..BATCH_PAGES),
                (BATCH_SIZE, 0..BATCH_PAGES),
                (2 * BATCH_SIZE, 0..1)
            ]
        );
        Ok(())
    }

    #[test]
    fn parts_at_the_end_of_the_address_space() -> Result {
        let last = u64::MAX & !(BATCH_SIZE - 1);
        assert_eq!(
            split(u64::MAX - PAGE..u64::MAX)?[..],
            [(last, BATCH_PAGES - 2..BATCH_PAGES)]
        );
        Ok(())
    }

    #[test]
    fn runs_of_a_batch() -> Result {
        // `held` stays 0, so that nothing is unpinned in the end.
        let mut batch = PinnedPages::new(NonNull::dangling(), BATCH_SIZE, Room::new()?.pages);
        assert_eq!(batch.runs().count(), 0);
        batch.counts[0] = 1;
        batch.counts[1] = 1;
        batch.counts[2] = 3;
        batch.counts[BATCH_PAGES - 1] = 3;
        let page = |i: usize| BATCH_SIZE + i as u64 * PAGE;
        let mut runs = batch.runs();
        assert_eq!(runs.next(), Some((page(0)..page(2), 1)));
        assert_eq!(runs.next(), Some((page(2)..page(3), 3)));
        let last = page(BATCH_PAGES - 1)..page(BATCH_PAGES);
        assert_eq!(runs.next(), Some((last, 3)));
        assert_eq!(runs.next(), None);
        assert!(batch.all_pinned(0..3) && !batch.all_pinned(0..4));
        Ok(())
    }

    #[test]
    fn an_empty_table_has_no_pins() {
        let mut table = PinTable::new();
        assert_eq!(table.unpin(0..PAGE), Err(ENXIO));
        assert_eq!(table.access(0..PAGE, |_, _, _| ()), Err(ENXIO));
        table.revoke(0..u64::MAX);
        assert_eq!(table.held(), 0);
        assert_eq!(table.runs().count(), 0);
    }
}
