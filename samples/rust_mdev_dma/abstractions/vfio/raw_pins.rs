// SPDX-License-Identifier: GPL-2.0

//! Pinned ranges of a VFIO device, each as one `vfio_pin_pages()` took it: from any IOVA, with any
//! protection.

use super::{Operations, Pins};
use crate::{abstractions::page::PageMemory, bindings};
use core::{ops::Range, ptr::NonNull};
use kernel::{
    error::to_result,
    page::{PAGE_SHIFT, PAGE_SIZE},
    prelude::*,
};

/// The arguments of a `vfio_pin_pages()`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct RawRange {
    /// Anywhere in the first page.
    pub(crate) iova: u64,
    /// Number of pages.
    pub(crate) pages: u32,
    /// `IOMMU_READ`, `IOMMU_WRITE`, or what isn't one.
    pub(crate) protection: u32,
}

impl RawRange {
    /// The first byte of the page that contains `iova`.
    fn start(&self) -> u64 {
        self.iova & (PAGE_SIZE as u64).wrapping_neg()
    }

    /// The last byte of the last page.
    fn last(&self) -> u64 {
        let size = u64::from(self.pages) << PAGE_SHIFT;
        self.start().saturating_add(size.saturating_sub(1))
    }

    /// Whether it has pages of `range`.
    fn overlaps(&self, range: &Range<u64>) -> bool {
        self.start() < range.end && range.start <= self.last()
    }

    fn has(&self, protection: u32) -> bool {
        self.protection & protection == protection
    }
}

/// The pins that one `vfio_pin_pages()` took.
///
/// Dropping it returns them, by one `vfio_unpin_pages()`: iommufd requires the ranges that were
/// pinned.
///
/// # Invariants
///
/// This object owns one pin, taken by `vfio_pin_pages()` for `vdev`, of each of `pages`, which are
/// those of `range`; `vdev` is open.
struct RawPin {
    vdev: NonNull<bindings::vfio_device>,
    range: RawRange,
    pages: KVVec<*mut bindings::page>,
}

// SAFETY: Pins belong to the device, not to the thread that took them.
unsafe impl Send for RawPin {}

impl RawPin {
    /// Pins all pages of `range`, or none.
    ///
    /// # Safety
    ///
    /// `vdev` is open, and stays so until this has been dropped.
    unsafe fn new(vdev: NonNull<bindings::vfio_device>, range: RawRange) -> Result<Self> {
        let count = c_int::try_from(range.pages)?;
        let null = core::ptr::null_mut();
        let mut pages = KVVec::from_elem(null, range.pages as usize, GFP_KERNEL_ACCOUNT)?;
        // SAFETY: `vdev` is open, and there is an entry for each of the pages.
        let pinned = unsafe {
            bindings::vfio_pin_pages(
                vdev.as_ptr(),
                range.iova,
                count,
                range.protection as c_int,
                pages.as_mut_ptr(),
            )
        };
        to_result(pinned.min(0))?;
        if pinned != count {
            if pinned > 0 {
                // SAFETY: `vfio_pin_pages()` has pinned so many of the pages.
                unsafe { bindings::vfio_unpin_pages(vdev.as_ptr(), range.iova, pinned) };
            }
            return Err(EFAULT);
        }
        // INVARIANT: All pages have just been pinned.
        Ok(Self { vdev, range, pages })
    }

    /// Calls `f(iova, bytes, memory)` for every page, in order: the page's IOVA, the bytes of it
    /// from `range.iova` on, and its memory.
    fn for_each(&self, mut f: impl FnMut(u64, Range<usize>, &PageMemory<'_>)) {
        let mut iova = self.range.start();
        let mut first = self.range.iova.wrapping_sub(iova) as usize;
        for &page in &self.pages {
            // SAFETY: By the type invariant the page is pinned, which it is while `self` is
            // borrowed.
            unsafe { PageMemory::with(page, |memory| f(iova, first..PAGE_SIZE, memory)) };
            iova = iova.wrapping_add(PAGE_SIZE as u64);
            first = 0;
        }
    }
}

impl Drop for RawPin {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the device is open, and this owns a pin of each page. There
        // are as many as `new` made a `c_int` of.
        unsafe {
            bindings::vfio_unpin_pages(
                self.vdev.as_ptr(),
                self.range.iova,
                self.range.pages as c_int,
            )
        };
    }
}

/// All raw pins of a device, in no order.
///
/// # Invariants
///
/// `held` is the number of their pages, each as often as it is pinned.
pub(super) struct RawPins {
    pins: KVVec<RawPin>,
    held: u64,
}

impl RawPins {
    pub(super) fn new() -> Self {
        Self {
            pins: KVVec::new(),
            held: 0,
        }
    }

    pub(super) fn held(&self) -> u64 {
        self.held
    }

    /// Unpins those that have pages of `range`, as a whole.
    pub(super) fn revoke(&mut self, range: &Range<u64>) {
        let held = &mut self.held;
        self.pins.retain(|pin| {
            let kept = !pin.range.overlaps(range);
            if !kept {
                *held = held.wrapping_sub(pin.range.pages.into());
            }
            kept
        });
    }
}

impl<T: Operations> Pins<'_, T> {
    /// Pins `range` by one `vfio_pin_pages()`, whose errors are passed on. Either all of it is
    /// pinned or nothing.
    ///
    /// It stays so until it is unpinned as a whole, the user unmaps any page of it, or the device
    /// is closed.
    pub(crate) fn raw_pin(&mut self, range: RawRange) -> Result {
        self.table.raw.pins.reserve(1, GFP_KERNEL_ACCOUNT)?;
        // SAFETY: By `OpenDevice`'s invariant the device is open, and stays so while `self` exists.
        // `close_callback` calls `unpin_all()`, which drops all raw pins.
        let pin = unsafe { RawPin::new(self.dev.as_raw(), range)? };
        self.table.raw.pins.push(pin, GFP_KERNEL_ACCOUNT)?;
        let held = &mut self.table.raw.held;
        *held = held.wrapping_add(range.pages.into());
        Ok(())
    }

    /// Returns what one [`Self::raw_pin`] of this very range took, or fails with `ENXIO`.
    pub(crate) fn raw_unpin(&mut self, range: RawRange) -> Result {
        let raw = &mut self.table.raw;
        let found = raw.pins.iter().position(|pin| pin.range == range);
        drop(raw.pins.remove(found.ok_or(ENXIO)?).map_err(|_| ENXIO)?);
        raw.held = raw.held.wrapping_sub(range.pages.into());
        Ok(())
    }

    /// The raw pins.
    pub(crate) fn raw(&self) -> impl Iterator<Item = RawRange> + '_ {
        self.table.raw.pins.iter().map(|pin| pin.range)
    }

    /// A raw pin of the IOVA and number of pages of `range`, with at least its protection. Fails
    /// with `ENXIO` if there is none of these pages, with `EACCES` if only without the protection.
    fn raw_with(&self, range: RawRange) -> Result<&RawPin> {
        let mut error = ENXIO;
        for pin in &self.table.raw.pins {
            if (pin.range.iova, pin.range.pages) == (range.iova, range.pages) {
                if pin.range.has(range.protection) {
                    return Ok(pin);
                }
                error = EACCES;
            }
        }
        Err(error)
    }

    /// Calls `f(iova, bytes, memory)` for every page of a raw pin, in order: the page's IOVA, the
    /// bytes of it from the IOVA of the pin on, and its memory.
    ///
    /// Any raw pin of the IOVA and number of pages of `range` will do that has `IOMMU_READ`. Fails
    /// with `ENXIO` if there is none of these pages, with `EACCES` if there is none with the
    /// protection.
    pub(crate) fn raw_read(
        &self,
        range: RawRange,
        f: impl FnMut(u64, Range<usize>, &PageMemory<'_>),
    ) -> Result {
        let protection = bindings::IOMMU_READ;
        self.raw_with(RawRange {
            protection,
            ..range
        })?
        .for_each(f);
        Ok(())
    }

    /// As [`Self::raw_read`], with `IOMMU_WRITE`, for an `f` that writes all bytes, which are then
    /// logged as dirty.
    pub(crate) fn raw_write(
        &self,
        range: RawRange,
        f: impl FnMut(u64, Range<usize>, &PageMemory<'_>),
    ) -> Result {
        let protection = bindings::IOMMU_WRITE;
        let pin = self.raw_with(RawRange {
            protection,
            ..range
        })?;
        pin.for_each(f);
        let written = range.iova..pin.range.last().saturating_add(1);
        self.dev.logging().written(&written);
        Ok(())
    }
}

#[cfg(kunit_suites)]
#[kunit_tests(rust_mdev_dma_raw_pins)]
mod tests {
    use super::*;

    const PAGE: u64 = PAGE_SIZE as u64;

    fn at(iova: u64, pages: u32) -> RawRange {
        RawRange {
            iova,
            pages,
            protection: bindings::IOMMU_READ,
        }
    }

    #[test]
    fn ranges_are_of_whole_pages() {
        let range = at(PAGE + 5, 2);
        assert_eq!((range.start(), range.last()), (PAGE, 3 * PAGE - 1));
        assert!(range.overlaps(&(0..PAGE + 1)));
        assert!(range.overlaps(&(3 * PAGE - 1..4 * PAGE)));
        assert!(!range.overlaps(&(0..PAGE)));
        assert!(!range.overlaps(&(3 * PAGE..4 * PAGE)));
    }

    #[test]
    fn the_last_page_of_the_address_space() {
        let range = at(u64::MAX, 1);
        assert_eq!(
            (range.start(), range.last()),
            (u64::MAX - PAGE + 1, u64::MAX)
        );
        assert_eq!(at(u64::MAX, u32::MAX).last(), u64::MAX);
    }

    #[test]
    fn all_of_a_protection() {
        let range = at(0, 1);
        assert!(range.has(bindings::IOMMU_READ) && range.has(0));
        assert!(!range.has(bindings::IOMMU_READ | bindings::IOMMU_WRITE));
    }
}
