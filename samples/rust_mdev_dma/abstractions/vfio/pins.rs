// SPDX-License-Identifier: GPL-2.0

//! Pages of the user's memory that a VFIO device keeps pinned.

use crate::bindings;
use core::{marker::PhantomData, ops::Range, ptr::NonNull};
use kernel::{
    error::to_result,
    page::{PAGE_SHIFT, PAGE_SIZE},
    prelude::*,
    rbtree::{RBTree, RBTreeNode},
};
use pin_init::init_zeroed;

/// Pages of a block of IOVA space: those that one call of `vfio_pin_pages()` pins at most.
///
/// No more than `VFIO_PIN_PAGES_MAX_ENTRIES`; small, because a block costs its whole size (704 bytes,
/// in two allocations) when only one of its pages is pinned.
pub(crate) const BLOCK_PAGES: usize = 64;

/// Pins that a device can have of one page.
pub(crate) const PAGE_PINS: u16 = u16::MAX;

const BLOCK_SIZE: u64 = (BLOCK_PAGES * PAGE_SIZE) as u64;

/// The memory of a pinned page.
///
/// The user, and other devices, read and write it at any time. So nothing ever refers to it: words
/// and bytes are copied in and out one at a time, each by one volatile access.
///
/// # Invariants
///
/// `self.0` is valid for reads and writes of a page for the lifetime `'a`, and page aligned.
pub(crate) struct PageMemory<'a>(NonNull<u8>, PhantomData<&'a ()>);

impl PageMemory<'_> {
    /// Words of 64 bits in a page.
    pub(crate) const WORDS: usize = PAGE_SIZE / size_of::<u64>();

    /// Writes `words`, of those that the page has: `f(i)` are the `N` words from number `i` on, which
    /// are written little endian.
    ///
    /// `N` words are written in one turn of a loop, which is more than the compiler would do.
    #[inline]
    pub(crate) fn write_words<const N: usize>(
        &self,
        words: Range<usize>,
        f: impl Fn(usize) -> [u64; N],
    ) {
        const { assert!(N > 0) };
        let end = words.end.min(Self::WORDS);
        let whole = words.start..end - end.saturating_sub(words.start) % N;
        for i in whole.clone().step_by(N) {
            // SAFETY: `whole` ends where a step does: `i + N` is no more than `WORDS`.
            let at = unsafe { self.0.cast::<u64>().add(i) };
            for (j, word) in f(i).into_iter().enumerate() {
                // SAFETY: As above, and `j` is less than `N`; the type invariant does the rest.
                unsafe { at.add(j).write_volatile(word.to_le()) };
            }
        }
        for (i, word) in (whole.end..end).zip(f(whole.end)) {
            // SAFETY: `i` is less than `WORDS`; the type invariant does the rest.
            unsafe { self.0.cast::<u64>().add(i).write_volatile(word.to_le()) };
        }
    }

    /// Writes `byte(i)` to every byte `i` of `bytes` that the page has.
    #[inline]
    pub(crate) fn write_bytes(&self, bytes: Range<usize>, mut byte: impl FnMut(usize) -> u8) {
        for i in bytes.start..bytes.end.min(PAGE_SIZE) {
            // SAFETY: `i` is less than `PAGE_SIZE`; the type invariant does the rest.
            unsafe { self.0.add(i).write_volatile(byte(i)) };
        }
    }

    /// Calls `f(i, word)` with every little endian word `i` of `words` that the page has.
    #[inline]
    pub(crate) fn read_words(&self, words: Range<usize>, mut f: impl FnMut(usize, u64)) {
        for i in words.start..words.end.min(Self::WORDS) {
            // SAFETY: `i` is less than `WORDS`; the type invariant does the rest.
            let word = unsafe { self.0.cast::<u64>().add(i).read_volatile() };
            f(i, u64::from_le(word));
        }
    }
}

/// Pinned pages of one block of IOVA space.
///
/// Dropping it unpins them.
///
/// # Invariants
///
/// - This object owns `counts[i]` pins, taken by `vfio_pin_pages()` for `vdev`, of the page at
///   `iova + i * PAGE_SIZE`. While there are any, `pages[i]` is that page.
/// - `held` is the sum of all counts.
/// - While there are any pins, `vdev` is open.
struct PinnedPages {
    vdev: NonNull<bindings::vfio_device>,
    iova: u64,
    pages: KBox<[*mut bindings::page; BLOCK_PAGES]>,
    counts: [u16; BLOCK_PAGES],
    held: u32,
}

// SAFETY: Pins belong to the device, not to the thread that took them.
unsafe impl Send for PinnedPages {}

impl PinnedPages {
    fn new(vdev: NonNull<bindings::vfio_device>, iova: u64) -> Result<Self> {
        // INVARIANT: There are no pins yet.
        Ok(Self {
            vdev,
            iova,
            pages: KBox::init(init_zeroed(), GFP_KERNEL)?,
            counts: [0; BLOCK_PAGES],
            held: 0,
        })
    }

    fn is_empty(&self) -> bool {
        self.held == 0
    }

    fn all_pinned(&self, pages: Range<usize>) -> bool {
        !self.counts[pages].contains(&0)
    }

    fn iova_of(&self, page: usize) -> u64 {
        self.iova + (page << PAGE_SHIFT) as u64
    }

    /// Pins all of `pages` once more, or none.
    ///
    /// # Safety
    ///
    /// `vdev` is open, and stays so until the last of these pins is given back.
    unsafe fn pin(&mut self, pages: Range<usize>) -> Result {
        // With fewer pins in the whole block, no page has so many.
        if self.held >= u32::from(PAGE_PINS) && self.counts[pages.clone()].contains(&PAGE_PINS) {
            return Err(ENOSPC);
        }

        // `vfio_pin_pages()` overwrites entries of pages that were pinned before: with the same if it
        // succeeds, with anything if it fails.
        let before = (self.held != 0).then(|| *self.pages);
        // SAFETY: `vdev` is open, and there is an entry for each of the pages.
        let ret = unsafe {
            bindings::vfio_pin_pages(
                self.vdev.as_ptr(),
                self.iova_of(pages.start),
                pages.len() as c_int,
                (bindings::IOMMU_READ | bindings::IOMMU_WRITE) as c_int,
                self.pages[pages.clone()].as_mut_ptr(),
            )
        };

        // INVARIANT: `vfio_pin_pages()` pinned the first `ret` of the pages.
        let pinned = pages.start..pages.start + (ret.max(0) as usize).min(pages.len());
        for count in &mut self.counts[pinned.clone()] {
            // None was `PAGE_PINS`.
            *count = count.wrapping_add(1);
        }
        self.held += pinned.len() as u32;
        if pinned.len() == pages.len() {
            return Ok(());
        }

        // INVARIANT: The pages that are still pinned then are those that were pinned before.
        self.unpin(pinned);
        if let Some(before) = before {
            *self.pages = before;
        }
        to_result(ret.min(0))?;
        Err(EFAULT)
    }

    /// Gives back one pin of each of `pages`, which must all be pinned.
    fn unpin(&mut self, pages: Range<usize>) {
        if pages.is_empty() || !self.all_pinned(pages.clone()) {
            return;
        }

        // INVARIANT: The pins are given back right here.
        for count in &mut self.counts[pages.clone()] {
            // None was 0.
            *count = count.wrapping_sub(1);
        }
        self.held -= pages.len() as u32;
        // SAFETY: By the type invariant the device is open, and `self` owned a pin of each page.
        unsafe {
            bindings::vfio_unpin_pages(
                self.vdev.as_ptr(),
                self.iova_of(pages.start),
                pages.len() as c_int,
            )
        };
    }

    /// The runs of pages that are pinned equally often.
    fn runs(&self) -> impl Iterator<Item = (Range<u64>, u16)> + '_ {
        let mut next = 0;
        core::iter::from_fn(move || {
            let start = next + self.counts[next..].iter().position(|&count| count > 0)?;
            let count = self.counts[start];
            next = self.counts[start..]
                .iter()
                .position(|&other| other != count)
                .map_or(BLOCK_PAGES, |len| start + len);
            Some((self.iova_of(start)..self.iova_of(next), count))
        })
    }

    /// Gives back all pins of those of `pages` that are pinned. Returns how many there were.
    fn revoke(&mut self, pages: Range<usize>) -> u64 {
        let mut pins = 0;
        let mut page = pages.start;
        while page < pages.end && !self.is_empty() {
            let run = self.counts[page..pages.end]
                .iter()
                .take_while(|&&count| count > 0)
                .count();
            if run == 0 {
                page += 1;
            } else {
                // A page that was pinned more often is still there in the next round.
                self.unpin(page..page + run);
                pins += run as u64;
            }
        }
        pins
    }

    /// Calls `f` with the memory of each of `pages`, up to the first that isn't pinned.
    #[inline]
    fn for_each(&self, pages: Range<usize>, mut f: impl FnMut(usize, &PageMemory<'_>)) {
        for i in pages {
            if self.counts[i] == 0 {
                return;
            }
            // SAFETY: By the type invariant the page is valid while it is pinned, which it is while
            // `self` is borrowed.
            let addr = unsafe { bindings::kmap_local_page(self.pages[i]) };
            if let Some(ptr) = NonNull::new(addr.cast()) {
                // INVARIANT: The page is mapped at `ptr` until `kunmap_local()`, and it stays the
                // user's memory until it is unpinned.
                f(i, &PageMemory(ptr, PhantomData));
            }
            // SAFETY: `addr` was mapped last: whatever `f` mapped it has unmapped, as all safe ways
            // to map a page take a closure, like this one.
            unsafe { bindings::kunmap_local(addr) };
        }
    }
}

impl Drop for PinnedPages {
    fn drop(&mut self) {
        self.revoke(0..BLOCK_PAGES);
    }
}

/// The part of a range of IOVA that lies in one block.
struct Part {
    block: u64,
    pages: Range<usize>,
}

/// Cuts the pages of `range` at the borders of blocks.
fn parts(range: &Range<u64>) -> impl Iterator<Item = Part> {
    let end = range.end;
    let mut next = range.start;
    core::iter::from_fn(move || {
        if next >= end {
            return None;
        }
        let block = next & !(BLOCK_SIZE - 1);
        let block_end = block.saturating_add(BLOCK_SIZE);
        let first = (next - block) as usize >> PAGE_SHIFT;
        next = end.min(block_end);
        let last = ((next - block) as usize).div_ceil(PAGE_SIZE);
        Some(Part {
            block,
            pages: first..last,
        })
    })
}

/// All pages that a device keeps pinned.
///
/// A page may be pinned several times, it is then unpinned by as many calls.
///
/// # Invariants
///
/// - Blocks are keyed by their first IOVA, a multiple of [`BLOCK_SIZE`], and none is empty.
/// - `held` is the sum of the counts of all blocks.
pub(super) struct PinTable {
    blocks: RBTree<u64, PinnedPages>,
    held: u64,
}

impl PinTable {
    pub(super) fn new() -> Self {
        Self {
            blocks: RBTree::new(),
            held: 0,
        }
    }

    pub(super) fn held(&self) -> u64 {
        self.held
    }

    /// Pins all pages of `range`, or none. Between blocks, it ends with `EINTR` if it was
    /// `interrupted`.
    ///
    /// # Safety
    ///
    /// `vdev` is open, and [`Self::revoke_all`] is called before it is closed. It is the same in
    /// every call.
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
                // SAFETY: As the caller promises.
                unsafe { self.pin_part(vdev, &part) }
            };
            if let Err(e) = pinned {
                let done = range.start..range.start.max(part.block);
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
        if let Some(block) = self.blocks.get_mut(&part.block) {
            // SAFETY: As the caller promises.
            unsafe { block.pin(part.pages.clone())? };
        } else {
            let mut block = PinnedPages::new(vdev, part.block)?;
            // SAFETY: As the caller promises. If the allocation below fails, `block` is dropped.
            unsafe { block.pin(part.pages.clone())? };
            let node = RBTreeNode::new(part.block, block, GFP_KERNEL)?;
            self.blocks.insert(node);
        }
        self.held += part.pages.len() as u64;
        Ok(())
    }

    fn unpin_part(&mut self, part: &Part) {
        if let Some(block) = self.blocks.get_mut(&part.block) {
            block.unpin(part.pages.clone());
            self.held -= part.pages.len() as u64;
            if block.is_empty() {
                self.blocks.remove(&part.block);
            }
        }
    }

    /// Gives back one pin of each page of `range`, or fails with `ENXIO` if one isn't pinned.
    pub(super) fn unpin(&mut self, range: Range<u64>) -> Result {
        self.check_pinned(&range)?;
        for part in parts(&range) {
            self.unpin_part(&part);
        }
        Ok(())
    }

    /// Gives back all pins of the pages of `range`. Never fails, as `dma_unmap` mustn't.
    pub(super) fn revoke(&mut self, range: Range<u64>) {
        let first = range.start & !(BLOCK_SIZE - 1);
        let mut cursor = self.blocks.cursor_lower_bound_mut(&first);
        while let Some(mut at) = cursor {
            let (&iova, block) = at.current_mut();
            if iova >= range.end {
                break;
            }
            let page = |at: u64| ((at - iova).min(BLOCK_SIZE) as usize) >> PAGE_SHIFT;
            self.held -= block.revoke(page(range.start.max(iova))..page(range.end));
            cursor = if block.is_empty() {
                at.remove_current().0
            } else {
                at.move_next()
            };
        }
    }

    /// The runs of pages that are pinned, in order, and how often they are. A run ends where a block
    /// does.
    pub(super) fn runs(&self) -> impl Iterator<Item = (Range<u64>, u16)> + '_ {
        self.blocks.iter().flat_map(|(_, block)| block.runs())
    }

    /// Gives back all pins.
    pub(super) fn revoke_all(&mut self) {
        self.blocks = RBTree::new();
        self.held = 0;
    }

    /// Fails with `ENXIO` unless every page that `range` touches is pinned.
    fn check_pinned(&self, range: &Range<u64>) -> Result {
        for part in parts(range) {
            let block = self.blocks.get(&part.block).ok_or(ENXIO)?;
            if !block.all_pinned(part.pages) {
                return Err(ENXIO);
            }
        }
        Ok(())
    }

    /// Calls `f` with the memory of every page that `range` touches, and with the part of `range`
    /// that lies in it, in bytes of the page. Fails with `ENXIO` before any call of `f` if one of
    /// them isn't pinned.
    #[inline]
    pub(super) fn access(
        &self,
        range: Range<u64>,
        mut f: impl FnMut(u64, Range<usize>, &PageMemory<'_>),
    ) -> Result {
        self.check_pinned(&range)?;
        for part in parts(&range) {
            let block = self.blocks.get(&part.block).ok_or(ENXIO)?;
            block.for_each(part.pages, |i, memory| {
                let page = block.iova_of(i);
                let offset = |at: u64| (at - page).min(PAGE_SIZE as u64) as usize;
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
