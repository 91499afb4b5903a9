// SPDX-License-Identifier: GPL-2.0-only

//! The groups of a container, and what they make of its dirty pages.
//!
//! A device without an IOMMU gets at memory by `vfio_pin_pages()` and `vfio_dma_rw()` only, so type1
//! knows what it may have written. One with an IOMMU gets at all that is mapped, by itself, and nobody
//! says what it wrote: as long as such a group is in the container, every page of every mapping is
//! dirty. Unless the group is *promoted*: it has pinned pages, which says that its driver accounts for
//! all it writes by what it pins. For other devices of the group it can't speak: a group of several is
//! never promoted.

use super::Container;
use crate::{Bitmap, Errno, Errnos, Protection, mapping::Mapped};
use std::ops::{Range, RangeInclusive};

/// What a group's devices get at memory by.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum GroupKind {
    /// The host's CPU: they have no IOMMU.
    Emulated,
    /// An IOMMU.
    Iommu {
        /// The ranges of IOVA that it can map, ascending.
        ranges: Vec<RangeInclusive<u64>>,
        /// Whether the group has several devices.
        shared: bool,
    },
}

/// A group that is in a container.
#[derive(Clone, Debug, Hash)]
pub(super) struct Group {
    kind: GroupKind,
    /// Whether what it pins is all that it writes.
    pinned_scope: bool,
}

impl Group {
    fn iova_ranges(&self) -> Option<&[RangeInclusive<u64>]> {
        match &self.kind {
            GroupKind::Emulated => None,
            GroupKind::Iommu { ranges, .. } => Some(ranges),
        }
    }
}

impl Container {
    /// `VFIO_GROUP_SET_CONTAINER`: a group joins the container. One with an IOMMU gets at all that is
    /// mapped from now on, which therefore must be possible, and is locked.
    pub fn join(&mut self, group: u32, kind: GroupKind) -> Result<(), Errnos> {
        let twice = self.groups.contains_key(&group);
        let no_vaddr = Errnos::when(self.lacks_vaddr(), Errno::EBUSY);
        (no_vaddr | Errnos::when(twice, Errno::EINVAL)).check()?;
        let pinned_scope = kind == GroupKind::Emulated;
        let group_of = Group { kind, pinned_scope };
        if let Some(ranges) = group_of.iova_ranges() {
            self.attach_errnos(ranges).check()?;
        }
        self.groups.insert(group, group_of);
        Ok(())
    }

    /// A group leaves the container, by `VFIO_GROUP_UNSET_CONTAINER` or because it is closed. None of
    /// its devices is open.
    ///
    /// If what it wrote was not accounted for, that is made good now: everything is dirty, once. With
    /// the last group, all mappings go.
    pub fn leave(&mut self, group: u32) {
        let Some(Group { pinned_scope, .. }) = self.groups.remove(&group) else { return };
        if self.groups.is_empty() {
            self.remove(0, u64::MAX);
            self.stop();
        }
        if !pinned_scope {
            for mapped in self.mappings.values_mut() {
                mapped.dirty = mapped.dirty.take().map(|dirty| all_of(dirty.pages()));
            }
        }
    }

    /// Whether a group is in the container.
    pub fn has_group(&self, group: u32) -> bool {
        self.groups.contains_key(&group)
    }

    /// The groups in the container, and of each whether all that it writes is accounted for: it has no
    /// IOMMU, or was promoted.
    pub fn groups(&self) -> impl ExactSizeIterator<Item = (u32, bool)> {
        self.groups.iter().map(|(&group, one)| (group, one.pinned_scope))
    }

    /// Whether a group with an IOMMU is in the container: all that is mapped is locked.
    pub fn has_iommu(&self) -> bool {
        self.groups.values().any(|group| group.iova_ranges().is_some())
    }

    /// Whether a group without an IOMMU is in the container.
    pub(super) fn has_emulated(&self) -> bool {
        self.groups.values().any(|group| group.kind == GroupKind::Emulated)
    }

    /// Whether every page of every mapping counts as dirty.
    pub fn all_dirty(&self) -> bool {
        self.groups.values().any(|group| !group.pinned_scope)
    }

    /// Whether a device with an IOMMU can read from, or write to, all of a range.
    pub fn allows_dma(&self, range: Range<u64>, wanted: Protection) -> bool {
        let mut next = range.start;
        while next < range.end {
            match self.overlapping(next, next).next() {
                Some(mapped) if mapped.protection.allows(wanted) => next = mapped.end(),
                _ => return false,
            }
        }
        self.has_iommu()
    }

    /// A device with an IOMMU writes to a range, see [`Self::allows_dma`].
    pub fn dma_written(&mut self, range: Range<u64>) {
        for page in crate::device::pages(range, self.page_size) {
            self.mark(page..page + self.page_size);
        }
    }

    /// A device of the group has pinned pages.
    pub(super) fn promote(&mut self, group: u32) {
        if let Some(group) = self.groups.get_mut(&group) {
            group.pinned_scope |= matches!(group.kind, GroupKind::Iommu { shared: false, .. });
        }
    }

    /// What is wrong with a mapping to make, if a group with an IOMMU is in the container.
    pub(super) fn iommu_map_errnos(&self, new: &Mapped) -> Errnos {
        if !self.has_iommu() {
            return Errnos::NONE;
        }
        let ranges = self.groups.values().filter_map(Group::iova_ranges);
        let errnos = ranges.fold(Errnos::NONE, |errnos, ranges| errnos | outside(new, ranges));
        let mut locked = self.locked_pages();
        errnos | self.lock_errnos(new, &mut locked)
    }

    /// What is wrong with the mappings there are for a group to join whose IOMMU can map `ranges`.
    fn attach_errnos(&self, ranges: &[RangeInclusive<u64>]) -> Errnos {
        let mappings = || self.mappings.values();
        let errnos = mappings().fold(Errnos::NONE, |errnos, one| errnos | outside(one, ranges));
        if self.has_iommu() {
            return errnos;
        }
        let mut locked = self.locked_pages();
        mappings().fold(errnos, |errnos, one| errnos | self.lock_errnos(one, &mut locked))
    }

    /// What is wrong with a mapping whose pages are all to be locked, of which so many pages in the
    /// container are `locked`, to which they are added.
    fn lock_errnos(&self, mapped: &Mapped, locked: &mut u64) -> Errnos {
        let accessible = mapped.accessible_until(mapped.iova, self.page_size);
        // What can't be mapped anyway may have more pins than pages.
        let pinned = self.pinned_pages(mapped.iova..mapped.end());
        *locked += (mapped.size / self.page_size).saturating_sub(pinned);
        let too_many = mapped.limited && self.lock_limit.is_some_and(|limit| *locked > limit);
        Errnos::when(accessible < mapped.end(), Errno::EFAULT)
            | Errnos::when(too_many, Errno::ENOMEM)
    }
}

/// Whether a mapping isn't in one of `ranges`.
fn outside(mapped: &Mapped, ranges: &[RangeInclusive<u64>]) -> Errnos {
    let inside = |range: &RangeInclusive<u64>| {
        range.contains(&mapped.iova) && range.contains(&mapped.last())
    };
    Errnos::when(!ranges.iter().any(inside), Errno::EINVAL)
}

/// A bitmap in which every page is dirty.
pub(super) fn all_of(pages: u64) -> Bitmap {
    let mut bitmap = Bitmap::new(pages);
    bitmap.set(0..pages);
    bitmap
}
