// SPDX-License-Identifier: GPL-2.0-only

use crate::{Errno, Errnos};

/// The most pages of which type1 keeps account in one mapping, or in one bitmap:
/// `DIRTY_BITMAP_PAGES_MAX` of `vfio_iommu_type1.c`. Users learn it from
/// `vfio_iommu_type1_info_cap_migration::max_dirty_bitmap_size`.
pub const BITMAP_PAGES_MAX: u64 = i32::MAX as u64;

/// A user's buffer for a bitmap: what `struct vfio_bitmap` says of it, and how it really is. It is
/// zeroed, as `vfio.h` demands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapBuffer {
    /// Bytes of a page, one bit each.
    pub pgsize: u64,
    /// Bytes of the buffer.
    pub size: u64,
    /// Bytes from its begin on that can be written, a multiple of 8. Behind them there is no memory,
    /// or it is read-only.
    pub writable: u64,
}

impl BitmapBuffer {
    /// The smallest buffer for `size` bytes of IOVA.
    pub fn covering(size: u64, page_size: u64) -> Self {
        Self { pgsize: page_size, size: Self::bytes(size / page_size), writable: u64::MAX }
    }

    /// Bytes of a bitmap of `pages` pages: whole words of 64 bits.
    pub fn bytes(pages: u64) -> u64 {
        pages.div_ceil(64) * 8
    }

    /// What is wrong with what is said of it, for `size` bytes of IOVA.
    pub(crate) fn errnos(&self, size: u64) -> Errnos {
        // That there are pages, and such pages, is looked at with the range.
        let pages = size.checked_div(self.pgsize).unwrap_or(0);
        let big_enough = self.size >= Self::bytes(pages);
        let too_big = self.size > Self::bytes(BITMAP_PAGES_MAX);
        Errnos::when(!big_enough || too_big, Errno::EINVAL)
    }
}
