// SPDX-License-Identifier: GPL-2.0-only

use crate::{Bitmap, BitmapBuffer};
use std::collections::BTreeSet;

/// What a device may do to a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Protection {
    /// `VFIO_DMA_MAP_FLAG_READ`
    pub read: bool,
    /// `VFIO_DMA_MAP_FLAG_WRITE`
    pub write: bool,
}

impl Protection {
    /// Nothing: no mapping may have this.
    pub const NONE: Self = Self { read: false, write: false };
    /// Read only.
    pub const READ: Self = Self { read: true, write: false };
    /// Write only.
    pub const WRITE: Self = Self { read: false, write: true };
    /// Read and write.
    pub const READ_WRITE: Self = Self { read: true, write: true };

    pub(crate) fn allows(self, wanted: Self) -> bool {
        self.read >= wanted.read && self.write >= wanted.write
    }
}

/// The arguments of `VFIO_IOMMU_MAP_DMA`, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Where the device sees it.
    pub iova: u64,
    /// Where the process has it.
    pub vaddr: u64,
    /// How much it is.
    pub size: u64,
    /// What the device may do to it.
    pub protection: Protection,
}

/// What a container has mapped.
#[derive(Clone, Debug, Hash)]
pub(crate) struct Mapped {
    pub(crate) iova: u64,
    pub(crate) size: u64,
    pub(crate) protection: Protection,
    /// Bytes from its begin on for which the process has memory.
    backed: u64,
    /// Pages, by IOVA, that the process made inaccessible.
    hidden: BTreeSet<u64>,
    /// Whether its pins count against the limit on locked pages.
    pub(crate) limited: bool,
    /// Whether the process's address of it is valid.
    pub(crate) has_vaddr: bool,
    /// One bit a page, while tracking is on.
    pub(crate) dirty: Option<Bitmap>,
}

impl Mapped {
    pub(crate) fn new(mapping: &Mapping, backed: u64, limited: bool) -> Self {
        let &Mapping { iova, size, protection, .. } = mapping;
        Self {
            iova,
            size,
            protection,
            backed,
            hidden: BTreeSet::new(),
            limited,
            has_vaddr: true,
            dirty: None,
        }
    }

    /// Its last byte.
    pub(crate) fn last(&self) -> u64 {
        self.iova + (self.size - 1)
    }

    /// Where it ends; `u64::MAX` if that is the end of the address space.
    pub(crate) fn end(&self) -> u64 {
        self.iova.saturating_add(self.size)
    }

    /// How far from `iova` on the process has memory: where that ends, or `iova` if there is none.
    pub(crate) fn accessible_until(&self, iova: u64, page_size: u64) -> u64 {
        let backed_end = self.iova.saturating_add(self.backed);
        let hidden = self.hidden.range(iova - iova % page_size..).next();
        hidden.map_or(backed_end, |&page| page.min(backed_end)).max(iova)
    }

    /// The process makes its memory under `page` inaccessible, or accessible again.
    pub(crate) fn set_hidden(&mut self, page: u64, hidden: bool) {
        if hidden {
            self.hidden.insert(page);
        } else {
            self.hidden.remove(&page);
        }
    }

    /// The bytes of `buffer` that its bitmap takes, up to their end, in a bitmap that begins at
    /// `base`.
    pub(crate) fn bitmap_end(&self, base: u64, page_size: u64) -> u64 {
        BitmapBuffer::bytes((self.iova - base) / page_size + self.size / page_size)
    }
}
